"""The options of a run, as a command line or a program gives them."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass

from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.methods import METHODS, method_class
from tir_kernels.fewshot.settings import Arm, FitSettings, Protocol, Runtime
from tir_kernels.fewshot.track.settings import Tracking
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
        train, test: Data that support and queries come from; ``data`` then is "".
        group_column: Column of the subjects that images show, see ``load_data``.

    Raises:
        FewShotError: No data is named, or in both ways.
    """

    data: str
    model: str
    images: str | None = None
    class_names: str | None = None
    pretrained: str | None = None
    group_column: str | None = None
    train: str | None = None
    test: str | None = None

    def __post_init__(self) -> None:
        parts = [self.train, self.test]
        if parts == [None, None] and not self.data:
            raise FewShotError(
                f"{setting('data')} is missing; pass it, or {setting('train')} and "
                f"{setting('test')}"
            )
        if parts != [None, None] and (self.data or None in parts):
            raise FewShotError(
                f"{setting('train')} and {setting('test')} go together, in place of "
                f"{setting('data')}"
            )


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
    """The options of a run besides its data, model, protocol and runtime.

    Args:
        out: Folder of the run.
        episodes: Number of episodes.
        arms: Arms to compare on the same episodes.
        track: What is read of each training; ``None``: nothing.
    """

    out: str
    episodes: int
    arms: tuple[Arm, ...]
    track: Tracking | None = None


@contextlib.contextmanager
def settings_named() -> Iterator[None]:
    """Turn errors of arguments that name a setting first into those of that setting."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError) as error:
        raise FewShotError(setting_first(str(error))) from error


def setting_first(message: str) -> str:
    """A message with the setting marked that it begins with, if it does."""
    match = re.match(r"(\w+)([ =:])", message)
    methods = map(method_class, METHODS)
    kinds = (Protocol, FitSettings, Runtime, Inputs, Reading, RunOptions, *methods)
    known = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    known |= {"arm", "method"}
    if match is None or match[1] not in known:
        return message
    rest = message[match.end() :]
    if match[2] == "=":
        return setting(match[1], rest)
    return f"{setting(match[1])}{match[2]}{rest}"
