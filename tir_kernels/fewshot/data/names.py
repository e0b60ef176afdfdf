"""Names of classes: those that are the same, in which order, and as text that can be shown."""

from __future__ import annotations

import re
import unicodedata

from tir_kernels.text import printable

# Python holds bytes of file names that are not UTF-8 as such characters.
_NOT_UTF_8 = re.compile("[\ud800-\udfff]")


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
