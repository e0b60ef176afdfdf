"""The arms of an ablation, and the end of the command that runs them."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from tir_kernels.fewshot.methods import DEFAULT_METHODS
from tir_kernels.text import printable

if TYPE_CHECKING:
    from rich.console import Console

    from tir_kernels.fewshot.run.ablation import Ablation

PUBLISHED, BASELINE = DEFAULT_METHODS
REFERENCES = ("zero-shot", "linear-probe")  # frozen towers

# Name behind the published method's -> its options. Each answers one question.
VARIANTS = {
    "attention": "placement=attention",
    "both": "placement=both",
    # Is it turning down or turning up, in either reading: of the counts at the ends alone, or of
    # the published ramp's halves.
    "suppress": "rule=suppress",
    "amplify": "rule=amplify",
    "suppress-linear": "rule=suppress-linear",
    "amplify-linear": "rule=amplify-linear",
    # Do the classes matter, or would as many tokens with the same weights do.
    "most-attended": "selection=attention",
    "random": "selection=random",
    # Does text matter.
    "centroids": "relevance=centroids",
}


def ablation_methods() -> tuple[str, ...]:
    """The methods that are arms of their own names."""
    return (BASELINE, PUBLISHED, *REFERENCES)


def ablation_arms() -> tuple[str, ...]:
    """The other arms as ``--arm`` takes them, such as ``tir@both=tir,placement=both``."""
    return tuple(f"{PUBLISHED}@{name}={PUBLISHED},{options}" for name, options in VARIANTS.items())


def print_ablation(ablation: Ablation, console: Console) -> None:
    """Print the table of accuracies, and for each quantity of sinks how the arms change it."""
    from tir_kernels.fewshot.run.ablation import accuracy_rows, change_rows

    title = "Ablation: mean ± 95 % confidence interval over episodes"
    _print_table(title, accuracy_rows(ablation), console)
    (_, *heading), *rows = change_rows(ablation)
    for quantity, own in itertools.groupby(rows, key=lambda row: row[0]):
        title = f"{quantity}: last step minus first, mean over blocks"
        _print_table(title, [heading, *(row[1:] for row in own)], console)


def _print_table(title: str, rows: list[list[str]], console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    heading, *rest = rows
    table = Table(title=Text(printable(title)))
    for name in heading:
        table.add_column(Text(printable(name)), overflow="fold")
    for row in rest:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console.print(table)
