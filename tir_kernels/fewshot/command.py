"""The command line, ``tir-finetune``."""

# Whoever only asks for help should not wait: what is slow to import is imported where it is used.
from __future__ import annotations

import contextlib
import dataclasses
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.ablate import (
    BASELINE,
    ablation_arms,
    ablation_methods,
    print_ablation,
)
from tir_kernels.fewshot.arms import make_arms
from tir_kernels.fewshot.evaluate_command import evaluate
from tir_kernels.fewshot.export_command import export
from tir_kernels.fewshot.fit_command import fit
from tir_kernels.fewshot.interrupts import INTERRUPTED, PROGRAM, leaving_at_once, terminable
from tir_kernels.fewshot.methods import DEFAULT_METHODS, DEMO_METHODS
from tir_kernels.fewshot.methods_command import methods
from tir_kernels.fewshot.models_command import models
from tir_kernels.fewshot.options import (
    NAME,
    arm_options,
    drawing_options,
    episodes_option,
    method_fields,
    method_options,
    preset_option,
    reading_options,
    settings_options,
    source_options,
    track_option,
    with_options,
)
from tir_kernels.fewshot.predict_command import predict
from tir_kernels.fewshot.presets import tell_preset
from tir_kernels.fewshot.report_command import report, show_page
from tir_kernels.fewshot.run.workers import Place
from tir_kernels.fewshot.run_options import Inputs, Reading, RunOptions, settings_named
from tir_kernels.fewshot.settings import Protocol, Runtime
from tir_kernels.fewshot.streams import forgiving_output
from tir_kernels.fewshot.track.settings import Tracking
from tir_kernels.fewshot.unforeseen import UnforeseenError, describe_unforeseen
from tir_kernels.text import printable, setting

if TYPE_CHECKING:
    from tir_kernels.fewshot.run.summary import Summary

BAD_INPUT = 2
UNFORESEEN = 1


@click.group(
    context_settings={
        "help_option_names": ["-h", "--help"],
        "show_default": True,
        "max_content_width": 100,
    }
)
def cli() -> None:
    """Few-shot fine-tuning of CLIP models with dynamic token re-weighting."""


@cli.command()
@source_options(data_required=False)
@drawing_options()
@arm_options()
@preset_option()
@reading_options()
@episodes_option(20)
@settings_options()
@track_option()
@method_options()
def run(**options: Any) -> None:
    """Fine-tune and score methods on few-shot episodes drawn from classes of images."""
    with _without_tracebacks(options["out"]):
        _run(**options)


@cli.command()
@source_options(data_required=False)
@drawing_options()
@preset_option()
@reading_options()
@episodes_option(20)
@settings_options()
@track_option("every=10")
@method_options()
def ablate(**options: Any) -> None:
    """Compare variants of re-weighting with LoRA on the same episodes, and follow attention sinks.

    The arms are LoRA; the published method, and with weights in the attention or in both places;
    turning down or up alone, in two readings; the same weights for the most attended or for random
    patches; relevance to centroids of the support images; and, as references, the frozen model.
    """
    with _without_tracebacks(options["out"]):
        _run(
            methods=ablation_methods(),
            arms=ablation_arms(),
            then=lambda: _compare(options["out"]),
            **options,
        )


@cli.command()
@click.option("--out", type=NAME, default="runs/demo", metavar="RUN_DIR", help="Folder of the run.")
@episodes_option(6)
@settings_options()
@method_options()
def demo(out: str, **options: Any) -> None:
    """Compare zero-shot, LoRA and re-weighting on an embedded model and a drawn image domain.

    Needs no network and no data: the images are drawn into the run's folder. Trains for 40 steps at
    a learning rate of 1e-3, since a small model learns little at the method's own.
    """
    with _without_tracebacks(out):
        _demo(out, options)


def _demo(out: str, options: dict[str, Any]) -> None:
    from tir_kernels.demo import model_directory, write_image_folder
    from tir_kernels.errors import first_line
    from tir_kernels.fewshot.run.folder import expanded_out

    images = expanded_out(out) / "images"
    try:
        write_image_folder(images)
    except OSError as error:
        raise FewShotError(
            f"{setting('out')}: can't write images to {images}: {first_line(error)}"
        ) from error
    for name, value in {"steps": 40, "lora_lr": 1e-3}.items():
        if options[name] is None:
            options[name] = value
    _run(
        out=out,
        data=str(images),
        class_names=str(images / "class_names.json"),
        model=str(model_directory()),
        methods=DEMO_METHODS,
        arms=(),
        track="every=10",
        no_cache=True,
        **options,
    )


for _command in (report, fit, predict, evaluate, export, models, methods):
    cli.add_command(_command)


