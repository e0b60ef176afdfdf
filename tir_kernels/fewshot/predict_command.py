"""The command ``predict``: images of any number to a table of classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.interrupts import leaving_at_once
from tir_kernels.fewshot.option_kinds import NAME, Count
from tir_kernels.fewshot.options import base_options, decoding_options, with_options
from tir_kernels.fewshot.run.workers import Place
from tir_kernels.fewshot.run_options import settings_named
from tir_kernels.fewshot.settings import AUTO, PRECISIONS, Runtime
from tir_kernels.operators.choose import backend_names
from tir_kernels.text import setting

if TYPE_CHECKING:
    from tir_kernels.fewshot.predict.running import Prediction


@click.command()
@click.argument("classifier", type=NAME, metavar="CLASSIFIER")
@click.argument("images", type=NAME, nargs=-1, required=True, metavar="IMAGES...")
@click.option(
    "--out",
    type=NAME,
    metavar="FILE",
    help="CSV or Parquet file to write, by its ending; by default CSV goes to standard output. The "
    "same command continues one that was stopped.",
)
@click.option(
    "--top",
    type=Count(1, 10**6, "no classifier has as many classes"),
    default=1,
    help="How many of the likeliest classes are named, each with its probability.",
)
@click.option(
    "--probabilities", is_flag=True, help="Add a column with the probability of each class."
)
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    help="Type of products: float32, or that of an autocast region; by default as in training.",
)
@click.option(
    "--batch-size",
    default=64,
    type=Count(1, 10**6, "no memory holds as many"),
    help="Images that are classified at once; no result depends on it but for rounding.",
)
@click.option(
    "--device", default=AUTO, help="cpu, cuda, cuda:1, ...; auto is cuda if there is one."
)
@click.option(
    "--backend",
    default=AUTO,
    metavar=f"[{AUTO}|{'|'.join(backend_names())}]",
    help="Backend of the operators; auto serves what it lacks.",
)
@base_options()
@decoding_options()
@click.option(
    "--report",
    is_flag=True,
    help="Write a page beside the output with the predictions that are most and least sure.",
)
def predict(**options: Any) -> None:
    """Classify IMAGES with the CLASSIFIER, a folder that fit has made.

    \b
    tir-finetune predict classifiers/chest xrays/ --out predictions.csv
    writes a row for each image in the folder xrays and below it:
        image,label,probability
        xrays/0001.png,effusion,0.873512

    IMAGES are files, folders, quoted patterns such as "x/**/*.jpg" or "shard-{0000..0099}.tar",
    lists (.txt: a path on each line; .csv or .tsv: a column image, path or file), shards of
    WebDataset (.tar), or - for paths on standard input. Images that can't be read are listed beside
    the output, and the rest is classified.
    """
    from tir_kernels.fewshot.unforeseen import describe_unforeseen

    try:
        with leaving_at_once():
            prediction = _prepared(options)
        prediction.run()
    except (FewShotError, click.ClickException, click.Abort):
        raise
    except Exception as error:
        raise describe_unforeseen(error, None) from error


def _prepared(options: dict[str, Any]) -> Prediction:
    """All that can be checked before the model is loaded."""
    from tir_kernels.fewshot.predict.running import Prediction, Request

    place = Place.of_this_process()
    if options["pretrained"] is not None and options["model"] is None:
        raise FewShotError(f"{setting('pretrained')} needs {setting('model')} beside it")
    with settings_named():
        precision = options["precision"]
        Runtime(options["device"], precision or "float32", options["backend"])
    names = Request.__dataclass_fields__
    request = Request(**{name: options[name] for name in names})
    return Prediction(request, place, spelled=with_options)
