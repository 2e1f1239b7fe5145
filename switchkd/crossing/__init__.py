"""Two tokenizers, one text: what the tokens of two vocabularies have in common.

In come tokenizers and their ends, and texts as ids of one of them. Out go the same texts as the other reads them, which tokens of
two readings match, where a text may change hands, and both models' laws on what they share. No model is run here.
"""
