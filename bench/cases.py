"""Cases that a suite hands to the runner, and the implementations that compete in each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .counting import Cost
from .timing import Call, Measure


class WrongResultError(AssertionError):
    """An implementation computes something else than it should; it is never timed."""


@dataclass(frozen=True)
class Implementation:
    """One way to compute what a case measures.

    Args:
        name: As in the records.
        prepare: Given the case's inputs, build the call and check its result against float64.
            Raises :class:`WrongResultError` if it is wrong; any other error is a reason to leave it
            out, which is shown.
        unavailable: Why it cannot take part, if that is known beforehand.
        scratch_bytes: Estimate of what it holds in memory beside inputs and outputs.
    """

    name: str
    prepare: Callable[[Any], Call]
    unavailable: str = ""
    scratch_bytes: int = 0


@dataclass(frozen=True)
class Case:
    """One row of a suite: an operator at one shape, type and direction.

    Args:
        suite, operator, device, dtype, shape, direction: As in the records.
        make_inputs: Allocates the tensors that all implementations share.
        implementations: In the order in which they take turns.
        measure: Given the calls, in that order, and the seconds for each: their measurements.
        cost: Useful work of a call, if it is counted.
        slowdown: How many times longer than its operations at the rate of a large matrix product a
            plain implementation may take.
        input_bytes: Estimate of what the inputs and outputs take.
        priority: Lower ones are measured first when time is short.
    """

    suite: str
    operator: str
    device: str
    dtype: str
    shape: Mapping[str, int]
    direction: str
    make_inputs: Callable[[], Any]
    implementations: Sequence[Implementation]
    measure: Measure
    cost: Cost | None = None
    slowdown: float = 4.0
    input_bytes: int = 0
    priority: int = 1

    def identity(self) -> dict[str, Any]:
        names = ("suite", "operator", "device", "dtype", "direction")
        return {name: getattr(self, name) for name in names} | {"shape": dict(self.shape)}

    def title(self) -> str:
        sizes = " ".join(f"{name}={size}" for name, size in self.shape.items())
        return f"{self.suite}: {self.operator} {self.direction}, {self.dtype}, {sizes}"
