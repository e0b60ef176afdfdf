"""``tir-finetune export``: a classifier in forms that other programs read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.option_kinds import NAME
from tir_kernels.fewshot.options import base_options
from tir_kernels.text import setting

if TYPE_CHECKING:
    from collections.abc import Callable

    from tir_kernels.fewshot.classifier.classifier import Classifier


@click.command()
@click.argument("classifier", type=NAME)
@click.option(
    "--merged",
    type=NAME,
    metavar="FOLDER",
    help="Write the model with LoRA merged into its weights, the embeddings of the "
    "classes, and the few lines of code that use them.",
)
@click.option(
    "--transformers",
    type=NAME,
    metavar="FOLDER",
    help="Write LoRA as a PEFT adapter for the same base model in transformers. It "
    "holds neither prompt context nor re-weighting.",
)
@click.option(
    "--with-base",
    type=NAME,
    metavar="FOLDER",
    help="Write the classifier with a copy of its base model, for machines that can't get it.",
)
@base_options()
def export(
    classifier: str,
    merged: str | None,
    transformers: str | None,
    with_base: str | None,
    model: str | None,
    pretrained: str | None,
) -> None:
    """Write a CLASSIFIER of ``fit`` in forms that other programs read."""
    given = {"merged": merged, "transformers": transformers, "with_base": with_base}
    if not any(given.values()):
        names = ", ".join(map(setting, given))
        raise FewShotError(f"nothing to write: pass {names} with a folder")
    from tir_kernels.fewshot.classifier.export import export_merged, export_transformers
    from tir_kernels.fewshot.classifier.folder import load_classifier, save_classifier

    loaded = load_classifier(classifier, model=model, pretrained=pretrained)

    def save_with_base(classifier: Classifier, path: str) -> None:
        save_classifier(classifier, path, include_base=True)

    writers: dict[str, Callable[[Classifier, str], None]] = {
        "merged": export_merged,
        "transformers": export_transformers,
        "with_base": save_with_base,
    }
    for name, write in writers.items():
        if path := given[name]:
            write(loaded, path)
            click.echo(f"{path}: written")
