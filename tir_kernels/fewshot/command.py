"""The command line, ``tir-finetune``."""

# Whoever only asks for help should not wait: what is slow to import is imported where it is used.
from __future__ import annotations

import contextlib
import dataclasses
import errno
import inspect
import os
import re
import shlex
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import click

from tir_kernels.dispatch import BACKENDS
from tir_kernels.fewshot.config import METHODS, PLACEMENTS, PRECISIONS, FewShotConfig
from tir_kernels.fewshot.errors import FewShotError
from tir_kernels.fewshot.interrupts import INTERRUPTED, PROGRAM, leaving_at_once, terminable
from tir_kernels.fewshot.streams import forgiving_output
from tir_kernels.fewshot.text import printable
from tir_kernels.fewshot.unforeseen import UnforeseenError, describe_unforeseen
from tir_kernels.fewshot.words import KNOWN_SETS
from tir_kernels.fewshot.workers import Place
from tir_kernels.rules import RULE_KINDS

if TYPE_CHECKING:
    from tir_kernels.fewshot.models import LoadedModel
    from tir_kernels.fewshot.records import Record
    from tir_kernels.fewshot.report import Summary

BAD_INPUT = 2
UNFORESEEN = 1


class _Count(click.IntRange):
    """A whole number with an upper bound, which is told with its reason."""

    def __init__(self, least: int, most: int, reason: str) -> None:
        super().__init__(least)
        self._most, self._reason = most, reason

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        number = super().convert(value, param, ctx)
        if number > self._most:
            self.fail(f"{number} is more than {self._most}: {self._reason}", param, ctx)
        return number


class _Parallel(_Count):
    """A number of episodes, or "auto"."""

    name = "integer|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if value == "auto" else super().convert(value, param, ctx)


class _Name(click.ParamType):
    """The name of a file, a folder or something else, which can't be empty.

    An empty one is what a shell makes of a variable that is not set, and would otherwise stand for
    the current folder.
    """

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not value.strip():
            self.fail("it is empty; is a shell variable not set?", param, ctx)
        if "\0" in value:
            self.fail("a name can't hold a NUL byte", param, ctx)
        try:
            os.stat(value)
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                self.fail(f"a name of {len(value)} characters is too long for files", param, ctx)
        return value


_NAME = _Name()


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


_CHOICES = {
    "placement": PLACEMENTS,
    "precision": PRECISIONS,
    "rule": RULE_KINDS,
    "backend": ("auto", *BACKENDS),
}


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
            # A library's caller says where the model is; a command takes the GPU that is there.
            defaults.setdefault("device", "auto")
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
    texts["device"] = (
        "Device of the model and all tensors: cpu, cuda, cuda:1, ...; auto is cuda where PyTorch "
        "sees a GPU, else cpu."
    )
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
            type=_Count(1, 10**6, "the interval of a mean does not get narrower in any sense"),
            default=episodes,
            help="Episodes; a run may be continued with more.",
        ),
        click.option(
            "--augment",
            type=_Count(0, 1000, "so many views of one image are the same views again"),
            default=0,
            help="Train on this many views of each support image beside the image itself; 0 for "
            "none. The cross-domain few-shot benchmark takes 4. A view is a part of the image of "
            "8 to 100 % of its area and a ratio of sides of 3/4 to 4/3, scaled up to the model's "
            "size, flipped half of the time, with brightness, contrast and saturation times a "
            "random number from 0.6 to 1.4. Views are drawn once per episode, from --seed and its "
            "number alone.",
        ),
        click.option(
            "--parallel-episodes",
            type=_Parallel(1, 4096, "no device's memory holds so many"),
            default=1,
            help="Episodes trained at once, which a GPU needs to be busy: a number, or auto for as "
            "many as fit into memory. The results are the same up to rounding. Where memory runs "
            "out, half as many are.",
        ),
        click.option(
            "--checkpoint",
            is_flag=True,
            help="Compute activations again in the backward pass instead of keeping them: a third "
            "more work in a fraction of the memory.",
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
    "--data",
    type=_NAME,
    required=True,
    metavar="SOURCE",
    help="Folder with a sub-folder of images per class; a list of images: JSON with image_names, "
    "image_labels and label_names, or CSV or TSV with columns for file and label, or with a column "
    "of 0 and 1 per class; or hf:NAME[:SPLIT] from Hugging Face, or a folder of its save_to_disk.",
)
@click.option(
    "--images",
    type=_NAME,
    metavar="DIR",
    help="Folder of the images that a list names, also deep in it; by default the list's own.",
)
@click.option(
    "--model",
    type=_NAME,
    required=True,
    metavar="ARCH_OR_DIR",
    help="An open_clip architecture, or a folder with open_clip_config.json and weights.",
)
@click.option(
    "--pretrained",
    type=_NAME,
    metavar="TAG_OR_FILE",
    help="Weights of the architecture: a tag of open_clip, or a checkpoint file.",
)
@click.option(
    "--out",
    type=_NAME,
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
    type=_NAME,
    metavar="FILE_OR_SET",
    help=f"JSON or CSV file: class -> words, or the names of a data set: {', '.join(KNOWN_SETS)}. "
    "Without it, the words are those of such a set if it has all classes, or else come from the "
    "names of folders or labels.",
)
@click.option(
    "--cache",
    type=_NAME,
    metavar="DIR",
    help="Folder in which images are kept, decoded and resized, once they were needed; by default "
    "tir_kernels/images in $XDG_CACHE_HOME or ~/.cache. Each user has a sub-folder of their own in "
    "it, which any number of runs may share, and which may be deleted at any time. Without room in "
    "it, the run goes on without.",
)
@click.option("--no-cache", is_flag=True, help="Decode images in each run, and keep none.")
@click.option(
    "--max-pixels",
    type=_Count(1, 2**40, "no machine decodes such an image"),
    help="Largest image that is decoded, in pixels; by default Pillow's limit against "
    "decompression bombs, about 179 million.",
)
@click.option(
    "--white-value",
    type=float,
    help="The value that is white in grey images of more than 8 bits, such as 4095 for 12 bits in "
    "files of 16; 0 is black. By default the type's largest, and 1 for floating-point values.",
)
@click.option(
    "--skip-unreadable",
    is_flag=True,
    help="Replace images that can't be read by others of their class, and list them at the end.",
)
@_protocol_options(episodes=20)
@_config_options()
def run(**options: Any) -> None:
    """Fine-tune and score methods on few-shot episodes drawn from classes of images."""
    with _without_tracebacks(options["out"]):
        _run(**options)


