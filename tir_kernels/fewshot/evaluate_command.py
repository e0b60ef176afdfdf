"""``tir-finetune evaluate``: how good a classifier is on labelled images."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING, Any

import click

from tir_kernels.errors import FewShotError, first_line
from tir_kernels.fewshot.evaluation.settings import FIT, EvaluateSettings
from tir_kernels.fewshot.interrupts import leaving_at_once
from tir_kernels.fewshot.option_kinds import NAME
from tir_kernels.fewshot.options import base_options, decoding_options, group_option, with_options
from tir_kernels.fewshot.report_command import FORMATS
from tir_kernels.fewshot.settings import AUTO, PRECISIONS, Runtime
from tir_kernels.text import printable, setting

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

    from tir_kernels.fewshot.classifier.classifier import Classifier
    from tir_kernels.fewshot.evaluation.evaluation import Evaluation

_MOST_CLASSES = 40  # in the terminal
_FIELDS = {field.name: field for field in dataclasses.fields(EvaluateSettings)}


def _help(name: str) -> str:
    return _FIELDS[name].metadata["help"]


@click.command()
@click.argument("classifier", type=NAME)
@click.option(
    "--data",
    type=NAME,
    required=True,
    metavar="LABELLED",
    help="Labelled images, of any kind that fit takes. Their classes are matched with the "
    "classifier's by name.",
)
@click.option("--images", type=NAME, metavar="DIR", help="Folder of the images that a list names.")
@click.option(
    "--out",
    type=NAME,
    metavar="FOLDER",
    help="Folder for answers as they are made, and for tables, figures and a page. The same "
    "command continues an evaluation that was stopped.",
)
@click.option(
    "--support",
    type=NAME,
    metavar="SOURCE",
    help=f"The data that fit was given, for --temperature {FIT}; never the evaluated images. The "
    "classifier knows its images among the evaluated ones without it, by their digests.",
)
@click.option(
    "--support-images",
    type=NAME,
    metavar="DIR",
    help="Folder of the images that --support names, where that is a list.",
)
@click.option("--exclude-support", is_flag=True, help=_help("exclude_support"))
@click.option("--leave-out-unknown", is_flag=True, help=_help("leave_out_unknown"))
@group_option()
@click.option("--temperature", metavar="fit|FLOAT", help=_help("temperature"))
@click.option(
    "--keep-temperature",
    is_flag=True,
    help="Write the temperature into the classifier, which predicts with it from then on.",
)
@click.option(
    "--bootstrap", type=int, default=_FIELDS["bootstrap"].default, help=_help("bootstrap")
)
@click.option("--seed", type=int, default=_FIELDS["seed"].default, help=_help("seed"))
@click.option(
    "--format",
    "style",
    type=click.Choice(FORMATS),
    help="Print the tables in this format.",
)
@decoding_options()
@click.option("--skip-unreadable", is_flag=True, help=_help("skip_unreadable"))
@click.option(
    "--batch-size", type=int, default=_FIELDS["batch_size"].default, help=_help("batch_size")
)
@click.option("--device", default=AUTO, help="cpu, cuda, cuda:1, ...; auto: a GPU if there is one.")
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    help="Type of products; by default that of the classifier's training.",
)
@base_options()
def evaluate(classifier: str, **options: Any) -> None:
    """Tell how good a CLASSIFIER of ``fit`` is on labelled images."""
    taken = {name: options[name] for name in _FIELDS}
    try:
        settings = EvaluateSettings(**taken)
    except (ValueError, TypeError) as error:
        name, _, rest = str(error).partition(" ")
        raise FewShotError(f"{setting(name)} {rest}") from error
    if options["keep_temperature"] and settings.temperature is None:
        raise FewShotError(
            f"{setting('keep_temperature')} needs one to keep: pass {setting('temperature', FIT)} "
            "or a number"
        )
    # Without a folder nothing is kept that an interruption could leave to be continued.
    nothing_is_kept = leaving_at_once() if options["out"] is None else contextlib.nullcontext()
    with nothing_is_kept, _memory_named():
        _evaluate(classifier, settings, options)


def _evaluate(classifier: str, settings: EvaluateSettings, options: dict[str, Any]) -> None:
    from rich.console import Console

    notices = Console(stderr=True)
    with leaving_at_once(), notices.status("loading libraries"):
        from tir_kernels.fewshot.evaluation.evaluating import Evaluator
        from tir_kernels.fewshot.evaluation.temperature import keep_temperature
        from tir_kernels.fewshot.run.progress import Messages

    messages = Messages(notices, with_options)
    with notices.status("loading the model"):
        loaded = _loaded(classifier, options, messages.tell)
    with _bar(notices) as progress:
        evaluator = Evaluator(loaded, settings, messages.tell, progress)
        names = ("images", "support", "support_images", "out")
        found = evaluator.evaluate(options["data"], **{name: options[name] for name in names})
    if options["keep_temperature"]:
        keep_temperature(classifier, found.temperature)
        messages.tell(f"{classifier} predicts with temperature {found.temperature:.4g} from now on")
    _show(found, options["style"])
    if options["out"] is not None:
        from tir_kernels.fewshot.evaluation.files import write_files

        page = printable(str(write_files(found, options["out"])))
        # Tables in a format may be sent to a file, which is to hold nothing else.
        click.echo(f"Page: {page}", err=options["style"] is not None)


def _loaded(classifier: str, options: dict[str, Any], tell: Any) -> Classifier:
    from tir_kernels.fewshot.classifier.folder import load_classifier
    from tir_kernels.fewshot.devices import resolve_device
    from tir_kernels.fewshot.run_options import settings_named

    device, note = resolve_device(options["device"])
    if note:
        tell(note)
    with settings_named():
        runtime = Runtime(device=device)
    loaded = load_classifier(
        classifier, model=options["model"], pretrained=options["pretrained"], runtime=runtime
    )
    return loaded.with_precision(options["precision"] or loaded.about.precision)


@contextlib.contextmanager
def _bar(console: Console) -> Iterator[Any]:
    """A bar on a terminal, moved by the number of images that are done and of all."""
    from rich.progress import TimeRemainingColumn

    from tir_kernels.fewshot.run.progress import progress_bars

    bars = progress_bars(console, TimeRemainingColumn())
    task = bars.add_task("images", total=None)
    with bars:
        yield lambda done, total: bars.update(task, completed=done, total=total)


@contextlib.contextmanager
def _memory_named() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        from tir_kernels.fewshot.train.memory import is_lack_of_memory

        if isinstance(error, FewShotError) or not is_lack_of_memory(error):
            raise
        raise FewShotError(
            f"out of memory ({first_line(error)}): lower {setting('batch_size')}, and give the "
            "same command again"
        ) from error


def _show(found: Evaluation, style: str | None) -> None:
    from tir_kernels.analysis.page.tables import titled
    from tir_kernels.fewshot.evaluation import tables

    shown = [tables.score_table(found), tables.class_table(found), tables.mistake_table(found)]
    if style is not None:
        click.echo(titled([table for table in shown if table.rows], style), nl=False)
        return
    from rich.console import Console

    for table in shown:
        if table.rows:
            _print(Console(), table)


def _print(console: Console, table: Any) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from tir_kernels.analysis.page.tables import shown

    grid = Table(title=Text(table.title), title_justify="left", box=box.SIMPLE_HEAD)
    for place, column in enumerate(table.columns):
        grid.add_column(
            Text(printable(column)), justify="right" if place else "left", overflow="fold"
        )
    for row in table.rows[:_MOST_CLASSES]:
        # Text, since names may hold what Rich takes for markup.
        grid.add_row(*(Text("-" if cell is None else shown(cell)) for cell in row))
    console.print(grid)
    if len(table.rows) > _MOST_CLASSES:
        console.print(Text(f"... and {len(table.rows) - _MOST_CLASSES} more"))
