"""Adapters for opened towers: re-weighting, LoRA and prompts."""

from tir_kernels.adapters.deep_prompts import DeepPrompts, add_image_prompts, add_text_prompts
from tir_kernels.adapters.lora import LoRA, add_lora, loras_of
from tir_kernels.adapters.lora_file import load_lora, save_lora
from tir_kernels.adapters.prompt_context import PromptContext
from tir_kernels.adapters.reweighting import Reweighting, add_reweighting, reweighting_of
from tir_kernels.adapters.selection import MostAttended, RandomOrder

__all__ = [
    "DeepPrompts",
    "LoRA",
    "MostAttended",
    "PromptContext",
    "RandomOrder",
    "Reweighting",
    "add_image_prompts",
    "add_lora",
    "add_reweighting",
    "add_text_prompts",
    "load_lora",
    "loras_of",
    "reweighting_of",
    "save_lora",
]
