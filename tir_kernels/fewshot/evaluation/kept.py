"""Logits that are kept as they are made, so that another process goes on where one was stopped.

``logits.jsonl`` begins with a line that says what the logits are of; each other line holds one
image's name, size and time, the digest of its pixels, and its logits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tir_kernels.errors import FewShotError, first_line
from tir_kernels.fewshot.changes import changes
from tir_kernels.fewshot.data.protocol import Stamp
from tir_kernels.fewshot.run.appended import AppendedLines, read_from, whole_lines
from tir_kernels.fewshot.run.folder import LOCK_NAME, expanded_out
from tir_kernels.fewshot.run.lock import RunLock
from tir_kernels.fewshot.run.workers import Place
from tir_kernels.fewshot.strict_json import decode_json, encode_json
from tir_kernels.text import setting

LOGITS_NAME = "logits.jsonl"
_FORMAT = 1
_OUT = setting("out")


class Answer(NamedTuple):
    """The answer for one image.

    Attributes:
        stamp: Size and time of the image.
        digest: Digest of its pixels as the model sees them.
        logits: (C,) float32.
    """

    stamp: Stamp
    digest: str
    logits: NDArray[np.float32]


class KeptLogits:
    """The folder of an evaluation, held by one process.

    Args:
        out: The folder; it is made if it is missing. ``None``: answers are kept in memory alone.
        settings: All that decides the logits besides the images.
        classes: C.

    Attributes:
        folder: The folder.
        answers: Image -> its answer.

    Raises:
        FewShotError: The folder can't be written, another process is in it, it holds other things
            or an evaluation with other settings, or is damaged.
    """

    def __init__(self, out: str | Path | None, settings: Mapping[str, Any], classes: int) -> None:
        self.answers: dict[str, Answer] = {}
        self.folder = None if out is None else expanded_out(out)
        self._lines: AppendedLines | None = None
        if self.folder is None:
            return
        _require_own(self.folder)
        place = Place.of_this_process()
        if place.count > 1:
            raise FewShotError("an evaluation is one process; start it without torchrun")
        self._lock = RunLock(self.folder / LOCK_NAME, place)
        try:
            path = self.folder / LOGITS_NAME
            lines = whole_lines(read_from(path)).splitlines() if path.exists() else []
            if lines:
                _require_same(path, lines[0], settings)
            for number, line in enumerate(lines[1:], start=2):
                image, answer = _decoded(path, number, line, classes)
                self.answers[image] = answer
            self._lines = AppendedLines(path)
            if not lines:
                self._lines.append(_line({"evaluation": _FORMAT, "settings": dict(settings)}))
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> KeptLogits:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._lines is not None:
            self._lines.close()
            self._lock.close()

    def keep(self, answers: Iterable[tuple[str, Answer]]) -> None:
        """Keep answers; when this returns, they are on the disk."""
        some = dict(answers)
        self.answers |= some
        if self._lines is not None and some:
            self._lines.append(b"".join(_encoded(*each) for each in some.items()))


def _require_own(folder: Path) -> None:
    """Refuse to mix an evaluation with what is in a folder of something else."""
    try:
        if not folder.exists() or (folder / LOGITS_NAME).exists():
            return
        others = sorted(each.name for each in folder.iterdir() if not each.name.startswith("."))
    except OSError as error:
        raise FewShotError(f"{_OUT}: can't read {folder}: {first_line(error)}") from error
    if others:
        raise FewShotError(
            f"{_OUT}: {folder} holds other things ({', '.join(others[:3])}); choose an empty "
            "folder, or one that does not exist"
        )


def _require_same(path: Path, line: bytes, settings: Mapping[str, Any]) -> None:
    try:
        content = decode_json(line)
        if content["evaluation"] != _FORMAT:
            raise ValueError(f"it has format {content['evaluation']!r}, not {_FORMAT}")
        old = dict(content["settings"])
    except (ValueError, KeyError, TypeError) as error:
        raise FewShotError(
            f"{_OUT}: {path} is not of an evaluation, or damaged ({first_line(error)}); choose "
            "another folder"
        ) from error
    found = changes(old, settings, named=_spelled)
    if found:
        raise FewShotError(
            f"{_OUT}: {path.parent} holds another evaluation: {found}; choose another folder"
        )


def _spelled(name: str) -> str:
    return "the classifier" if name == "classifier" else setting(name)


def _line(content: Mapping[str, Any]) -> bytes:
    return encode_json(content) + b"\n"


def _encoded(image: str, answer: Answer) -> bytes:
    # The shortest decimals that give each float32 again.
    logits = [float(str(each)) for each in answer.logits]
    return _line(
        {
            "image": image,
            "stamp": answer.stamp,
            "digest": answer.digest,
            "logits": logits,
        }
    )


def _decoded(path: Path, number: int, line: bytes, classes: int) -> tuple[str, Answer]:
    try:
        content = decode_json(line)
        size, time = map(int, content["stamp"])
        logits = np.array(content["logits"], dtype=np.float32)
        if logits.shape != (classes,):
            raise ValueError(f"it has {logits.size} logits, not {classes}")
        return str(content["image"]), Answer((size, time), str(content["digest"]), logits)
    except (ValueError, KeyError, TypeError) as error:
        raise FewShotError(
            f"line {number} of {path} is damaged ({first_line(error)}); delete the file, and give "
            "the same command again"
        ) from error
