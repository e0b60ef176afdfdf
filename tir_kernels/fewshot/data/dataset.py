"""Few-shot data, wherever it comes from: classes, their words, and their images."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tir_kernels.errors import FewShotError, first_line
from tir_kernels.fewshot.data.groups import NO_GROUPS
from tir_kernels.fewshot.data.names import class_name, shown_name
from tir_kernels.fewshot.data.protocol import GroupedSource, ImageSource, Listing, Stamp
from tir_kernels.fewshot.data.sources import data_sources, list_endings
from tir_kernels.fewshot.data.words import class_words, published_note
from tir_kernels.files import expand_user
from tir_kernels.text import Notice, setting

_DATA = setting("data")


@dataclass(frozen=True)
class ImageClass:
    """A class of images.

    Args:
        folder: Its name in the data: that of its folder, or its label.
        words: The words a prompt uses.
        files: Its images' names in the data's source.
        stamps: Size and time of each, when the data was listed.
        left_out: Other content of its folder, in words.
        groups: For each image the subject that it shows; empty where none are known.
    """

    folder: str
    words: str
    files: tuple[str, ...]
    stamps: tuple[Stamp, ...]
    left_out: str = ""
    groups: tuple[str, ...] = ()


@dataclass(frozen=True)
class ImageData:
    """Classes of images, sorted by name.

    Args:
        source: The place in which the images lie.
        classes: The classes.
        fingerprint: Digest of class words, and of the names, sizes and times of images.
        notes: Lines for the user on how the data was understood.
        group_column: Name of the column that the classes' groups come from; empty without groups.
        queries: The same classes with the images that serve as queries, where those of ``classes``
            serve as support alone; empty: both are drawn from ``classes``.
    """

    source: ImageSource
    classes: tuple[ImageClass, ...]
    fingerprint: str
    notes: tuple[Notice, ...] = ()
    group_column: str = ""
    queries: tuple[ImageClass, ...] = ()

    @property
    def name(self) -> str:
        """The place of the images, for messages."""
        return self.source.describe("")

    def require(self, *, ways: int, shots: int, queries: int | None) -> None:
        """Check that episodes of this size can be drawn.

        Args:
            ways: Classes.
            shots, queries: Images per class; ``None`` for all queries, of which there must be one.

        Raises:
            FewShotError: Too few classes, or a class with too few images.
        """
        if ways > len(self.classes):
            raise FewShotError(
                f"{setting('ways', ways)} is more than the {len(self.classes)} classes in "
                f"{self.name} "
                f"({_some([entry.folder for entry in self.classes])}); lower {setting('ways')}"
            )
        if self.queries:
            self._require_parts(shots, queries)
            return
        needed = shots + (queries or 1)
        small = [entry for entry in self.classes if len(entry.files) < needed]
        if small:
            others = _others(len(small) - 1)
            left_out = f" (left out: {small[0].left_out})" if small[0].left_out else ""
            raise FewShotError(
                f"class {small[0].folder!r} in {self.name} has {len(small[0].files)} images"
                f"{left_out} but {needed} are needed ({sizes_in_words(shots, queries)}){others}; "
                f"add images, remove the class, or lower {lower_sizes(queries)}"
            )

    def _require_parts(self, shots: int, queries: int | None) -> None:
        for entries, name, needed in (
            (self.classes, "shots", shots),
            (self.queries, "queries", queries or 1),
        ):
            small = [entry for entry in entries if len(entry.files) < needed]
            if small:
                place = "support" if name == "shots" else "queries"
                is_all = name == "queries" and queries is None
                asked = "at least one is" if is_all else f"{setting(name, needed)} are"
                raise FewShotError(
                    f"class {small[0].folder!r} in {self.name} has {len(small[0].files)} images "
                    f"for {place} but {asked} needed"
                    f"{_others(len(small) - 1)}; add images"
                    + (" or remove the class" if is_all else "")
                    + ("" if is_all else f", remove the class, or lower {setting(name)}")
                )


def sizes_in_words(shots: int, queries: int | None) -> str:
    """What each class needs, for messages; ``None`` for all queries."""
    return f"{shots} shots + {'a query' if queries is None else f'{queries} queries'}"


def lower_sizes(queries: int | None) -> str:
    """The settings that can be lowered where a class has too few images."""
    return setting("shots") + ("" if queries is None else f" or {setting('queries')}")


def load_data(
    data: str | Path,
    *,
    class_names: Mapping[str, str] | str | Path | None = None,
    images: str | Path | None = None,
    group_column: str | None = None,
    needs_words: bool = True,
) -> ImageData:
    """List the classes and images of a data set; no image is decoded.

    Args:
        data: Data of one of the kinds in ``sources.SOURCES``: a folder with a sub-folder of images
            per class, see ``list_folders``; a file that lists images, see ``read_json_list`` and
            ``read_table``; ``hf:NAME`` or ``hf:NAME:SPLIT``, a data set of Hugging Face; or a
            folder into which such a data set was saved.
        class_names: Words of each class, see ``class_words``.
        images: Folder of the images that a file lists; ``None``: the file's own.
        group_column: Column of a table, or of a data set of Hugging Face, whose values are the
            subjects that images show, such as patients; ``None``: that of a known data set; "none":
            none.
        needs_words: Whether prompts will need words of the classes; without, the words are their
            names, whatever these are.

    Raises:
        FewShotError: The data or the class names can't be used.
    """
    given = {
        "data": data,
        "images": images,
        "class_names": class_names,
        "group_column": group_column,
    }
    for name, value in given.items():
        if value == "":
            raise FewShotError(f"{setting(name)} is empty; name what it should be, or leave it out")
    place = _expanded("data", data)
    kind = next((each for each in data_sources() if each.owns(place)), None)
    if kind is None:
        raise _unknown(place)
    if images is not None and not kind.takes_images:
        raise FewShotError(
            f"{setting('images')} goes with a JSON or CSV file; {setting('data', data)} is none"
        )
    folder = None if images is None else Path(_expanded("images", images))
    if isinstance(kind, GroupedSource):
        source, listing = kind.read_grouped(place, folder, group_column)
    elif group_column in (None, NO_GROUPS):
        source, listing = kind.read(place, folder)
    else:
        raise FewShotError(
            f"{setting('group_column')} names a column of a CSV or TSV table, or of a data set of "
            "Hugging Face; "
            f"{setting('data', data)} is none"
        )
    if needs_words:
        words, note = class_words(list(listing.files), class_names)
    else:
        words, note = {name: shown_name(name) for name in listing.files}, ""
    classes = _classes(source, listing, listing.files, words)
    queries = _classes(source, listing, listing.queries, words)
    counts = {name: len(own) for name, own in listing.files.items()}
    for name, own in listing.queries.items():
        counts[name] += len(own)
    published = published_note(source.describe(""), counts, class_names)
    notes = (*listing.notes, *filter(None, (note, published)))
    return ImageData(
        source,
        classes,
        data_fingerprint((*classes, *queries)),
        # What they quote may come from file names and other programs.
        tuple(Notice(line) for line in notes),
        listing.group_column,
        queries,
    )


def _classes(
    source: ImageSource,
    listing: Listing,
    files: Mapping[str, Sequence[str]],
    words: Mapping[str, str],
) -> tuple[ImageClass, ...]:
    """The classes of a listing with some of their images."""
    return tuple(
        ImageClass(
            shown_name(name),
            words[name],
            tuple(names),
            _stamps(source, names),
            listing.left_out.get(name, ""),
            tuple(listing.groups.get(name, ())),
        )
        for name, names in files.items()
    )


def _others(count: int) -> str:
    return f" ({count} more classes have too few)" if count else ""


def _expanded(name: str, value: str | Path) -> str:
    """A setting's value with the user's home folder in place of a leading ``~``."""
    try:
        return str(expand_user(value)) if str(value).startswith("~") else str(value)
    except OSError as error:
        raise FewShotError(f"{setting(name)}: {first_line(error)}; pass a whole path") from error


def _unknown(data: str) -> FewShotError:
    """The error of data that no source owns."""
    endings = list_endings()
    try:
        mode = os.stat(data).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return FewShotError(
            f"{_DATA}: {Path(data)} does not exist; pass a folder with a sub-folder per class, or "
            "a JSON or CSV file"
        )
    except (OSError, ValueError) as error:
        return FewShotError(f"{_DATA}: can't read {Path(data)}: {first_line(error)}")
    if stat.S_ISREG(mode):
        return FewShotError(
            f"{_DATA}: {Path(data)} is a file but does not end in {', '.join(endings[:-1])} or "
            f"{endings[-1]}; pass such a list, or a folder with a sub-folder per class"
        )
    return FewShotError(
        f"{_DATA}: {Path(data)} is neither a folder nor a regular file, but a pipe or device; pass "
        "a folder with a sub-folder per class, or a JSON or CSV file"
    )


def _stamps(source: ImageSource, names: Sequence[str]) -> tuple[Stamp, ...]:
    try:
        return tuple(source.stamp(name) for name in names)
    except (OSError, ValueError) as error:
        raise FewShotError(f"{_DATA}: {first_line(error)}") from error


def data_fingerprint(classes: Sequence[ImageClass]) -> str:
    """The digest of classes: of their words, and of their images' names, sizes and times."""
    digest = hashlib.sha256()
    for entry in classes:
        images = [
            (class_name(name), *stamp)
            for name, stamp in zip(entry.files, entry.stamps, strict=True)
        ]
        # Groups only where there are some: data without them is what it was before there were any.
        groups = [entry.groups] if entry.groups else []
        digest.update(json.dumps([entry.folder, entry.words, images, *groups]).encode())
    return digest.hexdigest()


def _some(names: Sequence[str], limit: int = 6) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
