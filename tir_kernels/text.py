"""Text that is meant for people: fit to be shown, and with settings named as the reader knows them.

A sentence of the library's may name a setting, such as "data must be a folder". Who calls the
library knows it as ``data``, who uses the command line as ``--data``. So a sentence holds a mark
where it names one, see ``setting``, and who shows the sentence spells the name, see ``Notice``.
"""

from __future__ import annotations

import re
from collections.abc import Callable

# Unicode keeps these two out of all text that programs exchange.
_NAME, _VALUE = "\ufdd0", "\ufdd1"
_MARKED = re.compile(f"{_NAME}(\\w+)({_VALUE}?)")


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


def setting(name: str, value: object = None) -> str:
    """The marked name of a setting, for the text of a ``Notice`` or a ``FewShotError``.

    Args:
        name: The name that a caller of the library knows, such as "class_names".
        value: A value to be given to it, if the sentence advises one.
    """
    return f"{_NAME}{name}" + ("" if value is None else f"{_VALUE}{value}")


class Notice(str):
    """A line for the user, which names settings as a caller of the library does.

    As a string it reads ``class_names``, and ``data=images/train`` where a value is advised.

    Args:
        marked: Text that names settings by ``setting``; what can't be shown is escaped.

    Attributes:
        marked: The text as it was given, to be part of another one.
    """

    marked: str

    def __new__(cls, marked: str) -> Notice:
        notice = super().__new__(cls, _spelled(marked, lambda name: name, "="))
        notice.marked = marked
        return notice

    def spelled(self, spelling: Callable[[str], str], assign: str) -> str:
        """The line with other names for the settings.

        Args:
            spelling: Gives the name to show for a setting's name.
            assign: Text between a name and a value.
        """
        return _spelled(self.marked, spelling, assign)


def renamed(notice: Notice, old: str, new: str) -> Notice:
    """A line that names one setting where it named another."""
    return Notice(re.sub(f"{_NAME}{old}(?!\\w)", f"{_NAME}{new}", notice.marked))


def _spelled(marked: str, spelling: Callable[[str], str], assign: str) -> str:
    def spell(match: re.Match[str]) -> str:
        return spelling(match[1]) + (assign if match[2] else "")

    return printable(_MARKED.sub(spell, marked))
