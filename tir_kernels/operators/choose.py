"""The choice of a backend: what runs in this process, and what "auto" means."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch

BACKENDS = ("reference", "cpu", "triton", "cuda")

# Fastest first. One that does not run here is passed over: `available_backends()` says why.
AUTO_ORDER = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}


_registered: dict[str, Any] = {}


def register_backend(name: str, backend: Any) -> None:
    """Add a backend of one's own, with the functions that ``tir_kernels.backends`` describes.

    It is served by its name only: "auto" never picks it.
    """
    if name == "auto" or name in BACKENDS:
        raise ValueError(f"backend name {name!r} is taken; choose another")
    _registered[name] = backend


def backend_names() -> tuple[str, ...]:
    return (*BACKENDS, *_registered)


@functools.cache
def _import_backend(name: str) -> Any:
    return importlib.import_module(f"tir_kernels.backends.{name}")


def load_backend(name: str) -> Any:
    """The module (or registered object) with a backend's functions."""
    return _registered[name] if name in _registered else _import_backend(name)


def available_backends() -> dict[str, str]:
    """The backends, and what each can do in this process.

    Returns:
        Backend name -> empty string if it runs here, else why not and what to do about it. Of
        several GPUs one that is served is enough; a call asks for that of its tensors.
    """
    return {name: load_backend(name).unavailable_reason() for name in BACKENDS}


@functools.lru_cache(maxsize=64)
def choose_backend(name: str, device: torch.device, is_double: bool, head_dim: int = 1) -> Any:
    """The module that serves a call on tensors of a device; their ``device`` says which GPU.

    Raises:
        RuntimeError: The backend asked for cannot run in this process.
        ValueError: It cannot take tensors on this device or heads of this width.
        TypeError: It cannot compute in float64.
    """
    if name == "auto":
        for candidate in AUTO_ORDER.get(device.type, ()):
            if not refusal(candidate, device, is_double, head_dim):
                return load_backend(candidate)
        return load_backend("reference")
    backend = load_backend(name)
    error = refusal(name, device, is_double, head_dim)
    if error:
        raise error
    return backend


def refusal(
    name: str, device: torch.device, is_double: bool, head_dim: int = 1
) -> RuntimeError | ValueError | TypeError | None:
    """The error to raise where a backend cannot serve such a call; ``None`` if it can."""
    backend = load_backend(name)
    if reason := backend.unavailable_reason():
        return RuntimeError(f"backend={name!r} cannot run here: {reason}")
    if reason := backend.device_reason(device):
        return ValueError(f"backend={name!r} cannot take tensors on {str(device)!r}: {reason}")
    if name == "reference":
        return None
    if is_double:
        return TypeError(
            f"backend={name!r} takes float32, float16 and bfloat16; got {torch.float64}. "
            "Use backend='reference' for float64"
        )
    if head_dim > backend.MAX_HEAD_DIM:
        return ValueError(
            f"backend={name!r} takes heads of width up to {backend.MAX_HEAD_DIM}; query has "
            f"width {head_dim}. Use backend='auto' or 'reference' for wider heads"
        )
    return None
