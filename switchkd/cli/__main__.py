"""Runs `python -m switchkd.cli`."""

import sys

from switchkd.cli.main import main

sys.exit(main())
