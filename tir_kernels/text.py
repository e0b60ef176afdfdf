"""Text that comes from files and file names, made fit to be shown."""

from __future__ import annotations


def printable(text: str) -> str:
    r"""Text in which nothing can move a terminal's cursor, hide, or fail to be encoded.

    Control and formatting characters are shown as Python would escape them (``\x1b``), and so is
    each byte of a file name that is not UTF-8 (``for\xeat``).
    """
    return "".join(char if char.isprintable() else _escaped(char) for char in text)


def _escaped(char: str) -> str:
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:  # how Python holds a byte that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return char.encode("unicode_escape").decode()
