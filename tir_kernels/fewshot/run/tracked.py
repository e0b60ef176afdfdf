"""Measures of a training as they change from step to step: one file beside each journal.

A line holds all that was seen of one (episode, arm). It is on the disk before the journal's record
of it is, and counts from then on: of a training that was killed no number is left, and where it is
run again its new line takes the place of the old one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tir_kernels.errors import FewShotError, first_line
from tir_kernels.fewshot.run.appended import AppendedLines
from tir_kernels.fewshot.run.folder import read_journals, tracked_name
from tir_kernels.fewshot.run.journal import JournalReader
from tir_kernels.fewshot.run.records import Record
from tir_kernels.fewshot.strict_json import decode_json, encode_json
from tir_kernels.files import open_regular

Number = float | None  # None: none found
Block = int | None  # None: of the whole tower

_DIGITS = 6  # that count of a number: float32 has hardly more


class Tracked(NamedTuple):
    """One number of a training, in long form.

    Attributes:
        episode: Number of the episode.
        arm: Name of the arm.
        step: Steps taken before it was read.
        block: Number of the block, from 0; ``None``: of the whole tower.
        measure: Name of the measure in its registry.
        name: Quantity.
        value: Mean over the support images; ``None``: the measure found none in any.
        chance: Its chance level, as the measure says; ``None``: it has none.
    """

    episode: int
    arm: str
    step: int
    block: Block
    measure: str
    name: str
    value: Number
    chance: Number


class Series(NamedTuple):
    """One quantity, at all steps and in all blocks that it was read at.

    Attributes:
        measure, name: As of ``Tracked``.
        blocks: Its blocks.
        chance: Chance level in each block: one list of all steps, or one for each.
        values: For each step its value in each block.
    """

    measure: str
    name: str
    blocks: list[Block]
    chance: list[list[Number]]
    values: list[list[Number]]


class Track(NamedTuple):
    """All that was read of one (episode, arm).

    Attributes:
        episode, arm: Which one.
        steps: Steps taken before each reading.
        series: Its quantities.
    """

    episode: int
    arm: str
    steps: list[int]
    series: list[Series]

    def rows(self) -> Iterator[Tracked]:
        """Its numbers one by one."""
        for own in self.series:
            chances = own.chance * (len(self.steps) if len(own.chance) == 1 else 1)
            for step, values, levels in zip(self.steps, own.values, chances, strict=True):
                for block, value, chance in zip(own.blocks, values, levels, strict=True):
                    yield Tracked(
                        self.episode, self.arm, step, block, own.measure, own.name, value, chance
                    )

    def to_line(self) -> bytes:
        """The track as a line of JSON, with numbers of six digits."""
        series = [
            own._replace(
                chance=[[_short(chance) for chance in levels] for levels in own.chance],
                values=[[_short(value) for value in values] for values in own.values],
            )._asdict()
            for own in self.series
        ]
        content = self._replace(series=series)._asdict()  # type: ignore[arg-type]
        return encode_json(content, separators=(",", ":")) + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> Track:
        """Parse a line.

        Raises:
            ValueError: The line is not a track; the text says why.
        """
        values = decode_json(line)
        try:
            series = [Series(**own) for own in values["series"]]
            track = cls(values["episode"], values["arm"], values["steps"], series)
            if not track._is_fitting():
                raise ValueError("its parts do not fit each other")
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a track ({type(error).__name__}: {error})") from error
        return track

    def _is_fitting(self) -> bool:
        def are(kinds: Any, values: list) -> bool:
            return all(type(value) in kinds for value in values)

        number, whole = (int, float, type(None)), (int, type(None))
        return (
            are((int,), [self.episode, *self.steps])
            and are((str,), [self.arm])
            and all(
                are((str,), [own.measure, own.name])
                and len(own.values) == len(self.steps)
                and len(own.chance) in (1, len(self.steps))
                and are(whole, own.blocks)
                and all(
                    len(values) == len(own.blocks) and are(number, values)
                    for values in (*own.chance, *own.values)
                )
                for own in self.series
            )
        )


def _short(value: Number) -> Number:
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{_DIGITS}g}")


class TrackFile:
    """The file of tracks beside a journal, which the journal's process alone appends to.

    Args:
        journal: Path of the journal.

    Raises:
        FewShotError: It can't be read or written.
    """

    def __init__(self, journal: Path) -> None:
        self._lines = AppendedLines(tracked_beside(journal))

    def append(self, track: Track) -> None:
        """Write a track; when this returns, it is on the disk.

        Raises:
            FewShotError: It can't be written, or another program touched the file.
        """
        self._lines.append(track.to_line())

    def close(self) -> None:
        """Close the file."""
        self._lines.close()


def tracked_beside(journal: Path) -> Path:
    """The path of the tracks that belong to a journal: ``tracked.2.jsonl`` of the second's."""
    return journal.with_name(tracked_name(journal.name))


def read_tracks(folder: str | Path) -> Iterator[Track]:
    """The tracks of a run, by episode and in the order of its arms; none of one without.

    They can be read while the run goes on.

    Args:
        folder: The run's folder.

    Raises:
        FewShotError: A file can't be read or is damaged.
    """
    yield from tracks_of(*read_journals(folder))


def tracks_of(records: Iterable[Record], journals: JournalReader) -> Iterator[Track]:
    """The tracks of records that were read, one in memory at a time.

    Args:
        records: Records, in the order in which their tracks are wanted.
        journals: The reader that gave them.

    Raises:
        FewShotError: A file can't be read or is damaged.
    """
    places: dict[Path, dict[tuple[int, str], _Place]] = {}
    for record in records:
        # A process that was killed may have left a line in a file whose journal has no record.
        path = tracked_beside(journals.path_of(record.key))
        if path not in places:
            places[path] = _places(path) if path.exists() else {}
        place = places[path].get(record.key)
        if place is not None:
            yield _track_at(path, place)


def read_tracked(folder: str | Path) -> list[Tracked]:
    """All numbers of the tracks of a run in long form, see ``read_tracks``."""
    return [row for track in read_tracks(folder) for row in track.rows()]


class _Place(NamedTuple):
    """Where a line stands in a file."""

    number: int
    start: int


def _places(path: Path) -> dict[tuple[int, str], _Place]:
    """Where the line of each track stands; of one that was run again, the last, which counts.

    All lines are looked at, so that a damaged one is told of before any is used.
    """
    found = {}
    start = 0
    try:
        with open_regular(path) as file:
            for number, line in enumerate(file, start=1):
                if line.endswith(b"\n"):
                    track = _parsed(path, number, line)
                    found[track.episode, track.arm] = _Place(number, start)
                start += len(line)
    except OSError as error:
        raise FewShotError(f"can't read {path}: {first_line(error)}") from error
    return found


def _track_at(path: Path, place: _Place) -> Track:
    try:
        with open_regular(path) as file:
            file.seek(place.start)
            return _parsed(path, place.number, file.readline())
    except OSError as error:
        raise FewShotError(f"can't read {path}: {first_line(error)}") from error


def _parsed(path: Path, number: int, line: bytes) -> Track:
    try:
        return Track.from_line(line)
    except ValueError as error:
        raise FewShotError(
            f"line {number} of {path} is damaged ({first_line(error)}); delete that line, and "
            "the run has no measures of its episode"
        ) from error
