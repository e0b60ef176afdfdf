"""The command line, ``tir-finetune``."""

# Whoever only asks for help should not wait: what is slow to import is imported where it is used.
from __future__ import annotations

import contextlib
import dataclasses
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import click

from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.data.words import KNOWN_SETS
from tir_kernels.fewshot.interrupts import INTERRUPTED, PROGRAM, leaving_at_once, terminable
from tir_kernels.fewshot.options import NAME, Count, config_options, protocol_options
from tir_kernels.fewshot.run.workers import Place
from tir_kernels.fewshot.settings import METHODS, FewShotConfig
from tir_kernels.fewshot.streams import forgiving_output
from tir_kernels.fewshot.unforeseen import UnforeseenError, describe_unforeseen
from tir_kernels.text import printable

if TYPE_CHECKING:
    from tir_kernels.fewshot.run.records import Record
    from tir_kernels.fewshot.run.summary import Summary
    from tir_kernels.towers.loading.models import LoadedModel

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
@click.option(
    "--data",
    type=NAME,
    required=True,
    metavar="SOURCE",
    help="Folder with a sub-folder of images per class; a list of images: JSON with image_names, "
    "image_labels and label_names, or CSV or TSV with columns for file and label, or with a column "
    "of 0 and 1 per class; or hf:NAME[:SPLIT] from Hugging Face, or a folder of its save_to_disk.",
)
@click.option(
    "--images",
    type=NAME,
    metavar="DIR",
    help="Folder of the images that a list names, also deep in it; by default the list's own.",
)
@click.option(
    "--model",
    type=NAME,
    required=True,
    metavar="ARCH_OR_DIR",
    help="An open_clip architecture, or a folder with open_clip_config.json and weights.",
)
@click.option(
    "--pretrained",
    type=NAME,
    metavar="TAG_OR_FILE",
    help="Weights of the architecture: a tag of open_clip, or a checkpoint file.",
)
@click.option(
    "--out",
    type=NAME,
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
    type=NAME,
    metavar="FILE_OR_SET",
    help=f"JSON or CSV file: class -> words, or the names of a data set: {', '.join(KNOWN_SETS)}. "
    "Without it, the words are those of such a set if it has all classes, or else come from the "
    "names of folders or labels.",
)
@click.option(
    "--cache",
    type=NAME,
    metavar="DIR",
    help="Folder in which images are kept, decoded and resized, once they were needed; by default "
    "tir_kernels/images in $XDG_CACHE_HOME or ~/.cache. Each user has a sub-folder of their own in "
    "it, which any number of runs may share, and which may be deleted at any time. Without room in "
    "it, the run goes on without.",
)
@click.option("--no-cache", is_flag=True, help="Decode images in each run, and keep none.")
@click.option(
    "--max-pixels",
    type=Count(1, 2**40, "no machine decodes such an image"),
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
@protocol_options(episodes=20)
@config_options()
def run(**options: Any) -> None:
    """Fine-tune and score methods on few-shot episodes drawn from classes of images."""
    with _without_tracebacks(options["out"]):
        _run(**options)


@cli.command()
@click.option("--out", type=NAME, default="runs/demo", metavar="RUN_DIR", help="Folder of the run.")
@protocol_options(episodes=6)
@config_options(steps=40, lora_lr=1e-3)  # a small model learns little at the method's rate
def demo(out: str, **options: Any) -> None:
    """Compare zero-shot, LoRA and re-weighting on an embedded model and a drawn image domain.

    Needs no network and no data: the images are drawn into the run's folder.
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

        from tir_kernels.fewshot.data.cache import open_cache
        from tir_kernels.fewshot.data.dataset import load_data
        from tir_kernels.fewshot.data.decoding import Decoding
        from tir_kernels.fewshot.data.reader import ImageReader
        from tir_kernels.fewshot.devices import is_slow_at, resolve_device
        from tir_kernels.fewshot.run.folder import (
            SUMMARY_NAME,
            RunFolder,
            finished_records,
            is_read_only,
            read_run,
            write_json,
        )
        from tir_kernels.fewshot.run.progress import RunDisplay
        from tir_kernels.fewshot.run.runner import RunPlan, require_distinct_prompts, run_episodes
        from tir_kernels.towers.loading.models import load_model

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

    from tir_kernels.fewshot.run.summary import print_summary, summarise

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
        from tir_kernels.fewshot.run.folder import expanded_out
        from tir_kernels.fewshot.train.memory import is_lack_of_memory

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

    from tir_kernels.operators.choose import refusal

    error = refusal(config.backend, torch.device(config.device))
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
