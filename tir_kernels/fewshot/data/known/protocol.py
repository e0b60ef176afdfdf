"""The seam of known data sets: what the package knows of one.

A known data set is one ``KnownSet`` in a file of its own and one line in ``KNOWN_SETS`` of
``__init__.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class KnownTable:
    """The table in which a data set is published.

    Args:
        file: Name of its column of files; empty for one of the usual names.
        label: Name of its column of labels; empty for one of the usual names.
        one_hot: Names of its columns of 0 and 1, one a class; such a table has no column of labels.
        kept: Labels whose images are kept in a table that has both of these columns, which then
            are to be named; others are left out. Empty: all are kept.
    """

    file: str = ""
    label: str = ""
    one_hot: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()


@dataclass(frozen=True)
class KnownSet:
    """A data set whose classes are known by name.

    Args:
        words: Class, as the data set's folders or labels call it -> words of a prompt. Copies may
            spell the classes with other cases, spaces and signs.
        table: The table in which it is published, if there is one.
        group_column: Name of the column, in any table of its images, whose values are the subjects
            that images show: of a patient or a lesion there are several images.
        template: Published template of prompts for its classes, with "{}" for the words. Where it
            is learned, the context starts as the words in front.
        title: Name by which people know it; empty: that of the registry.
        images: Number of its images as published; 0 where there are several or none is known.
        class_images: Class -> number of its images, where they are known: of all classes of the
            task, which may be fewer than have words.
    """

    words: Mapping[str, str]
    table: KnownTable | None = None
    group_column: str = ""
    template: str = ""
    title: str = ""
    images: int = 0
    class_images: Mapping[str, int] = field(default_factory=dict)
