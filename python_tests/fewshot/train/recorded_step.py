"""A stand-in for CUDA graphs that runs on a CPU: a training step run again by addresses alone.

A graph holds the kernels of a step, the numbers that they were launched with, and addresses. What
it made itself it owns; tensors from outside it neither owns nor asks for again. So a step may only
become a graph if nothing in it depends on Python: on a number that changes, a tensor that is put in
the place of another, or one that nobody keeps.

Here the operators of one step are recorded, below autograd and autocast, with the storages of their
tensors: those made in the step are held, the others by weak references. A replay calls the
operators on these storages, and writes their results where the recorded ones lie. A recorded step
also runs, where a captured one is launched right behind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

WARM_UP_STEPS = 1  # fewer than on a GPU: by then a step must do what all later ones do

# What a capture refuses: the processor waits for the device, or copies from memory of its own.
_REFUSED = {
    "_local_scalar_dense": "reads a number",
    "lift_fresh": "makes a tensor of the processor's numbers",
    "nonzero": "has a result whose size depends on numbers",
}


class Outside(NamedTuple):
    """A tensor that the recorded step did not make, by its address."""

    storage: StorageWeakRef
    like: Tensor  # of its type, sizes and strides, without memory
    offset: int

    def tensor(self) -> Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        assert storage is not None, f"nobody keeps a tensor {tuple(self.like.shape)} of the step's"
        return _on(storage, self.like, self.offset)


class Recording(TorchDispatchMode):
    """The operators that are called while it is on, to be called again.

    Attributes:
        outside: Tensors that these read or write, but that were there before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.outside: list[Outside] = []
        self._own: dict[int, torch.UntypedStorage] = {}
        self._calls: list[tuple[Any, tuple, dict[str, Any], list[tuple[int, Tensor]]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        assert name not in _REFUSED, f"{name} {_REFUSED[name]}, which no graph can"
        given = (args, kwargs or {})
        known = {_address(each) for each in tree_leaves(given) if isinstance(each, Tensor)}
        kept_args, kept_kwargs = tree_map(self._kept, given)
        results = func(*args, **(kwargs or {}))
        made: list[tuple[int, Tensor]] = []
        for index, each in enumerate(tree_leaves(results)):
            if isinstance(each, Tensor) and _address(each) not in known:
                self._own[_address(each)] = each.untyped_storage()
                made.append((index, self._kept(each)))
        if made or func._schema.is_mutable:  # all others give views
            self._calls.append((func, kept_args, kept_kwargs, made))
        return results

    def _kept(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        storage, offset = value.untyped_storage(), int(value.storage_offset())
        if _address(value) in self._own:
            return _on(storage, value, offset)
        like = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        self.outside.append(Outside(StorageWeakRef(storage), like, offset))
        return self.outside[-1]

    @torch.no_grad()
    def replay(self) -> None:
        """Do the same work again, on what lies at the same addresses."""
        with torch.autocast("cpu", enabled=False):
            for func, args, kwargs, made in self._calls:
                given = tree_map(_found, (args, kwargs), is_leaf=_is_outside)
                results = tree_leaves(func(*given[0], **given[1]))
                for index, place in made:
                    assert results[index].dtype == place.dtype, func
                    assert results[index].stride() == place.stride(), func
                    place.copy_(results[index])


class RecordedStep:
    """A step of the engine that is recorded behind a few, and replayed from then on.

    It takes the place of ``RepeatedStep``, whose arguments it has.

    Attributes:
        replays: How often any step was replayed.
    """

    replays = 0

    def __init__(self, step: Callable[[], Tensor], device: torch.device, as_graph: bool) -> None:
        self._step, self._as_graph = step, as_graph
        self._steps_taken = 0
        self._recording: Recording | None = None
        self._losses: Tensor | None = None

    def __call__(self) -> Tensor:
        self._steps_taken += 1
        if not self._as_graph or self._steps_taken <= WARM_UP_STEPS:
            return self._step()
        if self._recording is None:
            self._recording = Recording()
            with self._recording:
                self._losses = self._step()
        else:
            self._recording.replay()
            RecordedStep.replays += 1
        assert self._losses is not None
        return self._losses


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _on(storage: torch.UntypedStorage, like: Tensor, offset: int) -> Tensor:
    """A tensor of that type, sizes and strides in a storage, unknown to autograd."""
    empty = torch.empty(0, dtype=like.dtype, device="cpu")
    return empty.set_(storage, offset, like.shape, like.stride())


def _is_outside(value: Any) -> bool:
    return isinstance(value, Outside)


def _found(value: Any) -> Any:
    return value.tensor() if isinstance(value, Outside) else value
