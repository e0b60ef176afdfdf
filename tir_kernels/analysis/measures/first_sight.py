"""A memory of the first pass, for measures that compare later ones with it."""

from __future__ import annotations

from torch import Tensor


class FirstSight:
    """Keeps, for each block, the tensor that it was shown first."""

    def __init__(self) -> None:
        self._kept: dict[int, Tensor] = {}

    def of(self, block: int, now: Tensor) -> Tensor:
        """What was first shown of this block: a copy, so that nothing larger is kept alive.

        Raises:
            ValueError: It had another shape, so was of other images.
        """
        if block not in self._kept:
            self._kept[block] = now.clone()
        first = self._kept[block]
        if first.shape != now.shape:
            raise ValueError(
                f"a measure that compares with what it saw first takes the same images each time; "
                f"it saw {tuple(first.shape)}, now {tuple(now.shape)}: make a new one"
            )
        return first
