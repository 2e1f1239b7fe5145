"""Grids of runs, made and checked beforehand; and the small pair that they can be run on.

In comes a plan (methods, seeds, pairs, budgets); out go runs, each in a process of its own.
"""
