"""The choices of a run: fields with their help, of which the command line makes options."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import click
import torch

import tir_kernels

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
DIRECTIONS = ("forward", "backward", "forward+backward")

# The order in which they are shown. Triton's interpreter would run on a CPU too, but its time says
# nothing.
BACKENDS_OF_DEVICE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
OURS = "tir "  # in front of a backend's name
PUBLISHED = "published "  # the method's published program, in front of the type it runs in
READABLE = f"{OURS}reference"  # is there to be read: no target is for it

# Names of what is measured, in front of what else is said of it.
STEP = "fine-tuning step"
HOST_TIME = "host time"
WHOLE_RUN = "whole run"
START_UP = "start-up to the first step"


class CommaSeparated(click.ParamType):
    """A list such as 50,197, each item of it of another type."""

    name = "list"

    def __init__(self, item: click.ParamType) -> None:
        self.item = item

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return "A,B,..."

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple:
        if isinstance(value, tuple):
            return value
        return tuple(self.item.convert(item.strip(), param, ctx) for item in value.split(","))


def _option(default: Any, kind: Any, text: str, **rest: Any) -> Any:
    """A field with its option: the type, the help, and what else ``click.option`` takes."""
    return field(default=default, metadata={"type": kind, "help": text, **rest})


def _some_of(*choices: str) -> CommaSeparated:
    return CommaSeparated(click.Choice(choices))


_COUNT = click.IntRange(1)
_NUMBERS = CommaSeparated(_COUNT)


@dataclass(frozen=True)
class Settings:
    """One run of the program; ``None`` in a filter means the suite's own choice."""

    device: str = _option("cpu", click.Choice(["cpu", "cuda"]), "Default: cuda if there is one.")
    quick: bool = _option(False, bool, "Few shapes and little time: a minute per suite.")
    threads: int = _option(1, _COUNT, "CPU threads. Default: all cores.")
    seconds: float = _option(
        1.0,
        click.FloatRange(0),
        "Measuring time per row, that is per implementation at one shape.",
    )
    lengths: tuple[int, ...] | None = _option(None, _NUMBERS, "Token counts L.")
    widths: tuple[int, ...] | None = _option(None, _NUMBERS, "Head widths d.")
    heads: tuple[int, ...] | None = _option(
        None, _NUMBERS, "Products B·H; 60 is 5 images of 12 heads."
    )
    classes: tuple[int, ...] | None = _option(None, _NUMBERS, "Class counts C.")
    dtypes: tuple[str, ...] | None = _option(
        None, CommaSeparated(click.Choice(list(DTYPES))), ", ".join(DTYPES)
    )
    directions: tuple[str, ...] | None = _option(None, _some_of(*DIRECTIONS), ", ".join(DIRECTIONS))
    backends: tuple[str, ...] | None = _option(
        None,
        _some_of("cpu", "cuda", "triton", "reference"),
        "Ours to measure. Default: all that serve the device.",
    )
    compiles: bool = _option(
        True,
        bool,
        "Whether peers take part that need torch.compile.",
        name="--compile/--no-compile",
    )
    max_call_seconds: float = _option(
        5.0,
        click.FloatRange(0, min_open=True),
        "Leave out shapes of which one call is estimated to take longer (cpu).",
    )
    model: str | None = _option(
        None,
        str,
        "Of step, savings, memory and episodes: an open_clip architecture or a JSON file with a "
        "model_cfg, either of which gets random weights, or a folder with open_clip_config.json "
        "and weights. Default: ViT-B-16, but in episodes the demonstration's model.",
        metavar="ARCH_OR_DIR",
    )
    data: str | None = _option(
        None,
        str,
        "Of episodes: a folder with a folder of images per class, and class_names.json if the "
        "folders' names are no words, or a list of images. Default: drawings.",
        metavar="PATH",
    )
    ways: int = _option(5, click.IntRange(2), "Classes.")
    shots: tuple[int, ...] | None = _option(
        None, _NUMBERS, "Support images per class, each number measured by itself."
    )
    queries: int = _option(15, _COUNT, "Query images per class.")
    episodes: int | None = _option(None, _COUNT, "Episodes of a whole run.")
    published_episodes: int | None = _option(
        None,
        _COUNT,
        "How many of them the published program runs. Default: all, on cuda at most 2.",
    )
    steps: int | None = _option(None, _COUNT, "Training steps of an episode.")
    parallel_episodes: tuple[int, ...] | None = _option(
        None,
        _NUMBERS,
        "Episodes trained at once. Default: 1,2,4 in step; in episodes 1, and on cuda 8 too.",
    )

    @property
    def why_not_compiled(self) -> str:
        return "" if self.compiles else "left out by --no-compile"

    def our_backends(self) -> list[tuple[str, str]]:
        """(name, "" or why it does not run here) of the backends that take part."""
        reasons = tir_kernels.available_backends()
        names = self.backends or BACKENDS_OF_DEVICE[self.device]
        return [(name, reasons[name]) for name in names]

    def wants(self, direction: str) -> bool:
        return self.directions is None or direction in self.directions
