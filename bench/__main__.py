"""``python -m bench``, ``python -m bench model`` and ``python -m bench kernels``."""

import sys

if __name__ == "__main__":
    if sys.argv[1:2] == ["model"]:
        from bench.model_command import main

        main(sys.argv[2:], prog_name="python -m bench model")
    elif sys.argv[1:2] == ["kernels"]:
        from bench.step_kernels import main

        main(sys.argv[2:], prog_name="python -m bench kernels")
    else:
        from bench.command import main
        from tir_kernels.allocator import keep_freed_memory

        keep_freed_memory()  # or times are the allocator's too, and depend on what ran before
        main(prog_name="python -m bench")
