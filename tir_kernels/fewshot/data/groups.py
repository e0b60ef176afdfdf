"""Groups: which images of a data set show the same subject, such as a patient or a lesion."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.data.known import known_set
from tir_kernels.fewshot.data.words import known_name
from tir_kernels.text import setting

# In place of a column's name, for a table whose groups are known: images are drawn without them.
NO_GROUPS = "none"

# What programs write where there is no value.
MISSING = {"", "nan", "na", "n/a", "#n/a", "<na>", "none", "null"}

# The usual names of columns of subjects, in lower case without spaces, underscores and hyphens.
_SUBJECT = re.compile(
    r"(patient|subject|participant|lesion|case|person|individual|animal|donor|specimen)s?"
    r"(id|ids|number|name|code)?"
)


def plain_column(column: str) -> str:
    """A column's name in lower case without spaces, underscores and hyphens."""
    return re.sub(r"[\s_-]", "", column).lower()


def choose_group_column(
    path: str | Path, header: Sequence[str], labels: Sequence[str], given: str | None
) -> int | None:
    """The position of a table's column of groups.

    Args:
        path: The table or data set, for messages.
        header: The names of its columns.
        labels: The classes of its images.
        given: The user's setting: a column's name, ``NO_GROUPS``, or ``None`` for the column that
            is known of the data set whose classes these are.

    Raises:
        FewShotError: There is no such column.
    """
    if given == NO_GROUPS:
        return None
    if given is None:
        known = known_name(sorted(set(labels)))
        column = known_set(known).group_column if known else ""
        return header.index(column) if column in header else None
    for spelling in (str, plain_column):
        found = [at for at, name in enumerate(header) if spelling(name) == spelling(given)]
        if len(found) == 1:
            return found[0]
    raise FewShotError(
        f"{setting('group_column')}: {path} has {'several columns' if found else 'no column'} "
        f"{given!r}; it has {', '.join(header)}"
    )


def read_groups(
    path: str | Path, column: str, names: Sequence[str], values: Sequence[str]
) -> tuple[list[str], str]:
    """The group of each image, and a note on them; an image without a value is its own.

    Args:
        path: The table or data set, for messages.
        column: The column's name.
        names: The images as the table lists them.
        values: The column's entry for each image.
    """
    # No entry of a table starts with NUL.
    groups = [
        f"\0{name}" if value.lower() in MISSING else value
        for name, value in zip(names, values, strict=True)
    ]
    alone = sum(group.startswith("\0") for group in groups)
    note = (
        f"{path}: {len(groups)} images show {len(set(groups))} subjects by column {column}: no "
        "subject has images on both sides of an episode, as support and as queries "
        f"({setting('group_column', NO_GROUPS)} draws without regard to them)"
    )
    if alone:
        note += f"; {alone} images without a value count as subjects of their own"
    return groups, note


def subjects_note(
    path: str | Path,
    header: Sequence[str],
    taken: Sequence[int],
    column: Callable[[int], Sequence[str]],
) -> tuple[str, ...]:
    """A note on a column that looks like one of subjects that have several images each.

    Args:
        path: The table or data set, for messages.
        header: The names of its columns.
        taken: Positions of the columns that have another meaning.
        column: Gives the entries of a column.
    """
    for at, name in enumerate(header):
        if at in taken or not _SUBJECT.fullmatch(plain_column(name)):
            continue
        counts = Counter(value for value in column(at) if value.lower() not in MISSING)
        several = sum(count > 1 for count in counts.values())
        if several and len(counts) > 1:
            return (
                f"{path}: {several} of the {len(counts)} values of column {name} stand for several "
                "images, which may come to lie on both sides of an episode; if they show the same "
                f"subject, keep them together with {setting('group_column', name)}",
            )
    return ()
