"""What a fit has done, in the folder of its classifier: ``.fit``, held by one process.

``settings.json`` says what the fit is, ``parts.json`` what its finished trainings found, and
``state.pt`` how far the one under way has come. Each is written whole or not at all.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from tir_kernels.errors import FewShotError, first_line
from tir_kernels.fewshot.classifier.folder import ABOUT_FILE, FIT_FOLDER, require_own
from tir_kernels.fewshot.run.folder import (
    SETTINGS_NAME,
    RunFolder,
    expanded_out,
    write_json,
    write_whole,
)
from tir_kernels.fewshot.run.workers import Place
from tir_kernels.fewshot.strict_json import decode_json
from tir_kernels.files import MIB, open_regular, read_bytes
from tir_kernels.text import setting

PARTS_FILE = "parts.json"
STATE_FILE = "state.pt"

_OUT = setting("out")
_SECONDS_BETWEEN_STATES = 20.0
_MOST_PARTS_BYTES = 64 * MIB
_SUPPORT = "support"


class FitFolder:
    """A classifier's folder while its fit goes on.

    Args:
        path: The classifier's folder; it is created if missing.
        place: This process.

    Attributes:
        path: The classifier's folder.
        kept: What the fit keeps, inside of it.

    Raises:
        FewShotError: It can't be created or locked, another process is in it, or it holds other
            things than a classifier of ``fit``.
    """

    def __init__(self, path: str | Path, place: Place | None = None) -> None:
        self.path = expanded_out(path)
        self.kept = self.path / FIT_FOLDER
        try:
            if self.path.is_dir():
                require_own(self.path)
        except OSError as error:
            raise FewShotError(f"{_OUT}: can't read {self.path}: {first_line(error)}") from error
        if self.is_finished and not (self.kept / SETTINGS_NAME).exists():
            raise FewShotError(
                f"{_OUT}: {self.path} holds a classifier, and not what its fit needs to go on; "
                "choose another folder"
            )
        self._run = RunFolder(self.kept, place, kind="fit")
        # Of a process that was killed; in a finished classifier's folder others may write too.
        folders = [self.kept] if self.is_finished else [self.kept, self.path]
        for partial in (each for folder in folders for each in folder.glob(".*.partial")):
            with contextlib.suppress(OSError):
                partial.unlink()

    def __enter__(self) -> FitFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        self._run.__exit__(*exception)

    @property
    def as_run(self) -> RunFolder:
        """``kept`` as the folder of a run of one episode: the training on all images."""
        return self._run

    @property
    def is_finished(self) -> bool:
        """Whether the classifier is there."""
        return (self.path / ABOUT_FILE).exists()

    def claim(self, settings: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        """Record what the fit is, or check that it is still the same; see ``RunFolder.claim``."""
        self._run.claim(settings, 1, about)

    def keeper(
        self, support: str, seen: Callable[[], Any], see_again: Callable[[Any], None]
    ) -> FitKeeper:
        """The keeper of the trainings.

        Args:
            support: Digest of the images that are trained on.
            seen: Gives what observers have seen, to be kept with the state of the last training.
            see_again: Takes it when that goes on.

        Raises:
            FewShotError: The images are others than when the fit began.
        """
        return FitKeeper(self.kept, support, seen, see_again)

    def finish(self) -> None:
        """Remove the state of the last training, once the classifier is there."""
        with contextlib.suppress(OSError):
            (self.kept / STATE_FILE).unlink(missing_ok=True)


class FitKeeper:
    """Keeps what a fit has done, as a ``fitting.Keeper``; made by ``FitFolder.keeper``."""

    def __init__(
        self,
        folder: Path,
        support: str,
        seen: Callable[[], Any],
        see_again: Callable[[Any], None],
    ) -> None:
        self._folder = folder
        self._seen, self._see_again = seen, see_again
        self._parts = _read_parts(folder / PARTS_FILE)
        if self._parts.setdefault(_SUPPORT, support) != support:
            raise FewShotError(
                f"{_OUT}: the images that can be read are others than when the fit in {folder} "
                "began; restore them to continue it, or choose another folder"
            )
        if len(self._parts) == 1:
            self._write()

    def training(self, part: str) -> _KeptTraining:
        """The keeper of one of the trainings."""
        return _KeptTraining(self._folder / STATE_FILE, part, self._seen, self._see_again)

    def known(self, part: str) -> dict[str, Any] | None:
        """What was found by a part that is finished."""
        return self._parts.get(part)

    def finish(self, part: str, found: dict[str, Any]) -> None:
        """Keep what a part found."""
        self._parts[part] = found
        self._write()

    def _write(self) -> None:
        with room_asked_for():
            write_json(self._folder / PARTS_FILE, self._parts)


class _KeptTraining:
    """The state of a training in a file, which is that of the training under way."""

    def __init__(
        self, path: Path, part: str, seen: Callable[[], Any], see_again: Callable[[Any], None]
    ) -> None:
        self._path, self._part = path, part
        self._seen, self._see_again = seen, see_again
        self._last = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """The state that was kept last; ``None`` where it is of another training."""
        if not self._path.exists():
            return None
        try:
            with open_regular(self._path) as file:
                content = torch.load(file, map_location="cpu", weights_only=True)
            if content["part"] != self._part:
                return None
            self._see_again(content["seen"])
            state: dict[str, Any] = content["state"]
        except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError,
                ValueError) as error:  # fmt: skip
            raise FewShotError(
                f"{self._path} is damaged ({first_line(error)}); delete it, and this training "
                "begins anew"
            ) from error
        return state

    def is_due(self) -> bool:
        """Whether the state is to be kept now."""
        return time.monotonic() - self._last >= _SECONDS_BETWEEN_STATES

    def keep(self, state: dict[str, Any]) -> None:
        """Keep a state in place of the one before."""
        content = io.BytesIO()
        torch.save({"part": self._part, "state": state, "seen": self._seen()}, content)
        with room_asked_for():
            write_whole(self._path, content.getvalue())
        self._last = time.monotonic()


@contextlib.contextmanager
def room_asked_for() -> Iterator[None]:
    """Say what to do about a file that can't be written."""
    try:
        yield
    except FewShotError as error:
        raise FewShotError(
            f"{first_line(error)}; what is finished is kept: make room and give the same command "
            "again"
        ) from error


def _read_parts(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        parts = decode_json(read_bytes(path, at_most=_MOST_PARTS_BYTES))
        if not isinstance(parts, dict):
            raise ValueError("it is no object")
    except (OSError, ValueError) as error:
        raise FewShotError(
            f"{path} is damaged ({first_line(error)}); delete it, and the held-out trainings are "
            "carried out anew"
        ) from error
    return parts
