"""An offline demonstration: a small trained CLIP and a far, procedurally drawn target domain."""

from pathlib import Path

from tir_kernels.demo.drawings import write_image_folder

__all__ = ["model_directory", "write_image_folder"]


def model_directory() -> Path:
    """Folder of the embedded CLIP; open_clip loads it as `local-dir:` followed by this path."""
    return Path(__file__).resolve().parent / "model"
