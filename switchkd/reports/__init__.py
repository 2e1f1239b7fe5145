"""A run directory as it lies on disk, and what people look at.

In come files that a run wrote, which may be anybody's; out go records by type, comparisons, tables, curves, figures, one
HTML page, and the live view of a run. Reading imports no rule of the run's own and changes nothing.
"""