@cli.command()
@click.option(
    "--out", type=_NAME, default="runs/demo", metavar="RUN_DIR", help="Folder of the run."
)
@_protocol_options(episodes=6)
@_config_options(steps=40, lora_lr=1e-3)  # a small model learns little at the method's rate
def demo(out: str, **options: Any) -> None:
    """Compare zero-shot, LoRA and re-weighting on an embedded model and a drawn image domain.

    Needs no network and no data: the images are drawn into the run's folder.
    """
    with _without_tracebacks(out):
        _demo(out, options)


def _demo(out: str, options: dict[str, Any]) -> None:
    from tir_kernels.demo import model_directory, write_image_folder
    from tir_kernels.fewshot.errors import first_line
    from tir_kernels.fewshot.run_folder import expanded_out

    images = expanded_out(out) / "images"
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
        images=None,
        cache=None,
        no_cache=True,
        max_pixels=None,
        white_value=None,
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
    images: str | None,
    cache: str | None,
    no_cache: bool,
    max_pixels: int | None,
    white_value: float | None,
    skip_unreadable: bool,
    ways: int,
    queries: int,
    episodes: int,
    augment: int,
    parallel_episodes: int | Literal["auto"],
    checkpoint: bool,
    **config_values: Any,
) -> None:
    from rich.console import Console

    place = Place.of_this_process()
    messages = Console(stderr=True, quiet=not place.is_first)

    def notify(text: str) -> None:
        messages.print(printable(text), soft_wrap=True, highlight=False, markup=False, emoji=False)

    try:
        config = FewShotConfig(**config_values)
    except (ValueError, TypeError) as error:
        raise FewShotError(_with_option_name(str(error))) from error
    with leaving_at_once(), messages.status("loading libraries"):
        import torch

        from tir_kernels.fewshot.data import load_data
        from tir_kernels.fewshot.decoding import Decoding
        from tir_kernels.fewshot.devices import is_slow_at, resolve_device
        from tir_kernels.fewshot.image_cache import open_cache
        from tir_kernels.fewshot.images import ImageReader
        from tir_kernels.fewshot.models import load_model
        from tir_kernels.fewshot.progress import RunDisplay
        from tir_kernels.fewshot.run_folder import (
            SUMMARY_NAME,
            RunFolder,
            finished_records,
            is_read_only,
            read_run,
            write_json,
        )
        from tir_kernels.fewshot.runner import RunPlan, require_distinct_prompts, run_episodes

    if config.precision == "float16" and parallel_episodes not in ("auto", 1):
        raise FewShotError(
            f"--parallel-episodes {parallel_episodes} does not go with --precision float16, whose "
            "loss scale episodes can't share; leave it out, or use --precision bfloat16"
        )
    device, note = resolve_device(config.device)
    if note:
        notify(note)
    config = dataclasses.replace(config, device=device)
    try:
        decoding = Decoding(max_pixels, white_value)
    except ValueError as error:
        raise FewShotError(f"--{str(error).replace('_', '-', 1)}") from error
    _require_backend(config)
    # A method named twice is still one method.
    names = tuple(dict.fromkeys(methods))
    own = dataclasses.replace(config, device=place.own_device(config.device))
    plan = RunPlan(ways, queries, episodes, names, own, parallel_episodes, augment, checkpoint)
    with messages.status("listing the images"):
        source = load_data(data, class_names=class_names, images=images)
    for note in source.notes:
        notify(note)
    source.require(ways=ways, shots=config.shots, queries=queries)

    def load() -> tuple[LoadedModel, dict[str, Any]]:
        """The model, and all settings of the run."""
        with messages.status("loading the model"):
            loaded = load_model(model, pretrained, device=own.device)
        for note in loaded.notes:
            notify(note)
        require_distinct_prompts(source, loaded.tokenizer)
        # Another number of processes, on other devices, may continue the run.
        settings = plan.settings(source, loaded) | {"device": config.device}
        if white_value is not None:
            settings["white_value"] = white_value
        return loaded, settings

    if is_read_only(out):
        _, settings = load()
        _show(finished_records(out, settings, episodes), plan.methods, place)
        return
    with RunFolder(out, place) as folder:
        loaded, settings = load()
        if is_slow_at(config.precision, own.device):
            notify(
                f"this processor has no instructions for products of {config.precision} numbers: "
                "--precision float32 would be faster"
            )
        if own.device != config.device:
            # For what takes the current device unasked, as the capture of CUDA graphs does.
            torch.cuda.set_device(own.device)
        about = {"data": source.name, "model": loaded.description, **_versions()}
        folder.claim(settings, episodes, about)
        with folder.journal() as journal:
            if journal.note:
                notify(journal.note)
            display = RunDisplay(
                messages,
                episodes=episodes,
                methods=plan.methods,
                steps=config.steps,
                finished=journal.records,
            )
            kept = None
            if not no_cache:
                kept = open_cache(cache, loaded.preprocess.shape, notify=notify)
            reader = ImageReader(
                source,
                loaded.preprocess,
                cache=kept,
                skip_unreadable=skip_unreadable,
                decoding=decoding,
                notify=notify,
            )
            with display:
                for record in run_episodes(
                    plan, source, reader, loaded, folder, journal, on_step=display.step
                ):
                    display.finished(record)
        if journal.repeats:
            notify(
                f"{journal.repeats} results were in the journals more than once and count once: "
                f"locks in {folder.path} may not reach all machines"
            )

        def keep(summary: Summary) -> None:
            write_json(folder.path / SUMMARY_NAME, summary.to_json())

        _show(read_run(folder.path), plan.methods, place, keep)


