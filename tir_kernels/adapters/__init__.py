"""Adapters for opened towers: re-weighting, LoRA, prompts, and changes of the forward pass."""

from tir_kernels.adapters.attention_changes import (
    add_attention_temperature,
    add_sink_redistribution,
    add_sink_suppression,
)
from tir_kernels.adapters.deep_prompts import DeepPrompts, add_image_prompts, add_text_prompts
from tir_kernels.adapters.informed_tokens import add_paying_attention, informed_tokens
from tir_kernels.adapters.lora import LoRA, add_lora, loras_of
from tir_kernels.adapters.lora_file import load_lora, save_lora
from tir_kernels.adapters.prompt_context import PromptContext
from tir_kernels.adapters.registers import add_test_time_registers, find_register_neurons
from tir_kernels.adapters.reweighting import Reweighting, add_reweighting, reweighting_of
from tir_kernels.adapters.selection import MostAttended, RandomOrder
from tir_kernels.adapters.sinks import FirstOf, NormOutliers
from tir_kernels.adapters.training_noise import add_random_registers, add_temperature_dropout

__all__ = [
    "DeepPrompts",
    "FirstOf",
    "LoRA",
    "MostAttended",
    "NormOutliers",
    "PromptContext",
    "RandomOrder",
    "Reweighting",
    "add_attention_temperature",
    "add_image_prompts",
    "add_lora",
    "add_paying_attention",
    "add_random_registers",
    "add_reweighting",
    "add_sink_redistribution",
    "add_sink_suppression",
    "add_temperature_dropout",
    "add_test_time_registers",
    "add_text_prompts",
    "find_register_neurons",
    "informed_tokens",
    "load_lora",
    "loras_of",
    "reweighting_of",
    "save_lora",
]