def _run(then: Callable[[], None] | None = None, **options: Any) -> None:
    """Carry out a run with the options of the command ``run``, and what follows its tables."""
    from rich.console import Console

    def taken(kind: type) -> Any:
        """The options that are fields of a dataclass, as one of these."""
        names = [field.name for field in dataclasses.fields(kind) if field.name in options]
        return kind(**{name: options[name] for name in names})

    options["data"] = options["data"] or ""
    place = Place.of_this_process()
    console = Console(stderr=True, quiet=not place.is_first)
    with settings_named():
        protocol, runtime = taken(Protocol), taken(Runtime)
        methods = options["methods"] or (() if options["arms"] else DEFAULT_METHODS)
        # A method that was registered after this module was imported has no options of its own.
        known = [field.name for field, _ in method_fields() if field.name in options]
        shared = {name: options[name] for name in known if options[name] is not None}
        preset = options.get("preset")
        arms = make_arms(methods, options["arms"], shared, preset)
        track = options.get("track")
        tracking = None if track is None else Tracking.parse(track)
    with leaving_at_once(), console.status("loading libraries"):
        from tir_kernels.fewshot.prepare import PreparedRun
        from tir_kernels.fewshot.run.folder import is_read_only
        from tir_kernels.fewshot.run.progress import Messages

    messages = Messages(console, with_options)
    tell_preset(preset, arms, messages.tell)
    chosen = RunOptions(options["out"], options["episodes"], arms, tracking)
    prepared = PreparedRun(
        chosen, taken(Inputs), taken(Reading), protocol, runtime, place, messages
    )
    if is_read_only(options["out"]):
        summary, page_folder = prepared.finished(), None
    else:
        summary, page_folder = prepared.run(), options["out"]
    if summary is not None:
        _show(summary, then, page_folder)


def _compare(out: str) -> None:
    """Print how the arms of a finished ablation differ, and keep it beside the summary."""
    from rich.console import Console

    from tir_kernels.fewshot.run.ablation import read_ablation
    from tir_kernels.fewshot.run.folder import (
        ABLATION_NAME,
        expanded_out,
        is_read_only,
        write_json,
    )

    arms = (*ablation_methods(), *(arm.partition("=")[0] for arm in ablation_arms()))
    ablation = read_ablation(out, arms, BASELINE)
    if not is_read_only(out):
        write_json(expanded_out(out) / ABLATION_NAME, ablation.to_json())
    print_ablation(ablation, Console())


def _show(summary: Summary, then: Callable[[], None] | None, page_folder: str | None) -> None:
    """Print a finished run's tables and what follows, and say where there is no result.

    Args:
        summary: The findings.
        then: Prints what follows.
        page_folder: Folder for the run's page; ``None``: none is written.
    """
    from rich.console import Console

    from tir_kernels.fewshot.run.summary import print_summary

    print_summary(summary, Console(), with_options)
    if then is not None:
        then()
    if page_folder is not None:
        show_page([page_folder], page_folder)
    if summary.failures:
        raise FewShotError(
            f"{summary.failures}; the other episodes are finished and the means leave these out: "
            f"lower {setting('lora_lr')} or {setting('context_lr')}, or use "
            f"{setting('precision', 'float32')}, with another {setting('out')}"
        )


@contextlib.contextmanager
def _without_tracebacks(out: str) -> Iterator[None]:
    """Turn what nobody foresaw into a sentence, and a file in the run's folder."""
    try:
        yield
    except (FewShotError, click.ClickException, click.Abort):
        raise
    except Exception as error:
        from tir_kernels.fewshot.run.folder import expanded_out
        from tir_kernels.fewshot.train.memory import is_lack_of_memory

        if is_lack_of_memory(error):
            raise FewShotError(
                "out of memory; what is finished is kept: use a smaller model, a machine with more "
                "memory, or end other programs, and give the same command again"
            ) from error
        raise describe_unforeseen(error, expanded_out(out)) from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Instead of those of the process.

    Returns:
        The exit status: 0, 1 after an error that nobody foresaw, 2 after bad input, 130 after
        Ctrl-C or SIGTERM.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    with forgiving_output() as output:
        try:
            place = Place.of_this_process()
        except FewShotError as error:
            return _tell(error, "")
        status = _answer(words, place)
        output.flush()
        if output.failure and status == 0:
            _say(f"{PROGRAM}: error: standard output can't be written: {output.failure}")
            status = BAD_INPUT
    return status


def _answer(words: list[str], place: Place) -> int:
    try:
        with terminable():
            # Without a command, help is an answer and not an error.
            status = cli.main(words or ["--help"], prog_name=PROGRAM, standalone_mode=False)
        return status if isinstance(status, int) else 0
    except (KeyboardInterrupt, click.Abort):
        if place.is_first:
            command = "the same command"
            if place.count == 1:
                command = f"{PROGRAM} {printable(shlex.join(words))}"
            _say(f"{PROGRAM}: interrupted; what is finished is kept. To continue: {command}")
        return INTERRUPTED
    except Exception as error:
        told = error
        if not isinstance(error, (FewShotError, click.ClickException)):
            told = describe_unforeseen(error, None)
        place.let_others_speak()
        return _tell(told, place.label)


def _tell(error: Exception, label: str) -> int:
    """Tell an error in a line, and return the exit status for it."""
    if isinstance(error, FewShotError):
        text = with_options(error.notice)
    else:
        text = error.format_message() if isinstance(error, click.ClickException) else str(error)
        text = printable(" ".join(text.split()))
    _say(f"{PROGRAM}{label}: error: {text}")
    return UNFORESEEN if isinstance(error, UnforeseenError) else BAD_INPUT


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
