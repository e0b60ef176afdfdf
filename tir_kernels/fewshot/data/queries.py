"""Query images of an episode that are too many to be held: they are read when asked for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.data.dataset import ImageClass, ImageData
from tir_kernels.fewshot.data.reader import HELD_BYTES, ImageReader
from tir_kernels.fewshot.settings import ALL, Protocol
from tir_kernels.text import setting


class QueryImages:
    """Images that are read and normalised in parts; see ``episode.Images``.

    Args:
        images: Reader of the images, which has found all of them readable.
        wanted: The class of each and its position there.
        device: Device on which they are normalised and left.
    """

    def __init__(
        self,
        images: ImageReader,
        wanted: Sequence[tuple[ImageClass, int]],
        device: str | torch.device,
    ) -> None:
        self._images, self._wanted, self._device = images, wanted, device

    @property
    def shape(self) -> torch.Size:
        """(Q, 3, H, W)."""
        return torch.Size((len(self._wanted), *self._images.preprocess.shape))

    def __len__(self) -> int:
        return len(self._wanted)

    def __getitem__(self, rows: slice, /) -> Tensor:
        """(n, 3, H, W) float32 of these rows.

        Raises:
            FewShotError: An image can't be read any more.
        """
        wanted = self._wanted[rows]
        found = self._images.read_many(wanted)
        pixels = torch.empty(0, *self.shape[1:], dtype=torch.uint8, device="cpu")
        if found:
            pixels = torch.stack([self._present(*each) for each in zip(found, wanted, strict=True)])
        return self._images.preprocess.normalise(pixels.to(self._device))

    def _present(self, image: Tensor | None, wanted: tuple[ImageClass, int]) -> Tensor:
        if image is None:
            entry, position = wanted
            raise FewShotError(
                f"image {entry.files[position]} of class {entry.folder!r} was readable when the "
                "episode began, and is not any more; put it back, and give the same command again"
            )
        return image


def all_queries_note(
    data: ImageData, protocol: Protocol, shape: tuple[int, ...], *, at_once: int, is_cached: bool
) -> str:
    """What it takes to classify all queries, and what their accuracy is, in a line for the user.

    Args:
        data: The data.
        protocol: A protocol of all queries and a number of ways.
        shape: Of an image.
        at_once: Images that are classified at once.
        is_cached: Whether there is a cache of decoded images on the disk.
    """
    counts = sorted(
        len(each.files) - (0 if data.queries else protocol.shots)
        for each in data.queries or data.classes
    )
    most = sum(counts[-protocol.ways :]) if isinstance(protocol.ways, int) else sum(counts)
    pixels = torch.Size(shape).numel()
    note = (
        f"{setting('queries', ALL)}: each method classifies up to {most:,} images an episode, "
        f"{at_once} at once ({_size(4 * at_once * pixels)}); accuracy is over all of them, so a "
        "class with more images weighs more"
    )
    total = sum(len(each.files) for each in (*data.classes, *data.queries))
    if is_cached:
        return f"{note}; the cache takes up to {_size(total * pixels)} on the disk"
    if most * pixels <= HELD_BYTES:
        return note
    return (
        f"{note}; without a cache all are decoded again for each method, since memory keeps "
        f"{_size(HELD_BYTES)} of images: leave out {setting('no_cache')} to keep "
        f"{_size(total * pixels)} on the disk instead"
    )


def _size(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000 or unit == "GB":
            break
        number /= 1000
    return f"{number:.3g} {unit}"
