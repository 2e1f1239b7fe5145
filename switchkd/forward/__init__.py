"""What a model says of texts: its output layer, where its texts end, its shards, and the proof that all of this is exact.

In come a transformers model and token ids; out go hidden states and next-token distributions, row by row or token by token,
the same whatever else is in the batch.
"""
