"""The arms of an ablation, and the end of the command that runs them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tir_kernels.fewshot.methods import DEFAULT_METHODS

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
    """Print the tables that the run's page has: accuracies, and how the arms change sinks."""
    from tir_kernels.analysis.page.comparison import comparison_tables
    from tir_kernels.analysis.page.terminal import print_tables

    print_tables(comparison_tables(ablation), console)
