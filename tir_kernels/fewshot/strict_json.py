"""JSON that says one thing only: no name twice, and no numbers that are none."""

from __future__ import annotations

import json
from typing import Any


class RepeatedNameError(ValueError):
    """An object gives a name two values.

    Attributes:
        name: The name.
    """

    def __init__(self, name: str) -> None:
        super().__init__(f"{name!r} is there twice")
        self.name = name


def encode_json(content: Any, **options: Any) -> bytes:
    """Strict JSON in UTF-8, which every text survives.

    A file name that is not UTF-8 has characters that can't be encoded; they are escaped.
    """
    try:
        return json.dumps(content, allow_nan=False, ensure_ascii=False, **options).encode()
    except UnicodeEncodeError:
        return json.dumps(content, allow_nan=False, **options).encode()


def decode_json(content: bytes) -> Any:
    """The content of strict JSON in UTF-8.

    Raises:
        ValueError: It is none, is nested too deeply, or gives a name two values.
    """
    try:
        return json.loads(
            content.decode(),
            parse_constant=_refuse_constant,
            object_pairs_hook=without_repeats,
        )
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these names and values, for ``json.loads``.

    Raises:
        RepeatedNameError: A name is there twice.
    """
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise RepeatedNameError(next(name for name in names if names.count(name) > 1))
    return values
