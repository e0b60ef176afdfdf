"""Fields of settings: options, each with a help text and a check of what it is given."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Collection, Iterable
from typing import Any

from tir_kernels.scalars import real_number, whole_number


def whole(
    default: int | None,
    help: str,
    *,
    least: int | None = None,
    most: int | None = None,
    reason: str = "",
) -> Any:
    """A whole number.

    Args:
        default: Default; ``None``: may be left unset.
        help: Help text of the option.
        least, most: Bounds, both allowed; ``None``: none.
        reason: Why not more, for the message: "{most}, since {reason}".
    """

    def check(name: str, value: object) -> int:
        number = whole_number(name, value, "a whole number")
        _require_bounds(name, number, least, most, reason)
        return number

    return _field(default, help, check)


def seed(help: str) -> Any:
    """A seed of random numbers, 0 by default."""
    return whole(0, help, least=0, most=2**63 - 1, reason="generators take 63 bits")


FIVE = "five"


def views(help: str) -> Any:
    """The number of further views of each image to train on, or the word for five fixed views."""
    return whole_or(
        FIVE,
        0,
        help,
        least=0,
        most=1000,
        reason="so many views of one image are the same views again",
    )


def whole_or(
    word: str,
    default: int | str | None,
    help: str,
    *,
    least: int,
    most: int | None = None,
    reason: str = "",
) -> Any:
    """A whole number, or a word in its place; the other arguments are those of ``whole``."""
    expected = f"an int or {word!r}" if default is not None else f"an int, {word!r} or None"

    def check(name: str, value: object) -> int | str:
        if value == word:
            return word
        number = whole_number(name, value, expected)
        _require_bounds(name, number, least, most, reason)
        return number

    return _field(default, help, check, word=word)


def _require_bounds(
    name: str, number: int, least: int | None, most: int | None, reason: str
) -> None:
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least}; got {number}")
    if most is not None and number > most:
        raise ValueError(f"{name} must be at most {most}, since {reason}; got {number}")


def real(
    default: float | None, help: str, *, least: float | None = None, below: float | None = None
) -> Any:
    """A finite real number, which stays an int if it is one.

    Args:
        default: Default; ``None``: may be left unset.
        help: Help text of the option.
        least: Least value, allowed; ``None``: none.
        below: Bound above, not allowed; ``None``: none.
    """

    def check(name: str, value: object) -> float | int:
        # An int stays one: it is written to a run's settings, where 8 and 8.0 would be two values.
        number = value if type(value) is int else real_number(name, value)
        if least is not None and below is not None:
            if not least <= number < below:
                raise ValueError(f"{name} must lie in [{least}, {below}); got {number}")
        elif least is not None:
            if not (math.isfinite(number) and number >= least):
                raise ValueError(
                    f"{name} must be a finite number of at least {least}; got {number}"
                )
        elif not math.isfinite(number):
            raise ValueError(f"{name} must be finite; got {number}")
        return number

    return _field(default, help, check)


def choice(default: str | None, choices: Collection[str], help: str) -> Any:
    """One of several words; with ``None`` for the default it may be left unset."""

    def check(name: str, value: object) -> str:
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
        return str(value)

    return _field(default, help, check, choices=lambda: choices)


def whole_list(default: tuple[int, ...] | None, help: str) -> Any:
    """Several whole numbers."""

    def check(name: str, value: object) -> tuple[int, ...]:
        if not isinstance(value, Iterable):
            raise TypeError(f"{name} must be a list of whole numbers; got {value!r}")
        return tuple(whole_number(name, each, "a list of whole numbers") for each in value)

    return _field(default, help, check)


def text_list(
    default: tuple[str, ...] | None, help: str, check_entry: Callable[[str, str], str]
) -> Any:
    """Several texts, at least one, each with a check (name, text) -> text."""

    def check(name: str, value: object) -> tuple[str, ...]:
        if isinstance(value, str) or not isinstance(value, Iterable):
            raise TypeError(f"{name} must be a list of str; got {value!r}")
        entries = tuple(value)
        for entry in entries:
            if not isinstance(entry, str):
                raise TypeError(f"{name} must be a list of str; got {value!r}")
        if not entries:
            raise ValueError(f"{name} must hold at least one text")
        return tuple(check_entry(name, entry) for entry in entries)

    return _field(default, help, check, is_text_list=True)


def text(default: str | None, help: str) -> Any:
    """Any text."""

    def check(name: str, value: object) -> str:
        if not isinstance(value, str):
            raise TypeError(f"{name} must be a str; got {type(value).__name__}")
        return value

    return _field(default, help, check)


def flag(help: str) -> Any:
    """A switch that is off unless set."""

    def check(name: str, value: object) -> bool:
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be a bool; got {type(value).__name__}")
        return value

    return _field(False, help, check)


def checked(
    default: object,
    help: str,
    check: Callable[[str, Any], Any],
    choices: Callable[[], Collection[str]] | None = None,
) -> Any:
    """A value of any kind, with a check (name, value) -> value of its own.

    Args:
        default: Default; ``None``: may be left unset.
        help: Help text of the option.
        check: Function that gives the value to keep, or raises.
        choices: Function that gives the words to choose from, if they are words.
    """
    return _field(default, help, check, **({} if choices is None else {"choices": choices}))


def added_later(field: Any) -> Any:
    """A field that methods did not always have: see ``as_settings``."""
    return dataclasses.field(default=field.default, metadata={**field.metadata, "is_later": True})


def inherited(owner: type, name: str, default: object) -> Any:
    """The field of a base class, with another default."""
    (field,) = (each for each in dataclasses.fields(owner) if each.name == name)
    return dataclasses.field(default=default, metadata=field.metadata)


def as_settings(options: Any) -> dict[str, Any]:
    """The fields of a dataclass by their names, as a run's settings hold them.

    One that was added later is left out at its default: runs from before it hold none, and go on.
    """
    return {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(options)
        if not (field.metadata.get("is_later") and getattr(options, field.name) == field.default)
    }


def kinds_of(hint: Any) -> tuple[Any, ...]:
    """The types that a field's hint allows besides ``None``, a tuple's without its entries."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kinds = typing.get_args(hint) if is_union else (hint,)
    return tuple(typing.get_origin(kind) or kind for kind in kinds if kind is not type(None))


def check_all(settings: Any) -> None:
    """Put each field of a frozen dataclass through its check; unset ones stay ``None``."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if "check" in field.metadata and not (value is None and field.default is None):
            object.__setattr__(settings, field.name, field.metadata["check"](field.name, value))


class Checked:
    """A dataclass whose fields check what they are given."""

    def __post_init__(self) -> None:
        check_all(self)


def _field(default: object, help: str, check: Callable[[str, Any], Any], **more: Any) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, "check": check, **more})
