"""The machine's ceilings, measured in the same run, and the time below which nothing can go."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from .counting import Cost
from .settings import DTYPES
from .timing import clock_for, median_times

_COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}
_PRODUCT_SIZE = {"cpu": 1536, "cuda": 8192}
_SECONDS = 0.3


@dataclass
class Ceilings:
    """Copy bandwidth and matrix product rates of a device, each measured when first asked for."""

    device: str
    _bandwidth: float | None = None
    _rates: dict[str, float] = field(default_factory=dict)

    @property
    def bytes_per_second(self) -> float:
        """Rate of a large copy, bytes read and bytes written both counted."""
        if self._bandwidth is None:
            size = _COPY_BYTES[self.device]
            source = torch.ones(size // 4, device=self.device)
            target = torch.empty_like(source)
            seconds = self._seconds(lambda: target.copy_(source))
            self._bandwidth = 2 * size / seconds
        return self._bandwidth

    def flops_per_second(self, dtype: str) -> float:
        """Rate of a large matrix product; two operations per multiplication and addition."""
        if dtype not in self._rates:
            size = _PRODUCT_SIZE[self.device]
            left, right = (
                torch.randn(size, size, device=self.device).to(DTYPES[dtype]) for _ in range(2)
            )
            seconds = self._seconds(lambda: left @ right)
            self._rates[dtype] = 2 * size**3 / seconds
        return self._rates[dtype]

    def _seconds(self, call) -> float:
        with torch.no_grad():
            (milliseconds,) = median_times(clock_for(self.device, [call]), _SECONDS)
        return milliseconds * 1e-3


def bound_ms(cost: Cost, bytes_per_second: float, flops_per_second: float) -> float:
    """The time below which the useful work cannot be done: memory or arithmetic, the longer."""
    return 1e3 * max(cost.bytes / bytes_per_second, cost.flops / flops_per_second)
