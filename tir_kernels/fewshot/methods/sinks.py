"""Patches taken for attention sinks without text, as an option of methods."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tir_kernels.fewshot import fields
from tir_kernels.fewshot.methods.protocol import Kit

if TYPE_CHECKING:
    from tir_kernels.adapters.sinks import Sinks

SINKS = ("attention", "norm", "random")
SINKS_HELP = (
    'Patches taken for sinks: "attention", the num_sinks that receive most of it in the block; '
    '"norm", those whose norm is above its median in the image by six standard deviations; or, as '
    'a control, num_sinks at "random", the same in all images of an episode.'
)


def sinks_field(default: str) -> Any:
    """The field ``sinks``."""
    return fields.choice(default, SINKS, SINKS_HELP)


def num_sinks_field() -> Any:
    """The field ``num_sinks``."""
    return fields.whole(
        4,
        'Patches that are sinks, by sinks "attention" and "random".',
        least=0,
        most=10**6,
        reason="no image has as many",
    )


def make_sinks(kind: str, count: int, kit: Kit) -> Sinks:
    """The choice of patches that the fields describe."""
    from tir_kernels.adapters import FirstOf, MostAttended, NormOutliers, RandomOrder

    if kind == "norm":
        return NormOutliers()
    return FirstOf(MostAttended() if kind == "attention" else RandomOrder(kit.seeds), count)
