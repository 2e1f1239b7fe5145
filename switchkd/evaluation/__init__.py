"""Scores of a model on held-out examples.

In come a pair, examples with references and a task; out goes an `Evaluation`: every score of every example, with its
interval and with what it depends on.
"""
