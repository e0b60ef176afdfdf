"""Reads images for episodes, from the cache on the disk or from their files."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor

from tir_kernels.fewshot.data import ImageClass, ImageData
from tir_kernels.fewshot.decoding import DECODE_ERRORS, decode
from tir_kernels.fewshot.errors import FewShotError, first_line
from tir_kernels.fewshot.image_cache import ImageCache
from tir_kernels.fewshot.preprocess import Preprocess


class ImageReader:
    """Gives images as a model's pixels.

    What is not in the cache is decoded, and kept in memory while it was used lately.

    Args:
        data: The images.
        preprocess: The model's preprocessing.
        cache: Where decoded images are kept on the disk; ``None``: nowhere.
        skip_unreadable: Answer ``None`` for an image that can't be decoded instead of raising.
        memory_bytes: Most memory for decoded images that are not in the cache.
    """

    def __init__(
        self,
        data: ImageData,
        preprocess: Preprocess,
        *,
        cache: ImageCache | None = None,
        skip_unreadable: bool = False,
        memory_bytes: int = 512 * 2**20,
    ) -> None:
        self.preprocess = preprocess
        self._source = data.source
        self._cache = cache
        self._skip_unreadable = skip_unreadable
        self._memory_bytes = memory_bytes
        self._held_bytes = 0
        self._held: OrderedDict[str, Tensor] = OrderedDict()
        self._unreadable: set[str] = set()

    def read(self, entry: ImageClass, position: int) -> Tensor | None:
        """An image of a class, (3, H, W) uint8, or ``None`` if it is unreadable and skipped.

        Args:
            entry: The class.
            position: Of the image among the class's files.

        Raises:
            FewShotError: The image can't be decoded and ``skip_unreadable`` is off.
        """
        if self._cache is not None:
            pixels = self._cache.read(entry, position)
            if pixels is not None:
                return pixels
            if self._skip_unreadable and self._cache.is_unreadable(entry, position):
                return None
        return self._decoded(entry.files[position])

    def _decoded(self, name: str) -> Tensor | None:
        if name in self._held:
            self._held.move_to_end(name)
            return self._held[name]
        if name in self._unreadable:
            return None
        try:
            pixels = self.preprocess.to_pixels(decode(self._source.file(name)))
        except DECODE_ERRORS as error:
            if not self._skip_unreadable:
                raise FewShotError(
                    f"can't read the image {self._source.describe(name)}: {first_line(error)}; "
                    "repair or remove it, or pass --skip-unreadable"
                ) from error
            self._unreadable.add(name)
            return None
        self._held[name] = pixels
        self._held_bytes += pixels.nbytes
        while self._held_bytes > self._memory_bytes:
            _, oldest = self._held.popitem(last=False)
            self._held_bytes -= oldest.nbytes
        return pixels
