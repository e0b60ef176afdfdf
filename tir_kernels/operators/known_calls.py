"""Calls whose like was seen before: what was checked and chosen then need not be again.

Checks, the choice of a backend and the layout of results depend on a call's options and on the
types, sizes and strides of its tensors, which PyTorch compares in a fraction of their time. Only
eager calls on plain tensors of the CPU are known, whose backend has launches to remember: where a
mode, a transform, a compiler or an autocast region sees operators, all goes its usual way.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from tir_kernels.operators import choose
from tir_kernels.operators.library import is_plain, is_transformed, is_watched

Tensors = tuple[Tensor | None, ...]
Key = tuple[Hashable, ...]
Check = Callable[..., bool]
Known = TypeVar("Known")

_is_autocast = torch._C._is_any_autocast_enabled
_NUMBERS_AND_NAMES = frozenset((bool, int, float, str, type(None)))
_MOST, _MOST_ALIKE = 4096, 16


def key_of(tensors: Tensors, *options: Hashable) -> Key | None:
    """What is known is kept by this; ``None`` where more decides than options and tensors.

    Args:
        tensors: The call's tensors, the first of which it cannot do without.
        options: Its numbers and names. A call with others is not known.
    """
    kinds = [type(option) for option in options]
    if (
        not _NUMBERS_AND_NAMES.issuperset(kinds)
        or not getattr(tensors[0], "is_cpu", False)
        or is_transformed()
        or _is_autocast()
        or forward_ad._current_level >= 0
        or is_watched()
    ):
        return None
    # With their types: True equals 1, and 1 equals 1.0.
    return (*options, *kinds, *[each is None for each in tensors])


class KnownCalls(Generic[Known]):
    """What is known of calls, by key, and by the tensors like which others have to be.

    All is forgotten when backends are.
    """

    def __init__(self) -> None:
        self._known: dict[Key, list[tuple[Check, Known]]] = {}
        self._generation = choose.generation

    def get(self, key: Key | None, tensors: Tensors) -> Known | None:
        if key is None:
            return None
        if self._generation != choose.generation:
            self._known.clear()
            self._generation = choose.generation
        alike = self._known.get(key)
        if alike is None:
            return None
        present = [each for each in tensors if each is not None]
        for is_like, known in alike:
            if is_like(*present):
                return known
        return None

    def add(self, key: Key, tensors: Tensors, known: Known) -> None:
        """Remember what is known of a call on these tensors, if they are plain."""
        present = [each for each in tensors if each is not None]
        are_plain = all(
            type(each) in (Tensor, Parameter) and each.is_cpu and is_plain(each) for each in present
        )
        if _comparison is None or not are_plain:
            return
        if len(self._known) >= _MOST:
            self._known.clear()
        alike = self._known.setdefault(key, [])
        alike.insert(0, (_comparison(present), known))  # what came last comes again, most likely
        del alike[_MOST_ALIKE:]


def _comparison_of_the_compiler() -> Callable[[Sequence[Tensor]], Check] | None:
    """What makes a function that compares tensors with these, as ``torch.compile`` does to tell
    whether a graph serves: Python types, dispatch keys, dtypes, devices, sizes, strides, and
    whether they want a gradient. It holds no tensor. ``None`` where this PyTorch has none that
    tells them apart.
    """

    def compare(tensors: Sequence[Tensor]) -> Check:
        sizes = [list(each.shape) for each in tensors]
        strides = [list(each.stride()) for each in tensors]
        # PyTorch's stub has the sizes of one tensor here, and it wants those of all.
        kind: Any = torch._C._dynamo.guards.TensorGuards
        return kind(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check

    rows = torch.empty(2, 4, dtype=torch.float32, device="cpu")
    others = [
        rows.bfloat16(),
        rows.mT,
        rows[:, :3],
        rows.mT.contiguous().mT,
        rows[0],
        Parameter(rows),
        torch._neg_view(rows),
        rows.clone().requires_grad_(),
        rows.to("meta"),
        None,
    ]
    try:
        is_like = compare([rows, rows])
        tells_apart = not any(is_like(rows, other) for other in others)
        return compare if is_like(rows, rows.clone()) and tells_apart else None
    except (AttributeError, TypeError, RuntimeError, SystemError):
        return None


_comparison = _comparison_of_the_compiler()
