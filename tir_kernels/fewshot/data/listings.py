"""Listings of images, wherever they were read, and the names that are the same class."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from tir_kernels.text import printable

# Python holds bytes of file names that are not UTF-8 as such characters.
_NOT_UTF_8 = re.compile("[\ud800-\udfff]")

# Of files that list images.
LIST_ENDINGS = (".json", ".csv", ".tsv")

# Class -> names of its images, both sorted.
Files = dict[str, list[str]]


class Listing(NamedTuple):
    """The images of each class.

    Args:
        files: Class -> names of its images, both in the order of ``sort_key``.
        notes: Lines for the user on what was understood, and on what was left out.
        left_out: Class -> what else its folder holds, in words.
    """

    files: Files
    notes: tuple[str, ...] = ()
    left_out: Mapping[str, str] = MappingProxyType({})


def class_name(name: str) -> str:
    """A class's name in the one form of Unicode in which names are compared (NFC).

    File systems and editors write "é" as one character or as two; both are one class.
    """
    return unicodedata.normalize("NFC", name)


def shown_name(name: str) -> str:
    r"""A class's name as text that any file can hold: bytes that are not UTF-8 become ``\xea``."""
    return _NOT_UTF_8.sub(lambda match: printable(match[0]), name)


def sort_key(name: str) -> tuple[str, str]:
    """An order that doesn't depend on the form of Unicode in which names are written."""
    return class_name(name), name
