"""The command ``models``."""

from __future__ import annotations

import click

from tir_kernels.fewshot.interrupts import leaving_at_once
from tir_kernels.fewshot.options import NAME, with_options
from tir_kernels.files import MIB
from tir_kernels.text import Notice, printable


@click.command()
@click.argument("folders", type=NAME, nargs=-1, metavar="[FOLDER]...")
def models(folders: tuple[str, ...]) -> None:
    """List the models that are on this machine, as --model and --pretrained take them.

    They are in Hugging Face's cache, in open_clip's, and in each FOLDER or the folders in it. Those
    that can't be used are listed with the reason.
    """
    with leaving_at_once():
        from tir_kernels.towers.loading.local import local_models
    found_any = False
    for found in local_models(folders):
        found_any = True
        words = f"--model {found.model}"
        if found.pretrained:
            words += f" --pretrained {found.pretrained}"
        line = f"{printable(words)}  ({found.num_bytes / MIB:.0f} MiB)"
        if found.problem:
            line += f": can't be used: {with_options(Notice(found.problem))}"
        click.echo(line)
    if not found_any:
        click.echo(
            "No model is here. Name a folder of models, or fetch one, such as with: "
            "hf download timm/vit_base_patch32_clip_224.openai"
        )
