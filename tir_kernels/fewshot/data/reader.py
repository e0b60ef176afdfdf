"""Reads images for episodes, from the cache on the disk or from their files."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from tir_kernels.errors import FewShotError, first_line
from tir_kernels.fewshot.data.cache import ImageCache, KeptImage
from tir_kernels.fewshot.data.dataset import ImageClass, ImageData
from tir_kernels.fewshot.data.decoding import Decoding, problems_explained
from tir_kernels.fewshot.data.rgb import NOTES, Conversion, UnreadableImageError
from tir_kernels.text import Notice, setting

HELD_BYTES = 512 * 2**20  # most memory for decoded images that are in no cache
_CHECKED_AT_ONCE = 64  # images


class Preprocess(Protocol):
    """A model's preprocessing, in two halves.

    Attributes:
        shape: (3, H, W) of an image.
        version: Text that differs wherever the pixels of an image may differ.
    """

    shape: tuple[int, int, int]
    version: str

    def to_pixels(self, image: Image.Image) -> Tensor:
        """An RGB image as (3, H, W) uint8."""

    def normalise(self, pixels: Tensor) -> Tensor:
        """The model's input, (..., 3, H, W) float32, of such pixels."""


@dataclass(frozen=True)
class _Loaded:
    """The outcome of loading an image.

    Args:
        image: Its pixels, if it has any.
        problem: Why it has none, where that is known.
        is_kept: Whether the cache on the disk has it.
    """

    image: KeptImage
    problem: Exception | None = None
    is_kept: bool = False


