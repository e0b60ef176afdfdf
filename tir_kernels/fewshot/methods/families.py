"""Families of methods: what one was given, as a letter that every table of methods shows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple


class Family(NamedTuple):
    """A kind of method.

    Attributes:
        label: Letter in tables.
        meaning: What a method of it has seen or done here.
        published: The same of a number quoted from a paper; empty: as here.
    """

    label: str
    meaning: str
    published: str = ""


# Name -> family. None that runs here is transductive: a learner classifies each image by itself.
FAMILIES = {
    "frozen features": Family("F", "frozen features only"),
    "tuned towers": Family("T", "trained on the support images, through the towers"),
    "inference only": Family("I", "inference only, nothing is trained"),
    "source-trained": Family(
        "S",
        "source-trained in its paper, adapted to the target's support images alone here",
        "trained on a labelled source data set",
    ),
    "transductive": Family("Q", "transductive, uses the query images without their labels"),
}

UNTUNED = ("F", "I")  # the towers' weights stay as they are
NO_LABEL = "?"  # in place of a letter: of a method that this program does not know


class Described:
    """What every method says of itself.

    Raises:
        TypeError: A subclass is of no family, or of one that is not known.
    """

    name: ClassVar[str]  # in the registry
    source: ClassVar[str]  # where it was published
    family: ClassVar[str]  # a key of FAMILIES
    shown_fields: ClassVar[tuple[str, ...]] = ()  # options that tables show behind an arm's name

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        family = getattr(cls, "family", None)
        # The base of all methods has no name.
        if hasattr(cls, "name") and family not in FAMILIES:
            raise TypeError(
                f"{cls.__name__}.family must be one of {', '.join(FAMILIES)}; got {family!r}"
            )


def label_of(method: type[Described]) -> str:
    """The letter of a method's family."""
    return FAMILIES[method.family].label


def legend(labels: Iterable[str], *, are_published: bool = False) -> str:
    """The meaning of each letter of ``labels``, in the order of ``FAMILIES``; empty for none.

    Args:
        labels: Letters.
        are_published: Whether they stand beside numbers that are quoted from papers.
    """
    own = set(labels)
    parts = [
        f"{each.label}: {(are_published and each.published) or each.meaning}"
        for each in FAMILIES.values()
        if each.label in own
    ]
    parts += [f"{NO_LABEL}: a method that is not known here"] if NO_LABEL in own else []
    return f"{'; '.join(parts)}." if parts else ""
