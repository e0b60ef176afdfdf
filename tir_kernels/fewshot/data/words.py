"""The words a prompt uses for a class: given, known for a data set, or read from its name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

from tir_kernels.errors import FewShotError, first_line
from tir_kernels.fewshot.data.documents import (
    NAMES_BYTES,
    find_delimiter,
    parse_json,
    parse_rows,
    read_document,
)
from tir_kernels.fewshot.data.known import KNOWN_SETS, known_set
from tir_kernels.fewshot.data.names import class_name, shown_name
from tir_kernels.files import expand_user
from tir_kernels.text import setting

_CLASS_NAMES = setting("class_names")

# In place of a file or a known set: the names of folders or labels as they are.
RAW = "raw"

# A number that may count classes, and what parts it from the word behind it.
_INDEX = re.compile(r"^(?P<number>\d{1,9})(?P<separator>[\s._-]+)(?=[^\W\d_])")


def default_words(folder: str, *, has_index: bool = False) -> str:
    """The words of a class whose name is all that is known.

    A leading WordNet id goes, camel case and underscores become spaces, all lower case:
    ``AnnualCrop`` -> "annual crop", ``n03126707_crane`` -> "crane", ``737-200`` -> "737-200".

    Args:
        folder: The class's name.
        has_index: Whether a number in front of it counts the classes, so that it goes, too.
    """
    words = _without_id(folder, has_index)
    words = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", words)
    # A dot within a number stays.
    words = re.sub(r"([\s_]|(?<!\d)\.|\.(?!\d))+", " ", words).strip().lower()
    return words or folder


def _without_id(name: str, has_index: bool) -> str:
    name = re.sub(r"^n\d{8}[\s._-]+", "", name)
    return _INDEX.sub("", name) if has_index else name


def _have_indices(names: Sequence[str]) -> bool:
    """Whether the numbers in front of names count the classes and say nothing about them.

    They do if each name has one and a word after it, all differ, and all are written alike. After a
    hyphen, which also makes words ("2-door sedan"), they must count up without a gap or have
    leading zeros.
    """
    found = [match for name in names if (match := _INDEX.match(name))]
    numbers = sorted({int(match["number"]) for match in found})
    if len(names) < 2 or len(found) < len(names) or len(numbers) < len(names):
        return False
    separators = {match["separator"] for match in found}
    is_counting = numbers[0] in (0, 1) and numbers[-1] - numbers[0] == len(numbers) - 1
    is_padded = any(match["number"].startswith("0") and int(match["number"]) for match in found)
    words = {_tokens(default_words(name, has_index=True)) for name in names}
    return (
        len(separators) == 1
        and (separators != {"-"} or is_counting or is_padded)
        and len(words) == len(names)
    )


def spelling(name: str) -> str:
    """The spelling that copies of a data set share, whatever their case and spaces."""
    return re.sub(r"[\W_]+", " ", class_name(name)).strip().lower()


def _tokens(words: str) -> str:
    """The tokens that tell words apart for a model, which ignores case and the kind of space."""
    return " ".join(class_name(words).lower().split())


def class_words(
    names: Sequence[str], given: Mapping[str, str] | str | Path | None = None
) -> tuple[dict[str, str], str]:
    """The words of each class, and a note on where they come from.

    Args:
        names: The classes' names: those of folders, or labels of a list.
        given: The words: a mapping from name to words, a JSON or CSV file that holds one, or one of
            ``KNOWN_SETS``; or "raw" for ``raw_words``. ``None``: those of the known set that has
            all the names, and without such a set ``default_words``.

    Returns:
        Name -> words, and a line for the user where words were guessed or are raw, else "".

    Raises:
        FewShotError: A class has no words, or the same words as another.
    """
    if given is None:
        known = known_name(names)
        if known is None:
            return _default_words(names)
        note = f"class names are those of {known}: {_examples(_known(known, names))}"
        return _checked(_known(known, names)), note
    if given == RAW:
        _require_utf8(names)
        words = _checked({name: raw_words(name) for name in names})
        return words, f"class names are raw: {_examples(words)}"
    if isinstance(given, str) and given in KNOWN_SETS:
        # The set's own names stand beside those found, for the hint at a name that is not known.
        given = {**known_set(given).words, **_known(given, names)}
    elif not isinstance(given, Mapping):
        given = read_class_names(given)
    given = _in_one_form(given)
    words = {}
    # Names that are not there are fine: one map may serve several subsets.
    for name in names:
        key = shown_name(class_name(name))
        if key not in given:
            close = get_close_matches(key, given, n=1)
            hint = f" (it has {close[0]!r})" if close else ""
            raise FewShotError(f"{_CLASS_NAMES}: no words for class '{key}'{hint}; add them")
        words[name] = given[key]
    return _checked(words), ""


def raw_words(name: str) -> str:
    """A class's name as published programs put it into prompts: a space for each underscore.

    ``AnnualCrop`` stays so; ``Apple___Apple_scab`` -> "Apple Apple scab", since CLIP's tokenizer
    makes one space of several.
    """
    return " ".join(name.replace("_", " ").split()) or name


def _require_utf8(names: Sequence[str]) -> None:
    for name in names:
        if shown_name(name) != name:
            raise FewShotError(
                f"the name of class '{shown_name(name)}' is not UTF-8, so it gives no words for "
                "prompts; rename it, or give words for all classes with "
                f"{setting('class_names', 'FILE')}"
            )


def _default_words(names: Sequence[str]) -> tuple[dict[str, str], str]:
    """Words that come from the names alone, and what may not be as it was meant."""
    _require_utf8(names)
    has_index = _have_indices(names)
    words = _checked({name: default_words(name, has_index=has_index) for name in names})
    if all(re.fullmatch(r"n\d{8}|\d+([.,]\d*)?", name) for name in names):
        return words, (
            f"the classes' names are numbers such as {names[0]}, which say nothing in a prompt; "
            f"give them words with {setting('class_names', 'FILE')}"
        )
    changed = {name: text for name, text in words.items() if _without_id(name, has_index) != name}
    note = f"class names are without the numbers in front: {_examples(changed, limit=6)}"
    return words, note if changed else ""


def _in_one_form(given: Mapping[str, str]) -> dict[str, str]:
    """A map whose names are in the form in which classes are looked up."""
    words: dict[str, str] = {}
    for name, text in given.items():
        key = shown_name(class_name(name))
        if words.setdefault(key, text) != text:
            raise FewShotError(
                f"{_CLASS_NAMES}: {key!r} is there twice, in different forms of Unicode; keep one"
            )
    return words


def known_name(names: Sequence[str]) -> str | None:
    """The first of the known data sets that has all of these classes, if there is one."""
    return next((key for key in KNOWN_SETS if len(_known(key, names)) == len(names)), None)


def _known(key: str, names: Iterable[str]) -> dict[str, str]:
    spellings = {spelling(name): words for name, words in known_set(key).words.items()}
    return {name: spellings[spelling(name)] for name in names if spelling(name) in spellings}


def published_note(place: str, counts: Mapping[str, int], given: object) -> str:
    """A note where data that is taken for a known set has other numbers of images than published.

    Args:
        place: The data, for the note.
        counts: Class -> number of its images.
        given: As for ``class_words``; where the user gave words of their own, the data is taken for
            no set.
    """
    name = known_name(list(counts)) if given in (None, RAW) else given
    if not isinstance(name, str) or name not in KNOWN_SETS:
        return ""
    known, total = known_set(name), sum(counts.values())
    found = {spelling(each): count for each, count in counts.items() if count}
    of_task = {spelling(each) for each in known.class_images}
    if not found.keys() <= of_task:  # another task on the same images
        return ""
    missing = [each for each in known.class_images if spelling(each) not in found]
    differing = [
        f"{each} {found[spelling(each)]:,} of {published:,}"
        for each, published in known.class_images.items()
        if found.get(spelling(each), published) != published
    ]
    if not known.images or not (total != known.images or missing or differing):
        return ""
    title = known.title or name
    note = f"{place} has {total:,} images, {title} as published {known.images:,}"
    if missing:
        note += f"; without its classes {_some(missing)} ({len(missing)} of {len(of_task)})"
    return note + (f"; by class: {_some(differing)}" if differing else "")


def _some(texts: Sequence[str], limit: int = 4) -> str:
    return ", ".join(texts[:limit]) + (", ..." if len(texts) > limit else "")


def _examples(words: Mapping[str, str], limit: int = 2) -> str:
    shown = [f"{name} is {text!r}" for name, text in words.items()][:limit]
    return ", ".join(shown) + (f", ... ({len(words)} in all)" if len(words) > limit else "")


def _checked(words: dict[str, str]) -> dict[str, str]:
    """The words, if they can stand in prompts and each class has its own."""
    owner: dict[str, str] = {}
    for name, text in words.items():
        if not isinstance(text, str) or not text.strip() or shown_name(text) != text:
            raise FewShotError(
                f"class '{shown_name(name)}' has no words that a prompt can hold; give it some "
                f"with {setting('class_names', 'FILE')}"
            )
        other = owner.setdefault(_tokens(text), name)
        if other != name:
            raise FewShotError(
                f"classes {other!r} and {name!r} have the same words {text!r}, so no prompt "
                "can tell them apart; give them different words with "
                f"{setting('class_names', 'FILE')}"
            )
    return words


def read_class_names(path: str | Path) -> dict[str, str]:
    """Read a class-name map: JSON (an object) or CSV (two columns), from folder name to words.

    A CSV file may be one of semicolons or tabs, and start with a header line whose first cell is
    ``folder``.

    Raises:
        FewShotError: The file can't be read or is not such a map.
    """
    try:
        path = expand_user(path)
    except OSError as error:
        raise FewShotError(f"{_CLASS_NAMES}: {first_line(error)}; pass a whole path") from error
    ending = path.suffix.lower()
    if ending not in (".json", ".csv", ".tsv"):
        raise FewShotError(
            f"{_CLASS_NAMES}: {path} must end in .json or .csv, or be {RAW} or one of "
            f"{', '.join(KNOWN_SETS)}"
        )
    text = read_document(path, "class_names", at_most=NAMES_BYTES)
    if ending == ".json":
        names = parse_json(path, text, "class_names")
        if not isinstance(names, dict):
            raise FewShotError(f'{_CLASS_NAMES}: {path} must hold an object {{"folder": "words"}}')
    else:
        names = _read_table(path, text)
    for folder, words in names.items():
        if not isinstance(words, str) or not words.strip():
            raise FewShotError(f"{_CLASS_NAMES}: {path} has no words for {folder!r}; add them")
    return {folder: words.strip() for folder, words in names.items()}


def _read_table(path: Path, text: str) -> dict[str, str]:
    rows = parse_rows(path, text, "class_names", find_delimiter(text))
    names: dict[str, str] = {}
    for number, (line, cells) in enumerate(rows):
        if number == 0 and cells[0].lower() == "folder":
            continue
        if len(cells) != 2:
            raise FewShotError(
                f"{_CLASS_NAMES}: line {line} of {path} has {len(cells)} columns, not "
                "the 2 of 'folder,words'; put words that contain a comma in double quotes"
            )
        if cells[0] in names:
            raise FewShotError(
                f"{_CLASS_NAMES}: line {line} of {path} names {cells[0]!r} again; "
                "keep one line per folder"
            )
        names[cells[0]] = cells[1]
    return names
