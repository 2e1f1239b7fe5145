"""What the teachers say: asked now (``asked``, ``said``), or once and kept on the disk (``store``, ``states``).

In come a pair of models and texts with their completions; out goes what each teacher says at every token of them, exactly or as its
likeliest tokens, in a form that an objective compares with the student.
"""
