"""One place for running a model: its modes, its output layer, its cache, and the proof that all of this is exact.

In come a transformers model and token ids; out go hidden states and next-token distributions, row by row or token by token,
the same whatever else is in the batch.
"""
