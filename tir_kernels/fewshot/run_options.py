"""The options of a run, as a command line or a program gives them."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.settings import FewShotConfig
from tir_kernels.text import setting


@dataclass(frozen=True)
class Inputs:
    """The data and the model of a run, as the user names them.

    Args:
        data: Data, see ``load_data``.
        model: Model, see ``load_model``.
        images: Folder of the images that a list names.
        class_names: Words of the classes, see ``class_words``.
        pretrained: Weights, see ``load_model``.
    """

    data: str
    model: str
    images: str | None = None
    class_names: str | None = None
    pretrained: str | None = None


@dataclass(frozen=True)
class Reading:
    """The way in which images are read.

    Args:
        cache: Folder of the cache of decoded images; ``None``: the default one.
        no_cache: Whether to do without.
        max_pixels, white_value: As for ``Decoding``.
        skip_unreadable: Whether others replace images that can't be read.
    """

    cache: str | None = None
    no_cache: bool = False
    max_pixels: int | None = None
    white_value: float | None = None
    skip_unreadable: bool = False


@dataclass(frozen=True)
class RunOptions:
    """The folder of a run, what it compares on how many episodes, and how much is trained at once.

    Args:
        out: Folder of the run.
        methods: Methods to compare.
        ways: Classes per episode.
        queries: Query images per class.
        episodes: Number of episodes.
        augment: Augmented views of each support image.
        parallel_episodes: Most episodes trained at once, or "auto" for what fits into memory.
        checkpoint: Whether activations are computed again in the backward pass.
    """

    out: str
    methods: tuple[str, ...]
    ways: int
    queries: int
    episodes: int
    augment: int = 0
    parallel_episodes: int | Literal["auto"] = 1
    checkpoint: bool = False


@contextlib.contextmanager
def settings_named() -> Iterator[None]:
    """Turn errors of arguments that name a setting first into those of that setting."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError) as error:
        raise FewShotError(_setting_first(str(error))) from error


def _setting_first(message: str) -> str:
    match = re.match(r"(\w+)([ =])", message)
    kinds = (FewShotConfig, Inputs, Reading, RunOptions)
    known = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    if match is None or match[1] not in known:
        return message
    rest = message[match.end() :]
    return setting(match[1], rest) if match[2] == "=" else f"{setting(match[1])} {rest}"
