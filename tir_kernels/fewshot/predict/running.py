"""A prediction from its options to its last line: checks, the loop, and what is told."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from tir_kernels.errors import FewShotError, first_line
from tir_kernels.fewshot.classifier.classifier import Classifier
from tir_kernels.fewshot.classifier.folder import ABOUT_FILE, load_classifier
from tir_kernels.fewshot.data.decoding import Decoding
from tir_kernels.fewshot.devices import is_slow_at, resolve_device
from tir_kernels.fewshot.predict.loop import Outcome, Predictor
from tir_kernels.fewshot.predict.output import Files, Output, Printed, out_path
from tir_kernels.fewshot.predict.rows import Columns
from tir_kernels.fewshot.predict.sources import IMAGES, Sources
from tir_kernels.fewshot.run.folder import expanded_out
from tir_kernels.fewshot.run.progress import Messages
from tir_kernels.fewshot.run.workers import Place
from tir_kernels.fewshot.run_options import settings_named
from tir_kernels.fewshot.settings import Runtime
from tir_kernels.files import MIB, read_bytes
from tir_kernels.text import Notice, setting

_LINE_SECONDS = 30


@dataclass(frozen=True)
class Request:
    """The options of a prediction.

    Args:
        classifier: Folder of the classifier.
        images: What to classify, see ``Sources``.
        out: File to write; ``None`` or "-": standard output.
        top, probabilities: As for ``Columns``.
        batch_size: Images that are classified at once.
        precision: Type of products; ``None``: the classifier's.
        device, backend: As for ``Runtime``; "auto" takes a GPU that is there.
        model, pretrained: Base model, see ``load_classifier``.
        max_pixels, white_value: As for ``Decoding``.
        report: Whether a page is written.
    """

    classifier: str
    images: tuple[str, ...]
    out: str | None
    top: int
    probabilities: bool
    batch_size: int
    precision: str | None
    device: str
    backend: str
    model: str | None
    pretrained: str | None
    max_pixels: int | None
    white_value: float | None
    report: bool


class Prediction:
    """A prediction, checked as far as that goes without the model.

    Args:
        request: The options.
        place: This process.
        spelled: Gives a line's text, with settings named as the reader knows them.

    Raises:
        FewShotError: The options can't be used together, or lead to nothing.
    """

    def __init__(self, request: Request, place: Place, spelled: Callable[[str], str]) -> None:
        self._request = request
        self._place = place
        self._spelled = spelled
        self._messages = Messages(Console(stderr=True), spelled)
        self._out = None if request.out in (None, "-") else out_path(str(request.out))
        with settings_named():
            Decoding(request.max_pixels, request.white_value)
        self._sources = Sources(request.images)
        self._check()

    def run(self) -> None:
        """Classify the images.

        Raises:
            FewShotError: The classifier or the output can't be used, or none of the images.
        """
        request = self._request
        with self._messages.status("loading the classifier"):
            classifier = self._classifier()
        if request.top > len(classifier.labels):
            raise FewShotError(
                f"{setting('top')} must be at most {len(classifier.labels)}, the classes of "
                f"{request.classifier}; got {request.top}"
            )
        columns = Columns(classifier.labels, request.top, request.probabilities)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        threads = max(1, (cores or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        decoding = Decoding(request.max_pixels, self._white_value(classifier))
        predictor = Predictor(classifier, columns, decoding, request.batch_size, threads)
        if self._out is None:
            self._finish(self._loop(predictor, Printed(columns)), None)
            return
        files = Files(self._out, columns, self._place)
        with files.open(self._settings(classifier)):
            outcome = self._loop(predictor, files)
            page = self._page(predictor, files) if request.report else None
        self._finish(outcome, files)
        if page is not None:
            self._messages.tell(f"Page: {page}")

    def _check(self) -> None:
        is_shared = self._place.count > 1
        if is_shared and self._out is None:
            raise FewShotError(f"{setting('out')} is needed where several processes share the work")
        if is_shared and self._sources.reads_stdin:
            raise FewShotError(
                f"{IMAGES}: - can't be shared by several processes; write the paths into a .txt "
                "file and name that"
            )
        if not self._request.report:
            return
        if self._out is None:
            raise FewShotError(f"{setting('report')} needs {setting('out')}, which it is made from")
        if self._sources.reads_stdin:
            raise FewShotError(
                f"{setting('report')} reads images again, and - can be read once only; write the "
                "paths into a .txt file and name that"
            )
        if is_shared:
            raise FewShotError(
                f"{setting('report')} is for one process: when all is done, give the command again "
                "without torchrun, and nothing but the page is made"
            )

    def _classifier(self) -> Classifier:
        request = self._request
        device, line = resolve_device(request.device)
        if line:
            self._tell_first(line)
        device = self._place.own_device(device)
        runtime = Runtime(device=device, backend=request.backend)
        found = load_classifier(
            request.classifier, model=request.model, pretrained=request.pretrained, runtime=runtime
        )
        precision = request.precision or found.about.precision
        if is_slow_at(precision, device):
            self._tell_first(
                Notice(
                    f"this CPU has no instructions for {precision}: "
                    f"{setting('precision', 'float32')} is faster"
                )
            )
        return found.with_precision(precision)

    def _white_value(self, classifier: Classifier) -> float | None:
        """What is white in images of more than 8 bits: as told, or as the classifier keeps it."""
        given = self._request.white_value
        return classifier.about.white_value if given is None else given

    def _settings(self, classifier: Classifier) -> dict[str, Any]:
        """All that decides a row but the image."""
        request = self._request
        about = expanded_out(request.classifier) / ABOUT_FILE
        try:
            # It names all other files with their digests.
            digest = hashlib.sha256(read_bytes(about, at_most=64 * MIB)).hexdigest()
        except OSError as error:
            raise FewShotError(f"can't read {about}: {first_line(error)}") from error
        return {
            "classifier": f"content {digest[:32]}",
            "top": request.top,
            "probabilities": request.probabilities,
            "precision": classifier.runtime.precision,
            "max_pixels": request.max_pixels,
            "white_value": self._white_value(classifier),
        }

    def _loop(self, predictor: Predictor, output: Output) -> Outcome:
        images = self._sources.share(self._place.rank, self._place.count)
        display = _Display(self._messages, self._place.label)
        with display:
            outcome = predictor.run(images, output, display)
        left_out = self._sources.left_out
        if not (outcome.classified or outcome.unreadable or outcome.known):
            if self._place.count == 1:
                also = f"; left out: {left_out}" if left_out else ""
                raise FewShotError(f"{IMAGES}: there are no images in them{also}")
        elif left_out:
            self._tell_first(f"left out: {left_out}")
        return outcome

    def _finish(self, outcome: Outcome, files: Files | None) -> None:
        """Say what came of it.

        Raises:
            FewShotError: No image could be read.
        """
        if outcome.known:
            self._tell(f"{outcome.known} more were classified before")
        if outcome.unreadable:
            where = "" if files is None else f" and are listed in {files.unreadable}"
            shown = "; ".join(outcome.problems)
            more = outcome.unreadable - len(outcome.problems)
            rest = f"; and {more} more" if more else ""
            count = f"{outcome.unreadable} image{'s' if outcome.unreadable > 1 else ''}"
            line = f"{count} can't be read{where}: {shown}{rest}"
            if not outcome.classified and not outcome.known and self._place.count == 1:
                raise FewShotError(f"{IMAGES}: none can be read. {line}")
            self._tell(line)

    def _page(self, predictor: Predictor, files: Files) -> Path:
        from tir_kernels.fewshot.predict.report import write_report

        assert self._out is not None
        path = self._out.with_suffix(".html")
        with self._messages.status("drawing the page"):
            write_report(path, predictor, files, self._sources, str(self._request.classifier))
        return path

    def _tell(self, line: str) -> None:
        label = f"{self._place.label} " if self._place.label else ""
        self._messages.tell(Notice(label + (line.marked if isinstance(line, Notice) else line)))

    def _tell_first(self, line: str) -> None:
        if self._place.is_first:
            self._messages.tell(line)


class _Display(AbstractContextManager["_Display"]):
    """Shows how many images are classified, and how fast: on a terminal always, else at times."""

    def __init__(self, messages: Messages, label: str) -> None:
        self._messages = messages
        self._label = f"{label} " if label else ""
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            TimeElapsedColumn(),
            console=messages.console,
            transient=True,
            disable=not messages.console.is_terminal,
        )
        self._task = self._bars.add_task("0 images", total=None)
        self._begun = self._told = time.monotonic()
        self._images = 0

    def __enter__(self) -> _Display:
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()
        self.tell(self._line())

    def classified(self, images: int) -> None:
        """So many more have their rows."""
        self._images += images
        self._bars.update(self._task, description=self._line())
        now = time.monotonic()
        if not self._messages.console.is_terminal and now - self._told > _LINE_SECONDS:
            self._told = now
            self.tell(self._line())

    def tell(self, line: str) -> None:
        """Print a line."""
        marked = line.marked if isinstance(line, Notice) else line
        self._messages.tell(Notice(self._label + marked))

    def _line(self) -> str:
        seconds = max(time.monotonic() - self._begun, 1e-9)
        count = f"{self._images} image{'' if self._images == 1 else 's'} classified"
        return f"{count}, {self._images / seconds:.1f} images/s"
