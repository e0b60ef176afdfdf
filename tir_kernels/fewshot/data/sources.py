"""The registry of data sources."""

from __future__ import annotations

from collections.abc import Iterator

from tir_kernels.fewshot.data.protocol import DataSource
from tir_kernels.registry import load

# Name -> "module:class" of a ``DataSource``; the first that owns the data reads it.
SOURCES = {
    "hugging face": "tir_kernels.fewshot.data.huggingface:HuggingFaceData",
    "json list": "tir_kernels.fewshot.data.json_lists:JsonList",
    "table": "tir_kernels.fewshot.data.tables:TableList",
    "folder": "tir_kernels.fewshot.data.folders:ClassFolders",
}


def data_sources() -> Iterator[DataSource]:
    """The sources, in the order in which they are asked."""
    for place in SOURCES.values():
        yield load(place)()


def list_endings() -> tuple[str, ...]:
    """The endings of all files that list images."""
    return tuple(ending for source in data_sources() for ending in source.endings)
