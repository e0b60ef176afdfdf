"""``python -m bench.first_step THREADS run ...``: ``tir-finetune`` until its first training step.

The exit status is 0 after a step; otherwise it is the program's, or 1 where that is 0.
"""

from __future__ import annotations

import os
import sys


def main() -> int:
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from tir_kernels.fewshot.command import main as finetune

    def end(*_: object) -> None:
        if torch.cuda.is_available() and not torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()
        os._exit(0)  # what the interpreter does at its end is no part of starting

    threads, *arguments = sys.argv[1:]
    torch.set_num_threads(int(threads))
    register_optimizer_step_post_hook(end)
    status = finetune(arguments)
    if status == 0:
        print("tir-finetune took no training step", file=sys.stderr)
    return status or 1


if __name__ == "__main__":
    sys.exit(main())
