"""Small programs of tests, each in a process of its own."""

import subprocess
import sys
from typing import Any


def output_of(program: str, *arguments: str, **options: Any) -> str:
    """What a program prints, without the blanks around it; it must succeed.

    Args:
        program: Its text.
        arguments: Its arguments.
        options: For ``subprocess.run``, such as ``env`` and ``cwd``.
    """
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()
