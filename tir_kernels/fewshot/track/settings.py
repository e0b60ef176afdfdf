"""The options of tracking."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from tir_kernels.analysis.measures import MEASURES, measure_class
from tir_kernels.fewshot.fields import check_all, checked, whole


def _measures(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not all(isinstance(each, str) for each in value):
        raise TypeError(f"{name} must be a list of names; got {value!r}")
    for each in value:
        measure_class(each)
    return tuple(dict.fromkeys(value))


@dataclass(frozen=True)
class Tracking:
    """What is read of a training, and how often.

    Raises:
        ValueError, TypeError: A value outside what is allowed.
    """

    every: int = whole(10, "Steps from one reading of the measures to the next.", least=1)
    measures: tuple[str, ...] | None = checked(
        None, "Names of measures; unset: all.", _measures, choices=lambda: MEASURES
    )
    maps: int = whole(2, "Episodes, from the first, of which maps for pictures are kept.", least=0)

    def __post_init__(self) -> None:
        check_all(self)

    @classmethod
    def parse(cls, text: str) -> Tracking:
        """The options in ``every=10,measures=a+b,maps=2``, each of which may be left out.

        Raises:
            ValueError: Text that does not look like this, or a value outside what is allowed.
        """
        given: dict[str, Any] = {}
        for part in filter(None, (each.strip() for each in text.split(","))):
            name, equals, value = part.partition("=")
            known = [field.name for field in fields(cls)]
            if not equals or name not in known or name in given:
                raise ValueError(
                    f"track must look like every=10,measures=NAME+NAME,maps=2; got {text!r}"
                )
            given[name] = value.split("+") if name == "measures" else _whole(name, value)
        try:
            return cls(**given)
        except ValueError as error:
            raise ValueError(f"track: {error}") from error

    def __str__(self) -> str:
        named = "" if self.measures is None else f",measures={'+'.join(self.measures)}"
        return f"every={self.every}{named},maps={self.maps}"


def _whole(name: str, value: str) -> int:
    try:
        return int(value)
    except ValueError as error:
        raise ValueError(f"track: {name} must be a whole number; got {value!r}") from error
