"""The command line, ``tir-finetune``."""

# Whoever only asks for help should not wait: what is slow to import is imported where it is used.
from __future__ import annotations

import contextlib
import dataclasses
import inspect
import re
import shlex
import signal
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from tir_kernels.fewshot.config import METHODS, PLACEMENTS, PRECISIONS, FewShotConfig
from tir_kernels.fewshot.errors import FewShotError

PROGRAM = "tir-finetune"
BAD_INPUT = 2
INTERRUPTED = 130


class _WholeNumbers(click.ParamType):
    """A comma list of whole numbers."""

    name = "list"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(int(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of whole numbers such as 8,10", param, ctx)


_CHOICES = {"placement": PLACEMENTS, "precision": PRECISIONS}


def _config_options(**defaults: Any) -> Callable[[Callable], Callable]:
    """An option for each field of ``FewShotConfig`` but the method, so that none is forgotten.

    Args:
        defaults: Defaults that differ from the fields' own.
    """
    hints = typing.get_type_hints(FewShotConfig)
    help_texts = _field_texts(inspect.getdoc(FewShotConfig) or "")

    def add(command: Callable) -> Callable:
        for field in reversed(dataclasses.fields(FewShotConfig)):
            if field.name == "method":
                continue
            default = defaults.get(field.name, field.default)
            command = click.option(
                f"--{field.name.replace('_', '-')}",
                type=_option_type(field.name, hints[field.name]),
                default=default,
                show_default=default is not None,
                help=help_texts.get(field.name, ""),
            )(command)
        return command

    return add


def _option_type(name: str, hint: Any) -> Any:
    if name in _CHOICES:
        return click.Choice(_CHOICES[name])
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    if typing.get_origin(hint) is not tuple and kinds:
        (hint,) = kinds
    return _WholeNumbers() if typing.get_origin(hint) is tuple else hint


def _field_texts(docstring: str) -> dict[str, str]:
    """What a docstring's "Args" say about each field."""
    section = docstring.partition("Args:\n")[2].partition("\n\n")[0]
    texts: dict[str, str] = {}
    for entry in re.split(r"^ {4}(?=\w+:)", section, flags=re.MULTILINE):
        name, _, text = entry.partition(":")
        # reStructuredText's quotes are for readers of the source, None for those of Python.
        texts[name] = " ".join(text.replace("``", "").replace("None", "unset").split())
    texts["seed"] = "Of the choice of episodes, and of LoRA's initialisation and dropout."
    return texts


def _protocol_options(*, episodes: int) -> Callable[[Callable], Callable]:
    """Options that ``run`` and ``demo`` share beside those of the config."""
    options = (
        click.option("--ways", type=click.IntRange(2), default=5, help="Classes per episode."),
        click.option(
            "--queries", type=click.IntRange(1), default=15, help="Query images per class."
        ),
        click.option(
            "--episodes",
            type=click.IntRange(1),
            default=episodes,
            help="Episodes; a run may be continued with more.",
        ),
        click.option(
            "--parallel-episodes",
            type=click.IntRange(1),
            default=1,
            help="Episodes trained at once, which a GPU needs to be busy; the results are the "
            "same. Where memory runs out, half as many are.",
        ),
    )

    def add(command: Callable) -> Callable:
        for option in reversed(options):
            command = option(command)
        return command

    return add


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
@click.option(
    "--data", required=True, metavar="DIR", help="Folder with a sub-folder of images per class."
)
@click.option(
    "--model",
    required=True,
    metavar="ARCH_OR_DIR",
    help="An open_clip architecture, or a folder with open_clip_config.json and weights.",
)
@click.option(
    "--pretrained",
    metavar="TAG_OR_FILE",
    help="Weights of the architecture: a tag of open_clip, or a checkpoint file.",
)
@click.option(
    "--out",
    required=True,
    metavar="RUN_DIR",
    help="Folder of the run. The same command continues a run that was stopped.",
)
@click.option(
    "--method",
    "methods",
    type=click.Choice(METHODS),
    multiple=True,
    default=("tir", "lora"),
    help="Method; give it several times to compare methods on the same episodes.",
)
@click.option(
    "--class-names",
    metavar="FILE",
    help="JSON or CSV file: folder name -> words. Without it, the words come from the folder name.",
)
@click.option(
    "--skip-unreadable",
    is_flag=True,
    help="Replace images that can't be read by others of their class, and list them at the end.",
)
@_protocol_options(episodes=20)
@_config_options()
def run(**options: Any) -> None:
    """Fine-tune and score methods on few-shot episodes drawn from a folder of images."""
    _run(**options)


@cli.command()
@click.option("--out", default="runs/demo", metavar="RUN_DIR", help="Folder of the run.")
@_protocol_options(episodes=6)
@_config_options(steps=40, lora_lr=1e-3)  # a small model learns little at the method's rate
def demo(out: str, **options: Any) -> None:
    """Compare zero-shot, LoRA and re-weighting on an embedded model and a drawn image domain.

    Needs no network and no data: the images are drawn into the run's folder.
    """
    from tir_kernels.demo import model_directory, write_image_folder
    from tir_kernels.fewshot.errors import first_line

    images = Path(out) / "images"
    try:
        write_image_folder(images)
    except OSError as error:
        raise FewShotError(f"--out: can't write images to {images}: {first_line(error)}") from error
    _run(
        data=str(images),
        model=str(model_directory()),
        pretrained=None,
        out=out,
        methods=("tir", "lora", "zero-shot"),
        class_names=str(images / "class_names.json"),
        skip_unreadable=False,
        **options,
    )


def _run(
    *,
    data: str,
    model: str,
    pretrained: str | None,
    out: str,
    methods: Sequence[str],
    class_names: str | None,
    skip_unreadable: bool,
    ways: int,
    queries: int,
    episodes: int,
    parallel_episodes: int,
    **config_values: Any,
) -> None:
    from rich.console import Console

    messages = Console(stderr=True)
    try:
        config = FewShotConfig(**config_values)
    except (ValueError, TypeError) as error:
        raise FewShotError(_with_option_name(str(error))) from error
    with messages.status("loading libraries"):
        from tir_kernels.fewshot.data import ImageFolderData, ImageReader
        from tir_kernels.fewshot.journal import SUMMARY_NAME, RunFolder, write_json
        from tir_kernels.fewshot.models import load_model
        from tir_kernels.fewshot.progress import RunDisplay
        from tir_kernels.fewshot.report import print_summary, summarise
        from tir_kernels.fewshot.runner import RunPlan, run_episodes

    # A method named twice is still one method.
    names = tuple(dict.fromkeys(methods))
    plan = RunPlan(ways, queries, episodes, names, config, parallel_episodes)
    source = ImageFolderData.scan(data, class_names)
    source.require(ways=ways, shots=config.shots, queries=queries)
    with RunFolder(out) as folder:
        with messages.status("loading the model"):
            loaded = load_model(model, pretrained, device=config.device)
        about = {"data": str(source.root), "model": loaded.description, **_versions()}
        folder.claim(plan.settings(source, loaded), episodes, about)
        with folder.journal() as journal:
            if journal.note:
                messages.print(journal.note, soft_wrap=True, highlight=False)
            images = ImageReader(source.root, loaded.preprocess, skip_unreadable=skip_unreadable)
            display = RunDisplay(
                messages,
                episodes=episodes,
                methods=plan.methods,
                steps=config.steps,
                finished=journal.records,
            )
            with display:
                for record in run_episodes(
                    plan, source, images, loaded, journal, on_step=display.step
                ):
                    display.finished(record)
            records = journal.records
        summary = summarise(records, plan.methods)
        write_json(folder.path / SUMMARY_NAME, summary.to_json())
    print_summary(summary, Console())
    if summary.failures:
        raise FewShotError(
            f"{summary.failures}; the other episodes are finished and the means leave these out: "
            "lower --lora-lr or --context-lr, or use --precision float32, with another --out"
        )


def _with_option_name(message: str) -> str:
    """A message that starts with a field's name, with its option's name instead."""
    name, space, rest = message.partition(" ")
    if name in {field.name for field in dataclasses.fields(FewShotConfig)}:
        return f"--{name.replace('_', '-')}{space}{rest}"
    return message


def _versions() -> dict[str, str]:
    import open_clip
    import torch

    import tir_kernels

    return {
        "tir_kernels": tir_kernels.__version__,
        "torch": torch.__version__,
        "open_clip": open_clip.__version__,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: Instead of those of the process.

    Returns:
        The exit status: 0, 2 after bad input, 130 after Ctrl-C or SIGTERM.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with _terminable():
            # Without a command, help is an answer and not an error.
            status = cli.main(words or ["--help"], prog_name=PROGRAM, standalone_mode=False)
        return status if isinstance(status, int) else 0
    except (FewShotError, click.ClickException) as error:
        text = error.format_message() if isinstance(error, click.ClickException) else str(error)
        print(f"{PROGRAM}: error: {' '.join(text.split())}", file=sys.stderr)
        return BAD_INPUT
    except (KeyboardInterrupt, click.Abort):
        print(
            f"{PROGRAM}: interrupted; what is finished is kept. "
            f"To continue: {PROGRAM} {shlex.join(words)}",
            file=sys.stderr,
        )
        return INTERRUPTED


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Treat SIGTERM, which batch systems send, like Ctrl-C."""

    def interrupt(number: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
