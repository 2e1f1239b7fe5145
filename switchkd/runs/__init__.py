"""A run from settings to a distilled student, and the directory that it leaves.

In comes a `TrainConfig`; out goes a run directory: settings, checksums, records, checkpoints, scores, the student and its
card. Whether a run may begin or go on, what it would need, and whether its records are true is decided here.
"""
