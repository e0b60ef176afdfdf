"""The kinds of options that the commands take, and the options that several of them share."""

from __future__ import annotations

import dataclasses
import errno
import inspect
import os
import re
import typing
from collections.abc import Callable
from typing import Any

import click

from tir_kernels.fewshot.settings import PLACEMENTS, PRECISIONS, FewShotConfig
from tir_kernels.operators.choose import BACKENDS
from tir_kernels.rules import RULE_KINDS
from tir_kernels.text import Notice, printable


def option_name(name: str) -> str:
    """The option of a setting: ``--class-names`` of ``class_names``."""
    return f"--{name.replace('_', '-')}"


def with_options(text: str) -> str:
    """A line for the user, with options where it names settings."""
    if isinstance(text, Notice):
        return text.spelled(option_name, " ")
    return printable(text)


class Count(click.IntRange):
    """A whole number with an upper bound, which is told with its reason."""

    def __init__(self, least: int, most: int, reason: str) -> None:
        super().__init__(least)
        self._most, self._reason = most, reason

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        number = super().convert(value, param, ctx)
        if number > self._most:
            self.fail(f"{number} is more than {self._most}: {self._reason}", param, ctx)
        return number


class _Parallel(Count):
    """A number of episodes, or "auto"."""

    name = "integer|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if value == "auto" else super().convert(value, param, ctx)


class Name(click.ParamType):
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


NAME = Name()


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


def config_options(**defaults: Any) -> Callable[[Callable], Callable]:
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
                option_name(field.name),
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
    """The text on each field in a docstring's "Args"."""
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


def protocol_options(*, episodes: int) -> Callable[[Callable], Callable]:
    """Options that ``run`` and ``demo`` share beside those of the config."""
    options = (
        click.option("--ways", type=click.IntRange(2), default=5, help="Classes per episode."),
        click.option(
            "--queries", type=click.IntRange(1), default=15, help="Query images per class."
        ),
        click.option(
            "--episodes",
            type=Count(1, 10**6, "the interval of a mean does not get narrower in any sense"),
            default=episodes,
            help="Episodes; a run may be continued with more.",
        ),
        click.option(
            "--augment",
            type=Count(0, 1000, "so many views of one image are the same views again"),
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
