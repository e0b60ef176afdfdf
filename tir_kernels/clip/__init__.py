"""Re-weighting, LoRA and prompt learning for open_clip models."""

from .frozen import cast_blocks, frozen_mlps
from .image_encoder import ImageEncoder
from .lora import LoRA, add_lora
from .peft_format import load_lora, save_lora
from .prompt import PromptContext
from .reweighting import Reweighting, install

__all__ = [
    "ImageEncoder",
    "LoRA",
    "PromptContext",
    "Reweighting",
    "add_lora",
    "cast_blocks",
    "frozen_mlps",
    "install",
    "load_lora",
    "save_lora",
]
