"""What a script or a notebook calls: distil, score, and look at what came of it.

In come names or loaded models, and data as files or as rows; out goes a `Run`, which knows its student, metrics, scores and report.
"""
