"""``python -m bench``, and ``python -m bench model``."""

import sys

if __name__ == "__main__":
    if sys.argv[1:2] == ["model"]:
        from bench.model import main

        main(sys.argv[2:], prog_name="python -m bench model")
    else:
        from bench.command import main

        main(prog_name="python -m bench")
