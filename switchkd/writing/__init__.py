"""The texts of a pair's examples: written now, word by word where the tokenizers differ, or once and kept.

In come a pair, examples and `DecodeSettings`; out go `Rollouts`, or the examples with the teacher's completions.
"""
