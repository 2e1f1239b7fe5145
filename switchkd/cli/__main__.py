"""`python -m switchkd.cli`: how child processes and torchrun start a command."""

import atexit
import os
import sys

from switchkd.cli.main import main


def leave(code: int) -> None:
    """End the process, as ``sys.exit`` does.

    One of several processes (torchrun sets RANK) ends behind what is registered for its end, before Python takes itself apart: a
    thread of torch's process group may then still let go of a tensor, and abort a process whose work is done.
    """
    if "RANK" not in os.environ:
        sys.exit(code)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main())
