"""A teacher on another device than the student's, and one that is spread over two: the same as on one."""

import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]


def test_a_teacher_on_another_device_and_on_two(tmp_path):
    """In a process of its own, as torch never forgets a device; there are three mutants too, each of which mixes devices."""
    command = [sys.executable, str(TESTS / "two_devices.py"), str(tmp_path / "runs")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=TESTS.parent)
    assert done.returncode == 0, done.stderr[-4000:]
