"""Handles of what was added to a model: context managers that take it off again."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, TypeVar

from torch import nn

from tir_kernels.towers.opening import adapters_on

Self = TypeVar("Self", bound="Handle")


class Handle(AbstractContextManager):
    """Base of all handles: as a context manager, each removes itself at the end."""

    def remove(self) -> None:
        """Leave the model as it was before; harmless if done already."""
        raise NotImplementedError

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def handles_on(model: nn.Module, kind: type[Self]) -> list[Self]:
    """The handles of a kind that are on a model, each once: of a copy, the copy's own."""
    found: dict[int, Any] = {}
    for adapter in adapters_on(model):
        handle = getattr(adapter, "handle", adapter)
        if isinstance(handle, kind):
            found[id(handle)] = handle
    return list(found.values())
