"""The kinds of values that options of the commands take."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Collection
from typing import Any

import click


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


class NumberOr(click.ParamType):
    """A whole number, or a word in its place."""

    def __init__(self, word: str) -> None:
        self.name = f"integer|{word}"
        self._word = word

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return f"INTEGER|{self._word}"  # by itself, click would show the word in capitals

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == self._word or isinstance(value, int):
            return value
        try:
            return int(value)
        except ValueError:
            self.fail(f"{value!r} is neither a whole number nor {self._word}", param, ctx)


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


class WholeNumbers(click.ParamType):
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


class Choice(click.ParamType):
    """One of the names in a registry, as it is when the command runs."""

    name = "name"

    def __init__(self, names: Callable[[], Collection[str]]) -> None:
        self._registered = names

    @property
    def _names(self) -> Collection[str]:
        return self._registered()

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return f"[{'|'.join(self._names)}]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value not in self._names:
            self.fail(f"{value!r} is not one of {', '.join(map(repr, self._names))}.", param, ctx)
        return value
