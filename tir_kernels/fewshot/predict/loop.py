"""The way of images through a classifier: decoded by threads while the model is at work."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from io import BytesIO
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from tir_kernels.errors import FewShotError, first_line
from tir_kernels.fewshot.classifier.classifier import Classifier
from tir_kernels.fewshot.data.decoding import Decoding, problems_explained
from tir_kernels.fewshot.data.rgb import NOTES, Conversion, UnreadableImageError
from tir_kernels.fewshot.predict.items import Image
from tir_kernels.fewshot.predict.output import Output
from tir_kernels.fewshot.predict.rows import Columns, require_finite
from tir_kernels.fewshot.train.memory import with_one_memory_error
from tir_kernels.text import Notice, printable, setting

# Batches that are being decoded or wait for the model.
_AHEAD = 3
_TOLD = 10  # images that can't be read, in full


class Decoded(NamedTuple):
    """An image as a model's pixels (3, H, W), or why it has none."""

    name: str
    pixels: Tensor | None
    problem: str = ""
    lost: Conversion = Conversion(0)


class Listener(Protocol):
    """Hears how far a prediction is."""

    def classified(self, images: int) -> None:
        """So many more have their rows."""

    def tell(self, line: str) -> None:
        """A line for the user."""


@dataclass
class Outcome:
    """What came of the images.

    Attributes:
        classified: Those that were.
        unreadable: Those that can't be read.
        problems: The first of these, each with its reason.
        known: Those that had been classified before.
    """

    classified: int = 0
    unreadable: int = 0
    known: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Predictor:
    """A classifier with the settings that it is asked with.

    Args:
        classifier: The classifier.
        columns: What is written.
        decoding: Settings of the decoder.
        batch_size: Images that are classified at once.
        threads: Threads that decode.
    """

    classifier: Classifier
    columns: Columns
    decoding: Decoding
    batch_size: int
    threads: int

    def run(self, images: Iterable[Image], output: Output, listener: Listener) -> Outcome:
        """Classify images that have no rows yet.

        Raises:
            FewShotError: The output can't be written, or memory does not suffice.
        """
        outcome = Outcome()
        told = Conversion(0)

        def new() -> Iterator[Image]:
            for image in images:
                if output.is_known(image.name):
                    outcome.known += 1
                else:
                    yield image

        def readable() -> Iterator[Decoded]:
            nonlocal told
            for each in self.decoded(new()):
                if each.pixels is None:
                    _skip(each, output, outcome)
                    continue
                for conversion, text in NOTES.items():
                    if conversion in each.lost and conversion not in told:
                        line = f"{each.name} {text} (said once, for all such images)"
                        listener.tell(Notice(line))
                told |= each.lost
                yield each

        with closing(self._scored(readable())) as scored:
            for names, logits in scored:
                probabilities = self.classifier.probabilities(logits)
                require_finite(names, probabilities)
                output.write(list(self.columns.rows(names, probabilities)))
                outcome.classified += len(names)
                listener.classified(len(names))
        return outcome

    def decoded(self, images: Iterator[Image]) -> Iterator[Decoded]:
        """Images in their order, a few batches of them decoded ahead."""
        waiting: deque[Future[Decoded]] = deque()
        pool = ThreadPoolExecutor(self.threads)
        try:
            for image in images:
                waiting.append(pool.submit(self._decode, image))
                if len(waiting) >= _AHEAD * self.batch_size:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _scored(self, images: Iterator[Decoded]) -> Generator[tuple[list[str], Tensor], None, None]:
        """Names and logits of batches; a GPU is at the next one while those of one are used."""
        before: tuple[list[str], Callable[[], Tensor]] | None = None
        preprocess, device = self.classifier.model.preprocess, self.classifier.runtime.device
        try:
            with with_one_memory_error(), self.classifier.open() as scorer:
                for batch in _batches(images, self.batch_size):
                    pixels = torch.stack([each.pixels for each in batch if each.pixels is not None])
                    if torch.device(device).type == "cuda":
                        pixels = pixels.pin_memory().to(device, non_blocking=True)
                    now = [each.name for each in batch], scorer.begin(preprocess.normalise(pixels))
                    if before is not None:
                        yield before[0], before[1]()
                    before = now
                if before is not None:
                    yield before[0], before[1]()
        except torch.OutOfMemoryError as error:
            raise FewShotError(
                "out of memory; what is finished is kept: give the same command again with a "
                f"smaller {setting('batch_size')} than {self.batch_size}"
            ) from error

    def _decode(self, image: Image) -> Decoded:
        try:
            if isinstance(image.file, Exception):
                raise image.file
            file = BytesIO(image.file) if isinstance(image.file, bytes) else image.file
            with problems_explained():
                rgb, lost = self.decoding.decode(file)
                pixels = self.classifier.model.preprocess.to_pixels(rgb)
            return Decoded(image.name, pixels, lost=lost)
        except UnreadableImageError as error:
            return Decoded(image.name, None, f"{error.notice.marked}; {error.advice.marked}")
        except (OSError, ValueError) as error:
            reason = (isinstance(error, OSError) and error.strerror) or first_line(error)
            return Decoded(image.name, None, reason)


def _skip(image: Decoded, output: Output, outcome: Outcome) -> None:
    reason = str(Notice(image.problem))
    output.skip(image.name, reason)
    outcome.unreadable += 1
    if len(outcome.problems) < _TOLD:
        outcome.problems.append(f"{printable(image.name)}: {image.problem}")


def _batches(images: Iterator[Decoded], size: int) -> Iterator[Sequence[Decoded]]:
    batch: list[Decoded] = []
    for image in images:
        batch.append(image)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