class ImageReader:
    """Gives images as a model's pixels.

    What is not in the cache is decoded, and put there; where that is not possible, it is kept in
    memory while it was used lately.

    Args:
        data: The images.
        preprocess: The model's preprocessing.
        cache: Cache of decoded images on the disk; ``None``: none is kept there.
        skip_unreadable: Answer ``None`` for an image that can't be decoded instead of raising.
        memory_bytes: Most memory for decoded images that are not in the cache.
        decoding: Settings of the decoder.
        notify: Called with a line for each kind of images that lose something when they become
            8-bit RGB.
    """

    def __init__(
        self,
        data: ImageData,
        preprocess: Preprocess,
        *,
        cache: ImageCache | None = None,
        skip_unreadable: bool = False,
        memory_bytes: int = HELD_BYTES,
        decoding: Decoding | None = None,
        notify: Callable[[str], None] | None = None,
    ) -> None:
        self.preprocess = preprocess
        self._source = data.source
        self._cache = cache
        self._skip_unreadable = skip_unreadable
        self._memory_bytes = memory_bytes
        self._decoding = decoding or Decoding()
        self._notify = notify or (lambda text: None)
        self._held_bytes = 0
        self._held: OrderedDict[str, Tensor] = OrderedDict()
        self._unreadable: set[str] = set()
        self._readable: set[str] = set()  # of those that were only checked
        self._told = Conversion(0)

    def read(self, entry: ImageClass, position: int) -> Tensor | None:
        """An image of a class, (3, H, W) uint8, or ``None`` if it is unreadable and skipped.

        Args:
            entry: The class.
            position: Of the image among the class's files.

        Raises:
            FewShotError: The image can't be decoded and ``skip_unreadable`` is off.
        """
        (pixels,) = self.read_many([(entry, position)])
        return pixels

    def read_many(self, wanted: Sequence[tuple[ImageClass, int]]) -> list[Tensor | None]:
        """Several images, decoded side by side; each as ``read`` gives it.

        Args:
            wanted: The class of each and its position there.

        Raises:
            FewShotError: As ``read``. What was decoded until then is kept.
        """
        names = [entry.files[position] for entry, position in wanted]
        missing = [
            n
            for n, name in enumerate(names)
            if name not in self._held and name not in self._unreadable
        ]
        images: list[Tensor | None] = [self._from_memory(name) for name in names]
        threads = min(torch.get_num_threads(), len(missing))
        if threads < 2:
            for n in missing:
                images[n] = self._settled(names[n], self._load(*wanted[n]))
            return images
        pool = ThreadPoolExecutor(threads)
        try:
            futures = [pool.submit(self._load, *wanted[n]) for n in missing]
            for n, future in zip(missing, futures, strict=True):
                images[n] = self._settled(names[n], future.result())
        finally:
            # Where an image can't be read, or the user interrupts, the rest need not begin.
            pool.shutdown(cancel_futures=True)
        return images

    def check_many(self, wanted: Sequence[tuple[ImageClass, int]]) -> list[bool]:
        """Whether images can be read, without keeping more of them in memory than a few.

        Each is read once in this reader's life, and put into the cache. The arguments and errors
        are those of ``read_many``.
        """
        for first in range(0, len(wanted), _CHECKED_AT_ONCE):
            some = wanted[first : first + _CHECKED_AT_ONCE]
            names = [entry.files[position] for entry, position in some]
            missing = [
                each
                for each, name in zip(some, names, strict=True)
                if name not in self._readable and name not in self._unreadable
            ]
            for (entry, position), pixels in zip(missing, self.read_many(missing), strict=True):
                if pixels is not None:
                    self._readable.add(entry.files[position])
        return [entry.files[position] in self._readable for entry, position in wanted]

    def _from_memory(self, name: str) -> Tensor | None:
        if name not in self._held:
            return None
        self._held.move_to_end(name)
        return self._held[name]

    def _load(self, entry: ImageClass, position: int) -> _Loaded:
        """An image from the cache or its file; called by several threads at once."""
        key = self._key(entry, position)
        found = self._cache.read(key) if self._cache is not None else None
        # Without pixels it is decoded once more where the user is to be told why it has none.
        if found is not None and (found.pixels is not None or self._skip_unreadable):
            return _Loaded(found, is_kept=True)
        name = entry.files[position]
        try:
            file = self._source.file(name)
            with problems_explained():
                image, lost = self._decoding.decode(file)
                loaded = _Loaded(KeptImage(self.preprocess.to_pixels(image), lost))
        except (UnreadableImageError, OSError, ValueError) as error:
            loaded = _Loaded(KeptImage(None), error)
            if not (isinstance(error, UnreadableImageError) and error.is_lasting):
                return loaded
        if self._cache is None or not self._is_as_listed(entry, position):
            return loaded
        return _Loaded(loaded.image, loaded.problem, self._cache.store(key, loaded.image))

    def _is_as_listed(self, entry: ImageClass, position: int) -> bool:
        """Whether no other image has taken its name, under which it would be kept."""
        try:
            return self._source.stamp(entry.files[position]) == entry.stamps[position]
        except (OSError, ValueError):
            return False

    def _key(self, entry: ImageClass, position: int) -> str:
        content = [
            self.preprocess.version,
            self._decoding.version,
            self._source.identity,
            entry.files[position],
            entry.stamps[position],
        ]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def _settled(self, name: str, loaded: _Loaded) -> Tensor | None:
        """The pixels of what was loaded; what is to be said is said, and kept in memory."""
        pixels, conversions = loaded.image
        if pixels is None:
            if not self._skip_unreadable:
                raise self._error(name, loaded.problem) from loaded.problem
            self._unreadable.add(name)
            return None
        for conversion, text in NOTES.items():
            if conversion in conversions and conversion not in self._told:
                where = self._source.describe(name)
                self._notify(Notice(f"{where} {text} (said once, for all such images)"))
        self._told |= conversions
        if not loaded.is_kept:
            self._hold(name, pixels)
        return pixels

    def _error(self, name: str, problem: Exception | None) -> FewShotError:
        advice = "repair or remove it"
        if isinstance(problem, UnreadableImageError):
            advice = problem.advice.marked
        return FewShotError(
            f"can't read the image {self._source.describe(name)}: "
            f"{first_line(problem or ValueError())}; {advice}, or pass {setting('skip_unreadable')}"
        )

    def _hold(self, name: str, pixels: Tensor) -> None:
        self._held[name] = pixels
        self._held_bytes += pixels.nbytes
        while self._held_bytes > self._memory_bytes:
            _, oldest = self._held.popitem(last=False)
            self._held_bytes -= oldest.nbytes
