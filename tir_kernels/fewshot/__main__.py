"""``python -m tir_kernels.fewshot`` is ``tir-finetune``."""

import sys

from tir_kernels.fewshot.command import main

if __name__ == "__main__":
    sys.exit(main())
