"""An image that is to be classified, and a shard that holds many."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Image:
    """An image by its name.

    Args:
        name: As the user named it, or as it was found.
        file: Its file, its content, or why there is none.
    """

    name: str
    file: Path | bytes | Exception


@dataclass(frozen=True)
class Shard:
    """A tar file of images, as WebDataset writes them."""

    name: str
    path: Path

    def images(self) -> Iterator[Image]:
        """Its images, in its order."""
        from tir_kernels.fewshot.predict.shards import images_of

        return images_of(self.name, self.path)
