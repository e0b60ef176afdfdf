"""Procedurally drawn images for the offline demonstration, in two domains that look nothing alike.

The *source* domain (`everyday`) shows captioned, clean compositions; a small CLIP learns from them.
The *target* domain (`tissue`) imitates a microscope's images; it is what few-shot fine-tuning is
tried on. Every image depends on its seed, class and index only, so any of them can be drawn again,
in any order, by any process.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from pathlib import Path

from PIL import Image

from tir_kernels.demo.canvas import IMAGE_SIZE
from tir_kernels.demo.everyday import SourceDrawing, draw_source
from tir_kernels.demo.shapes import SHAPES
from tir_kernels.demo.tissue import CLASSES, draw_tissue

__all__ = [
    "CLASSES", "CLASS_NAMES_FILE", "IMAGE_SIZE", "SHAPES", "SourceDrawing", "draw_source",
    "draw_tissue", "write_image_folder",
]  # fmt: skip

CLASS_NAMES_FILE = "class_names.json"
_STAMP_FILE = "drawings.json"
_DRAWING_VERSION = 3  # raise it when the drawings change: older folders are then not reused
# Images are told from others of their name by their time, and these are always the same ones: those
# drawn again are no other data to a run that is continued. In nanoseconds; the first of 2026.
_TIME = 1_767_225_600_000_000_000


def _holds(root: Path, stamp: dict[str, int]) -> bool:
    """Whether `root` is a finished, undamaged folder of exactly these drawings."""
    try:
        found = json.loads((root / _STAMP_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    wanted = [f"{index:03d}.png" for index in range(stamp["images_per_class"])]
    return found == stamp and all(
        (root / name / file).is_file() for name in CLASSES for file in wanted
    )


def write_image_folder(root: str | Path, *, images_per_class: int = 40, seed: int = 0) -> Path:
    """Write the target domain as an image folder, `root/CLASS/NNN.png`, 64 x 64 RGB.

    `root/class_names.json` maps each class folder to the words for it. A second call with the same
    arguments finds the work done and changes nothing. The images are drawn into a neighbouring
    folder that is renamed when complete, so an interrupted call never leaves a `root` that looks
    finished, and calls at the same time do no harm.

    Args:
        root: the folder to make; parents are made too. It may exist if it is empty.
        images_per_class: at least 1.
        seed: at least 0; another seed draws other images of the same classes.

    Returns:
        `root` as a Path.

    Raises:
        ValueError: `images_per_class` or `seed` is too small.
        FileExistsError: `root` holds something else, which is left as it is.
    """
    if images_per_class < 1:
        raise ValueError(f"images_per_class: expected at least 1, got {images_per_class}")
    if seed < 0:
        raise ValueError(f"seed: expected at least 0, got {seed}")
    root = Path(root)
    stamp = {"images_per_class": images_per_class, "seed": seed, "version": _DRAWING_VERSION}
    if _holds(root, stamp):
        return root
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise FileExistsError(
            f"{root} exists and does not hold these drawings ({stamp}); "
            "delete it or choose another folder"
        )
    partial = root.with_name(f"{root.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        for name in CLASSES:
            (partial / name).mkdir(parents=True)
            for index in range(images_per_class):
                pixels = draw_tissue(name, index, seed=seed)
                path = partial / name / f"{index:03d}.png"
                Image.fromarray(pixels).save(path)
                os.utime(path, ns=(_TIME, _TIME))
        words = {name: words for name, (words, _) in CLASSES.items()}
        for file, content in ((CLASS_NAMES_FILE, words), (_STAMP_FILE, stamp)):
            text = json.dumps(content, indent=2) + "\n"
            (partial / file).write_text(text, encoding="utf-8")
        try:
            partial.rename(root)
        except OSError:
            if not _holds(root, stamp):  # otherwise another process was faster, with the same work
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return root
