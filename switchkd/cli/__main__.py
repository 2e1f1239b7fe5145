"""`python -m switchkd.cli`: how child processes and torchrun start a command."""

import sys

from switchkd.cli.main import main

sys.exit(main())
