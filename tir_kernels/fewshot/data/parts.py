"""Fixed splits: support comes from one part of a data set, queries from another."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set

from tir_kernels.errors import FewShotError

_TRAIN = re.compile(r"train(ing)?|trn")
# The likelier first: where there is a part for tests, the one for validation is left out.
_QUERIES = (
    re.compile(r"test(ing)?|tst"),
    re.compile(r"val(id(ation)?)?|dev|eval(uation)?"),
)


def choose_parts(parts: Mapping[str, Sequence[str]]) -> tuple[str, str] | None:
    """The part for support and the part for queries, where there are two with the same classes.

    Args:
        parts: Name of each part -> the names of its classes.
    """
    train = [name for name in parts if _is_called(name, _TRAIN)]
    if len(train) != 1:
        return None
    for pattern in _QUERIES:
        found = [name for name in parts if name not in train and _is_called(name, pattern)]
        if len(found) == 1 and set(parts[found[0]]) == set(parts[train[0]]):
            return train[0], found[0]
        if found:
            return None
    return None


def _is_called(name: str, pattern: re.Pattern[str]) -> bool:
    words = re.findall(r"[^\W\d_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())
    return any(pattern.fullmatch(re.sub(r"(set|data)$", "", word)) for word in words)


def parts_note(where: object, train: str, queries: str, others: Sequence[str]) -> str:
    """A note on what the parts of a data set serve for."""
    note = f"{where}: support images come from {train}, queries from {queries}"
    return note + (f"; left out: {', '.join(others)}" if others else "")


def require_same_classes(
    setting_name: str, train: str, train_classes: Set[str], test: str, test_classes: Set[str]
) -> None:
    """Check that two parts have the same classes.

    Args:
        setting_name: Marked name of the setting that the message starts with.
        train, test: The parts, for the message.
        train_classes, test_classes: Their classes.

    Raises:
        FewShotError: They differ.
    """
    differing = [
        f"{_some(sorted(own - other))} only in {name}"
        for name, own, other in (
            (train, train_classes, test_classes),
            (test, test_classes, train_classes),
        )
        if own - other
    ]
    if differing:
        raise FewShotError(
            f"{setting_name}: the classes of {train} and {test} differ: {'; '.join(differing)}; "
            "rename or remove those"
        )


def _some(names: Sequence[str], limit: int = 4) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(repr, names[:limit])) + more