def _show(
    records: Sequence[Record],
    methods: Sequence[str],
    place: Place,
    keep: Callable[[Summary], None] = lambda summary: None,
) -> None:
    """Print a finished run's tables, once the summary is kept."""
    if not place.is_first:
        return
    # Here, since it brings SciPy, which no training needs to wait for.
    from rich.console import Console

    from tir_kernels.fewshot.report import print_summary, summarise

    summary = summarise(records, methods)
    keep(summary)
    print_summary(summary, Console())
    if summary.failures:
        raise FewShotError(
            f"{summary.failures}; the other episodes are finished and the means leave these out: "
            "lower --lora-lr or --context-lr, or use --precision float32, with another --out"
        )


@contextlib.contextmanager
def _without_tracebacks(out: str) -> Iterator[None]:
    """Turn what nobody foresaw into a sentence, and a file in the run's folder."""
    try:
        yield
    except (FewShotError, click.ClickException, click.Abort):
        raise
    except Exception as error:
        from tir_kernels.fewshot.memory import is_lack_of_memory
        from tir_kernels.fewshot.run_folder import expanded_out

        if is_lack_of_memory(error):
            raise FewShotError(
                "out of memory; what is finished is kept: use a smaller model, a machine with more "
                "memory, or end other programs, and give the same command again"
            ) from error
        raise describe_unforeseen(error, expanded_out(out)) from error


def _require_backend(config: FewShotConfig) -> None:
    if config.backend == "auto":
        return
    import torch

    from tir_kernels.dispatch import refusal

    error = refusal(config.backend, torch.device(config.device), False)
    if error is not None:
        raise FewShotError(f"--{str(error).replace('=', ' ', 1)}")


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
    text = error.format_message() if isinstance(error, click.ClickException) else str(error)
    _say(f"{PROGRAM}{label}: error: {printable(' '.join(text.split()))}")
    return UNFORESEEN if isinstance(error, UnforeseenError) else BAD_INPUT


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
