"""The choices of the command line."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import tir_kernels

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
DIRECTIONS = ("forward", "backward", "forward+backward")

# The order in which they are shown. Triton's interpreter would run on a CPU too, but its time says
# nothing.
BACKENDS_OF_DEVICE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
OURS = "tir "  # in front of a backend's name
PUBLISHED = "published "  # the method's published program, in front of the type it runs in


@dataclass(frozen=True)
class Settings:
    """One run of the program; ``None`` in a filter means the suite's own choice.

    Args:
        device: "cpu" or "cuda".
        quick: Few shapes and little time, for a first look.
        seconds: Measuring time per row, that is per implementation at one shape.
        threads: CPU threads.
        lengths: Token counts L.
        widths: Head widths d.
        heads: Products B·H; with 12 heads, 60 stands for 5 images.
        classes: Class counts C.
        dtypes: Names in ``DTYPES``.
        directions: Of ``DIRECTIONS``.
        backends: Backends of tir_kernels, of those that serve the device.
        compiles: Whether implementations that need torch.compile take part.
        max_call_seconds: A case whose call is estimated to take longer is left out.
        model: open_clip architecture, JSON file with a ``model_cfg``, or folder with
            ``open_clip_config.json`` and weights.
        data: Folder with a folder of images per class.
        ways: Classes of an episode.
        shots: Support images per class, each number measured by itself.
        queries: Query images per class.
        episodes: Episodes of a whole run.
        published_episodes: How many of them the published program runs.
        steps: Training steps of an episode.
        parallel_episodes: Episodes trained at once, each number measured by itself.
    """

    device: str = "cpu"
    quick: bool = False
    seconds: float = 1.0
    threads: int = 1
    lengths: tuple[int, ...] | None = None
    widths: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    classes: tuple[int, ...] | None = None
    dtypes: tuple[str, ...] | None = None
    directions: tuple[str, ...] | None = None
    backends: tuple[str, ...] | None = None
    compiles: bool = True
    max_call_seconds: float = 5.0
    model: str | None = None
    data: str | None = None
    ways: int = 5
    shots: tuple[int, ...] | None = None
    queries: int = 15
    episodes: int | None = None
    published_episodes: int | None = None
    steps: int | None = None
    parallel_episodes: tuple[int, ...] | None = None

    @property
    def why_not_compiled(self) -> str:
        return "" if self.compiles else "left out by --no-compile"

    def our_backends(self) -> list[tuple[str, str]]:
        """(name, "" or why it does not run here) of the backends that take part."""
        reasons = tir_kernels.available_backends()
        names = self.backends or BACKENDS_OF_DEVICE[self.device]
        return [(name, reasons[name]) for name in names]

    def wants(self, direction: str) -> bool:
        return self.directions is None or direction in self.directions
