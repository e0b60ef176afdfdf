"""``tir-finetune``, and ``python -m tir_kernels.fewshot``: the door to the command line.

Nothing slow is imported here, so that Ctrl-C is answered in a program's first seconds too.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tir_kernels.allocator import keep_freed_memory
from tir_kernels.fewshot.interrupts import leaving_at_once


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; see ``tir_kernels.fewshot.command.main``."""
    keep_freed_memory()
    with leaving_at_once():
        from tir_kernels.fewshot.command import main as run
    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
