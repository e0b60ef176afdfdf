"""The command ``fit``: from labelled images to a classifier in a folder."""

from __future__ import annotations

import dataclasses
import shlex
from typing import TYPE_CHECKING, Any

import click

from tir_kernels.analysis.measures import MEASURES
from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.arms import make_arms
from tir_kernels.fewshot.interrupts import PROGRAM, leaving_at_once
from tir_kernels.fewshot.options import (
    fit_settings_options,
    method_fields,
    method_options,
    one_method_option,
    preset_option,
    reading_options,
    source_options,
    with_options,
)
from tir_kernels.fewshot.presets import tell_preset
from tir_kernels.fewshot.report_command import PAGE_NAME, show_page
from tir_kernels.fewshot.run.workers import Place
from tir_kernels.fewshot.run_options import Inputs, Reading, settings_named
from tir_kernels.fewshot.settings import FitSettings, Runtime
from tir_kernels.fewshot.track.settings import Tracking
from tir_kernels.fewshot.unforeseen import describe_unforeseen
from tir_kernels.text import Notice, printable, setting

if TYPE_CHECKING:
    from rich.console import Console

    from tir_kernels.fewshot.classifier.about import About
    from tir_kernels.fewshot.classifier.prepared_fit import Fitted, PreparedFit


@click.command()
@source_options(
    "CLASSIFIER",
    "Folder of the classifier, which is made. The same command continues a fit that was stopped.",
)
@one_method_option()
@preset_option()
@reading_options()
@fit_settings_options()
@click.option(
    "--track",
    metavar="every=N[,measures=NAME+NAME]",
    help="Read measures of attention and tokens on the images every N steps of the training on all "
    "of them, and draw a page; the classifier does not depend on it. Measures, all unless set: "
    f"{', '.join(MEASURES)}.",
)
@method_options()
def fit(**options: Any) -> None:
    """Make a classifier from all labelled images of a data set.

    Its accuracy on other images is estimated by trainings that leave out a part of them in turn.
    """
    try:
        with leaving_at_once():
            prepared = _prepared(options)
        _show(prepared.run())
    except (FewShotError, click.ClickException, click.Abort):
        raise
    except Exception as error:
        from tir_kernels.fewshot.classifier.folder import FIT_FOLDER
        from tir_kernels.fewshot.run.folder import expanded_out

        raise describe_unforeseen(error, expanded_out(options["out"]) / FIT_FOLDER) from error


def _prepared(options: dict[str, Any]) -> PreparedFit:
    """All that can be checked before the model is loaded."""
    from rich.console import Console

    def taken(kind: type) -> Any:
        """The options that are fields of a dataclass, as one of these."""
        names = [field.name for field in dataclasses.fields(kind) if field.name in options]
        return kind(**{name: options[name] for name in names})

    if Place.of_this_process().count > 1:
        raise FewShotError("a classifier is made by one process; start fit without torchrun")
    console = Console(stderr=True)
    with settings_named():
        settings, runtime = taken(FitSettings), taken(Runtime)
        known = [field.name for field, _ in method_fields() if field.name in options]
        given = {name: options[name] for name in known if options[name] is not None}
        preset = options["preset"]
        (arm,) = make_arms([options["method"]], (), given, preset)
        tracking = _tracking(options["track"])
    with console.status("loading libraries"):
        from tir_kernels.fewshot.classifier.prepared_fit import FitOptions, PreparedFit
        from tir_kernels.fewshot.run.progress import Messages

    chosen = FitOptions(options["out"], arm.method, tracking)
    messages = Messages(console, with_options)
    tell_preset(preset, [arm], messages.tell)
    return PreparedFit(chosen, taken(Inputs), taken(Reading), settings, runtime, messages)


def _tracking(text: str | None) -> Tracking | None:
    if text is None:
        return None
    tracking = Tracking.parse(text)
    if "maps=" in text:
        raise FewShotError(f"{setting('track')}: fit keeps no maps for pictures; leave maps out")
    return dataclasses.replace(tracking, maps=0)


def _show(fitted: Fitted) -> None:
    """Print what was measured, whether to trust it, and what can be done next."""
    from rich.console import Console

    from tir_kernels.fewshot.classifier.figures import doubts

    console = Console()
    about, path = fitted.about, shlex.quote(str(fitted.path))
    if fitted.was_finished:
        _say(console, f"{printable(str(fitted.path))} is finished, with these settings.")
    _print_table(about, console)
    for doubt in doubts(about.figures, about.support):
        _say(console, f"Warning: {doubt}.")
    if fitted.tracked is not None:
        tracked = shlex.quote(str(fitted.tracked))
        _say(console, f"Measures: {printable(tracked)} ({PROGRAM} report draws them)")
        # Of a fit that was killed before its page was drawn, it is drawn now.
        if not (fitted.was_finished and (fitted.path / PAGE_NAME).exists()):
            show_page([fitted.tracked], fitted.path)
    _say(console, f"Classifier: {printable(str(fitted.path))}")
    for command in (f"predict {path} IMAGES", f"evaluate {path} --data OTHER_LABELLED_IMAGES"):
        _say(console, f"Next: {PROGRAM} {printable(command)}")


def _print_table(about: About, console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    from tir_kernels.fewshot.classifier.figures import accuracy_figures, why_no_estimate

    few, many = min(about.support), max(about.support)
    each = f"{few} of each class" if few == many else f"{few} to {many} of a class"
    rows = [
        ("labelled images", str(sum(about.support)), each),
        ("classes", str(len(about.labels)), ""),
        *accuracy_figures(about.figures),
    ]
    table = Table(title=f"Classifier by method {about.method.name}")
    for heading in ("", "value", "what it says"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)
    if "held_out_accuracy" not in about.figures:
        why = why_no_estimate(about.settings["folds"], about.support)
        _say(console, f"No held-out estimate: {why}. Only other labelled images tell the accuracy.")


def _say(console: Console, text: str) -> None:
    line = with_options(Notice(text))
    console.print(line, soft_wrap=True, markup=False, emoji=False, highlight=False)
