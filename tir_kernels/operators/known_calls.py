"""Calls whose like was seen before: what was checked and chosen then need not be again.

Checks, the choice of a backend and the layout of results depend on a call's signature alone, which
takes a fraction of their time to write down. Only eager calls on plain tensors of the CPU have one,
whose backend has launches to remember: where a mode, a transform, a compiler or an autocast region
sees operators, all goes its usual way.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from tir_kernels.operators.library import dispatch_keys, is_plain, is_transformed, is_watched

Signature = tuple[Hashable, ...]
Known = TypeVar("Known")

_NUMBERS_AND_NAMES = (bool, int, float, str, type(None))
_MOST = 4096


def signature_of(tensors: tuple[Tensor | None, ...], *options: Hashable) -> Signature | None:
    """All that decides how tensors and options are checked and served; ``None`` where more does.

    Args:
        tensors: The call's tensors.
        options: Its numbers and names. Those of other types have no signature.
    """
    if (
        is_transformed()
        or torch._C._is_any_autocast_enabled()
        or forward_ad._current_level >= 0
        or is_watched()
    ):
        return None
    found: list[Any] = []
    for option in options:
        kind: type = type(option)
        if kind not in _NUMBERS_AND_NAMES:
            return None
        found += (option, kind)  # True equals 1, and 1 equals 1.0
    try:
        for each in tensors:
            if each is None:
                found.append(None)
                continue
            kind = type(each)
            if (kind is Tensor or kind is Parameter) and each.is_cpu:
                found += (dispatch_keys(each), each.shape, each.stride(), each.dtype)
            else:
                return None
    except RuntimeError:  # a sparse tensor has no strides
        return None
    return tuple(found)


class KnownCalls(Generic[Known]):
    """What is known of calls, by their signature."""

    def __init__(self) -> None:
        self._known: dict[Signature, Known] = {}

    def get(self, signature: Signature | None) -> Known | None:
        return None if signature is None else self._known.get(signature)

    def add(self, signature: Signature, tensors: tuple[Tensor | None, ...], known: Known) -> None:
        """Remember what is known of a call on these tensors, if they are plain."""
        if not all(each is None or is_plain(each) for each in tensors):
            return
        if len(self._known) >= _MOST:
            self._known.clear()
        self._known[signature] = known


def requires_gradient(*tensors: Tensor | None) -> bool:
    """Whether a result of these tensors is to have one."""
    return torch.is_grad_enabled() and any(
        getattr(each, "requires_grad", False) for each in tensors
    )
