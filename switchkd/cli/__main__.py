"""`python -m switchkd.cli`: how child processes and torchrun start a command."""

import sys

from switchkd.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
