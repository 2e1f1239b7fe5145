"""Grids of runs, made, checked beforehand and compared as one; and the small pair that they can be run on.

In comes a plan (methods, seeds, pairs, budgets); out go runs, each in a process of its own, and tables and figures of all
of them.
"""
