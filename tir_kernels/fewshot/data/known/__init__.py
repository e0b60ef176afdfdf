"""The registry of known data sets."""

from __future__ import annotations

from tir_kernels.fewshot.data.known.protocol import KnownSet
from tir_kernels.registry import load

# Name -> "module:object" of a ``KnownSet``; of several that have all of a data set's classes, the
# first gives the words.
KNOWN_SETS = {
    "plantvillage": "tir_kernels.fewshot.data.known.plantvillage:PLANTVILLAGE",
    "eurosat": "tir_kernels.fewshot.data.known.eurosat:EUROSAT",
    "isic2018": "tir_kernels.fewshot.data.known.isic2018:ISIC2018",
    "chestx": "tir_kernels.fewshot.data.known.chestx:CHESTX",
}


def known_set(name: str) -> KnownSet:
    """The known data set of this name."""
    return load(KNOWN_SETS[name])


def known_sets() -> dict[str, KnownSet]:
    """All known data sets, by name."""
    return {name: known_set(name) for name in KNOWN_SETS}
