"""Settings that differ from those of what a command would go on with, in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tir_kernels.text import setting


def changes(
    before: Mapping[str, Any], now: Mapping[str, Any], named: Callable[[str], str] = setting
) -> str:
    """The settings that were other ones: "A was 1, is 2; B was unset, is 3"; "" if none were.

    Args:
        before, now: Settings by name; one that is missing is unset.
        named: Gives a setting as the user knows it.
    """
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return "; ".join(
        f"{named(name)} was {_shown(before.get(name))}, is {_shown(now.get(name))}"
        for name in changed
    )


def _shown(value: object) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return "unset" if value is None else str(value)
