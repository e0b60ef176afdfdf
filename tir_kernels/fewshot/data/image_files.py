"""Images that are files."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from tir_kernels.fewshot.data.protocol import Stamp


@dataclass(frozen=True)
class ImageFiles:
    """Images that are files; names are paths relative to the root, or absolute ones."""

    root: Path

    @property
    def identity(self) -> str:
        """The root: files are not known by their content."""
        return str(self.root.resolve())

    def describe(self, name: str) -> str:
        """The file's path."""
        return str(self.root / name)

    def file(self, name: str) -> Path:
        """The file's path."""
        return self.root / name

    def stamp(self, name: str) -> Stamp:
        """The file's size and time of modification."""
        status = os.stat(os.path.join(self.root, name))
        return status.st_size, status.st_mtime_ns
