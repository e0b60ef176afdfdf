"""The seam of data sources: what load_data asks of one, and what it gets.

A source is one class in a file of its own and one line in ``SOURCES`` of ``sources.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import IO, NamedTuple, Protocol, runtime_checkable

# A file's size in bytes, and a number that changes when it is written: nanoseconds since 1970.
Stamp = tuple[int, int]

# Class -> names of its images, both sorted.
Files = dict[str, list[str]]


class Listing(NamedTuple):
    """The images of each class.

    Args:
        files: Class -> names of its images, both in the order of ``names.sort_key``.
        notes: Lines for the user on what was understood, and on what was left out.
        left_out: Class -> other content of its folder, in words.
        groups: Class -> for each of its images the subject that it shows, such as a patient; empty
            where none are known.
        group_column: Name of the column that they come from.
        queries: The same classes with images that serve as queries, where ``files`` are for support
            alone; empty: both come from ``files``.
    """

    files: Files
    notes: tuple[str, ...] = ()
    left_out: Mapping[str, str] = MappingProxyType({})
    groups: Mapping[str, Sequence[str]] = MappingProxyType({})
    group_column: str = ""
    queries: Mapping[str, Sequence[str]] = MappingProxyType({})


class ImageSource(Protocol):
    """The place in which the images of a data set lie.

    Attributes:
        identity: Text that differs wherever images of one name and stamp may differ.
    """

    @property
    def identity(self) -> str: ...

    def describe(self, name: str) -> str:
        """The place of an image, for messages; for the name "" that of all of them."""

    def file(self, name: str) -> Path | IO[bytes]:
        """The file or path that Pillow opens; OSError or ValueError where it can't be had."""

    def stamp(self, name: str) -> Stamp:
        """A stamp that tells an image from an earlier one of its name; raises as ``file``."""


class DataSource(Protocol):
    """A kind of data that the setting ``data`` may name.

    Attributes:
        takes_images: Whether the setting ``images`` may say where its images are.
        endings: Endings, in lower case and with their dot, of the files that are of this kind.
    """

    takes_images: bool
    endings: tuple[str, ...]

    def owns(self, data: str) -> bool:
        """Whether data is of this kind, by its name and what lies there; raises nothing.

        Args:
            data: The setting's value, with the user's home folder in place of ``~``.
        """

    def read(self, data: str, images: Path | None) -> tuple[ImageSource, Listing]:
        """List the images; none of them is decoded.

        Args:
            data: As for ``owns``.
            images: Folder of the images, if the user named one.

        Raises:
            FewShotError: The data can't be used; its text starts with ``setting("data")``.
        """


@runtime_checkable
class GroupedSource(DataSource, Protocol):
    """A kind of data that may say which images show the same subject."""

    def read_grouped(
        self, data: str, images: Path | None, group_column: str | None
    ) -> tuple[ImageSource, Listing]:
        """List the images as ``read``, with their groups; the setting names a column of them."""
