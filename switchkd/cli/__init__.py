"""The command line `switchkd`: a command is a settings dataclass and a function, and `commands.py` lists them all.

In come the words that somebody typed, and a recipe or a run directory whose settings are the defaults; out go an exit code, what
the command prints, and the files that it leaves.
"""
