"""The command line `switchkd`: one command is a settings dataclass and a function, and `commands.py` lists them all.
In come the words that somebody typed, with a recipe or a run directory to take defaults from.
Out go an exit code, what the command prints, and the files that it leaves; nothing in the other rooms imports this one.
"""
