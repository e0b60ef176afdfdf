"""The device that a run takes, and what it is slow at."""

from __future__ import annotations

import platform

import torch

from tir_kernels.text import Notice, setting

AUTO = "auto"


def resolve_device(name: str) -> tuple[str, str]:
    """The device that a name stands for, and a line on it where it was chosen here.

    Args:
        name: A name of PyTorch's, or "auto": a CUDA GPU where PyTorch sees one, else the CPU.
    """
    if name != AUTO:
        return name, ""
    if torch.cuda.is_available():
        return "cuda", Notice(f"{setting('device', 'auto')}: cuda ({torch.cuda.get_device_name()})")
    return "cpu", Notice(f"{setting('device', 'auto')}: cpu, since PyTorch sees no CUDA GPU here")


def is_slow_at(precision: str, device: str) -> bool:
    """Whether a CPU multiplies numbers of this type by converting them, which takes far longer."""
    # Other kinds of processors can't be asked in this way.
    if torch.device(device).type != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
        return False
    questions = {"bfloat16": "_is_avx512_bf16_supported", "float16": "_is_amx_fp16_supported"}
    has_instructions = getattr(torch.cpu, questions.get(precision, ""), lambda: True)
    return not has_instructions()
