"""A finished episode as a line of a journal: and what may stand in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields

from tir_kernels.fewshot.strict_json import decode_json, encode_json

OK = "ok"


@dataclass(frozen=True)
class Record:
    """One finished (episode, arm): a line of the journal.

    Args:
        episode: The episode's number.
        arm: The arm's name.
        classes: Folder names of the episode's classes.
        correct: Queries answered correctly; ``None`` unless the status is "ok".
        total: Queries.
        accuracy: ``correct / total``; ``None`` unless the status is "ok".
        final_loss: Loss of the last step; ``None`` without one, or if it was not finite.
        seconds: Time of training and evaluation.
        status: "ok", or why there is no result.
        seconds_per_step: Of training alone; ``None`` without training.
        support_accuracy: On the support images, after training.
        skipped: Unreadable images that others replaced.
    """

    episode: int
    arm: str
    classes: tuple[str, ...]
    correct: int | None
    total: int
    accuracy: float | None
    final_loss: float | None
    seconds: float
    status: str
    seconds_per_step: float | None = None
    support_accuracy: float | None = None
    skipped: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[int, str]:
        """The key of a record, which a journal holds at most once."""
        return self.episode, self.arm

    def to_line(self) -> bytes:
        """The record as a line of JSON."""
        return encode_json(asdict(self)) + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> Record:
        """Parse a line. Keys that are not known are ignored.

        Raises:
            ValueError: The line is not a record, or its values contradict each other; the text says
                why.
        """
        values = decode_json(line)
        if not isinstance(values, dict):
            raise ValueError("not a JSON object")
        if "arm" not in values and "method" in values:  # in journals from before there were arms
            values = {**values, "arm": values["method"]}
        for name, is_fitting in _SCHEMA.items():
            if name not in values:
                if name in _OPTIONAL:
                    continue
                raise ValueError(f"no {name!r}")
            if not is_fitting(values[name]):
                raise ValueError(f"{name!r} is {_shortened(values[name])}")
        known = {name: values[name] for name in _SCHEMA if name in values}
        for name in ("classes", "skipped"):
            known[name] = tuple(known.get(name, ()))
        record = cls(**known)
        record._require_consistent()
        return record

    def _require_consistent(self) -> None:
        if len(set(self.classes)) < len(self.classes):
            raise ValueError("a class is there twice")
        if self.status != OK:
            if self.correct is not None or self.accuracy is not None:
                raise ValueError(f"a result beside the status {_shortened(self.status)}")
            return
        if self.correct is None or self.accuracy is None:
            raise ValueError("status 'ok' without a result")
        if self.correct > self.total or self.total == 0:
            raise ValueError(f"'correct' is {self.correct} of {self.total}")
        if not math.isclose(self.accuracy, self.correct / self.total, abs_tol=1e-6):
            raise ValueError(f"'accuracy' is {self.accuracy}, but {self.correct} of {self.total}")


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _is_count(value: object) -> bool:
    # What is larger was not counted, and can't be converted to a floating point number.
    return type(value) is int and 0 <= value < 2**53


def _is_finite(value: object) -> bool:
    if type(value) is int:
        return _is_count(abs(value))
    return type(value) is float and math.isfinite(value)


def _is_duration(value: object) -> bool:
    return _is_finite(value) and value >= 0  # type: ignore[operator]


def _is_share(value: object) -> bool:
    return _is_finite(value) and 0 <= value <= 1  # type: ignore[operator]


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_name, value))


def _or_none(is_fitting: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or is_fitting(value)


_SCHEMA: dict[str, Callable[[object], bool]] = {
    "episode": _is_count,
    "arm": _is_name,
    "classes": _are_names,
    "correct": _or_none(_is_count),
    "total": _is_count,
    "accuracy": _or_none(_is_share),
    "final_loss": _or_none(_is_finite),
    "seconds": _is_duration,
    "status": _is_name,
    "seconds_per_step": _or_none(_is_duration),
    "support_accuracy": _or_none(_is_share),
    "skipped": _are_names,
}
_OPTIONAL = {"seconds_per_step", "support_accuracy", "skipped"}
assert set(_SCHEMA) == {field.name for field in fields(Record)}


@dataclass(frozen=True)
class RunShape:
    """The sizes that all records of a run have in common; ``None`` where one is not known.

    Args:
        episodes: Episodes of the run.
        arms: Names of its arms.
        ways: Classes of each episode.
        queries: Query images per class.
    """

    episodes: int
    arms: tuple[str, ...] | None = None
    ways: int | None = None
    queries: int | None = None

    def contradiction(self, record: Record) -> str:
        """The part of a record that can't be of this run, or nothing."""
        if record.episode >= self.episodes:
            return f"'episode' is {record.episode} in a run of {self.episodes}"
        if self.arms is not None and record.arm not in self.arms:
            return f"'arm' is {_shortened(record.arm)} in a run of {', '.join(self.arms)}"
        if self.ways is not None and len(record.classes) != self.ways:
            return f"'classes' are {len(record.classes)} in a run of {self.ways} ways"
        if self.ways is not None and self.queries is not None:
            total = self.ways * self.queries
            if record.total != total:
                return f"'total' is {record.total} in a run of {total} queries an episode"
        return ""


def skipped_images(records: Sequence[Record]) -> list[str]:
    """All unreadable images that the records name, sorted."""
    return sorted({name for record in records for name in record.skipped})
