"""Two tokenizers, one text: what the tokens of two vocabularies have in common.

In come tokenizers and their ends, and texts as ids of one of them; out go the same texts as the other reads them, which tokens of
two readings match, where a text may change hands, and both models' laws on events that both know. No model is run here.
"""
