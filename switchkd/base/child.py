"""Python processes that run a module of this package as it is here, and import nothing from the working directory."""

import os
import sys
import sysconfig
from pathlib import Path


def command(module: str, *arguments: str) -> list[str]:
    """What starts the process; it needs ``environment``."""
    return [sys.executable, "-P", "-m", module, *arguments]


def environment(**more: str) -> dict[str, str]:
    """This process's environment and ``more``; where the package is not installed, the process finds it all the same."""
    root = str(Path(__file__).resolve().parents[2])
    paths = [os.environ.get("PYTHONPATH", ""), root if root != sysconfig.get_path("purelib") else ""]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **more}
