"""A CLIP so small that a step of it takes no time."""

from __future__ import annotations

import json
from pathlib import Path

CONFIG = {
    "embed_dim": 512,
    "vision_cfg": {
        "image_size": 16,
        "layers": 5,
        "width": 32,
        "head_width": 16,
        "patch_size": 8,
    },
    "text_cfg": {
        "context_length": 20,
        "vocab_size": 49408,
        "width": 32,
        "heads": 2,
        "layers": 3,
    },
}


def write_small_clip(folder: Path) -> Path:
    """Its configuration, as the file that ``--model`` takes."""
    path = folder / "small.json"
    path.write_text(json.dumps({"model_cfg": CONFIG}))
    return path
