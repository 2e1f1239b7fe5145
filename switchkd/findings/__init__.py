"""What a study came to: its runs gathered in one small file, its claims judged, and the pages that show it.

In come the folder of a study, or that one file; out go ``study.md``, verdicts, figures, and while the runs go on a page that shows
how far they are and what further seeds would be worth. Nothing is run here.
"""
