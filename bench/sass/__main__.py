"""``python -m bench.sass``."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from .budgets import over_budget
from .counts import COMMITTED, lines, to_json
from .tools import ARCHITECTURE, compile_kernels, counts_of, nvcc, release


@click.command()
@click.argument("files", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--architecture", default=ARCHITECTURE, show_default=True, type=click.IntRange(75))
@click.option("--write", is_flag=True, help="Write the counts to the file that the model reads.")
def main(files: tuple[Path, ...], architecture: int, write: bool) -> None:
    """Count the instructions of the CUDA kernels' loops; needs no GPU.

    FILES are cubins, objects under build/ or the compiled module tir_kernels/_C*.so. Without any,
    the kernels are compiled for bfloat16 and heads of width 64, backward of width 80 too, and that
    of relevance for float32, which needs nvcc and takes seconds. They are held against their
    budgets (bench/sass/budgets.py): exit status 1 if one is exceeded.
    """
    if write and (files or architecture != ARCHITECTURE):
        raise click.UsageError(
            f"--write keeps the counts of the kernels compiled for sm_{ARCHITECTURE}: give no "
            "FILES and no --architecture with it"
        )
    with tempfile.TemporaryDirectory() as folder:
        given = list(files) or compile_kernels(Path(folder), architecture=architecture)
        found = counts_of(given, architecture)
    if write:
        COMMITTED.write_text(to_json(found, release(nvcc())))
    for line in lines(found):
        click.echo(line)
    if not files and architecture == ARCHITECTURE and (exceeded := list(over_budget(found))):
        raise click.ClickException("over budget:\n  " + "\n  ".join(exceeded))


if __name__ == "__main__":
    main()
