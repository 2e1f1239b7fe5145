"""`python -m switchkd.cli`: how child processes and torchrun start a command."""

import atexit
import os
import sys

from switchkd.cli.main import main


def leave(code: int) -> None:
    """End the process with this exit code.

    One of several processes (torchrun sets RANK) runs its exit handlers and then ends at once. While Python takes itself apart, a
    thread of torch's process group may still let go of a tensor, which aborts a process whose work is done; that the handlers end
    the group (`switchkd.forward.sharding`) has not always been enough.
    """
    if "RANK" not in os.environ:
        sys.exit(code)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main())
