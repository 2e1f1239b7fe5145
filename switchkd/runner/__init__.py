"""Running one model fast: what its config says, its cache, its attention, its layers, and the runner that keeps all of these.

In come a transformers model, and token ids and lengths as tensors on its device; out go next-token logits, a forward at a time.
Nothing here knows that there are two models.
"""
