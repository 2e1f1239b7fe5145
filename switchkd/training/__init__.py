"""The one training loop, and all the state that moves.

In come a pair, texts and a `TrainConfig`; out go a better student, a line of metrics for every step, and checkpoints from
which the same run goes on. Which text (`reading`), what is learned from it (`learner`), how it is kept (`checkpoint`).
"""
