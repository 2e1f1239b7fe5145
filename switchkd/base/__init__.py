"""What every room stands on: errors, plain values, settings, files that are whole or absent, locks, signals, the terminal.

In come bytes and text that others wrote; out go values that are what their types say, and files that are all there or not
there.
"""

__version__ = "0.2.0"
