"""The choice of a backend: what runs in this process, and what "auto" means.

Imports no PyTorch: a program's ``--help`` names the backends.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from tir_kernels.registry import load

if TYPE_CHECKING:
    import torch

    from tir_kernels.backends.protocol import Backend

# Name -> "module:Class" with the operations of ``tir_kernels.backends.protocol``.
BACKENDS = {
    "reference": "tir_kernels.backends.reference:ReferenceBackend",
    "cpu": "tir_kernels.backends.cpu:CpuBackend",
    "triton": "tir_kernels.backends.triton:TritonBackend",
    "cuda": "tir_kernels.backends.cuda:CudaBackend",
}

# Fastest first. One that does not run here, or lacks the operation, is passed over.
AUTO_ORDER = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}

_registered: dict[str, str | Backend] = {}

# How often choices were forgotten: what remembers one is to forget it too.
generation = 0


def forget_choices() -> None:
    """Choose anew from now on: another backend may serve what one did."""
    global generation
    generation += 1
    load_backend.cache_clear()
    choose_backend.cache_clear()


def register_backend(name: str, backend: str | Backend) -> None:
    """Add a backend of one's own, which is served by its name only: "auto" never picks it.

    Args:
        name: A name that no backend has.
        backend: An object with the operations of ``tir_kernels.backends.protocol.Backend``, or
            "module:Class" of one, which is imported when it is first used.
    """
    if name == "auto" or name in BACKENDS:
        raise ValueError(f"backend name {name!r} is taken; choose another")
    _registered[name] = backend
    forget_choices()


def backend_names() -> tuple[str, ...]:
    return (*BACKENDS, *_registered)


def require_backend(backend: object) -> None:
    """Refuse what is neither "auto" nor a backend's name."""
    if not isinstance(backend, str):
        raise TypeError(f"backend must be a str; got {type(backend).__name__}")
    if backend != "auto" and backend not in BACKENDS and backend not in _registered:
        raise ValueError(
            f"backend must be 'auto' or one of {', '.join(backend_names())}; got {backend!r}"
        )


@functools.cache
def load_backend(name: str) -> Any:
    """The backend of a name, one object per process; its module is imported here."""
    backend = _registered[name] if name in _registered else BACKENDS[name]
    return load(backend)() if isinstance(backend, str) else backend


def available_backends() -> dict[str, str]:
    """The backends, and what each can do in this process.

    Returns:
        Backend name -> empty string if it runs here, else why not and what to do about it. Of
        several GPUs one that is served is enough; a call asks for that of its tensors.
    """
    return {name: load_backend(name).unavailable() for name in BACKENDS}


@functools.lru_cache(maxsize=256)
def choose_backend(
    name: str, operation: str, device: torch.device, dtype: torch.dtype, head_dim: int = 1
) -> Any:
    """The backend that serves an operation on tensors of a device.

    Args:
        name: "auto", or a backend's name.
        operation: The name of its method.
        device: The tensors' very device: two GPUs of a machine may have two answers.
        dtype: Type of the tensors.
        head_dim: Width of attention's heads.

    Raises:
        RuntimeError: The backend asked for cannot run in this process.
        ValueError: It has no such operation, or cannot take tensors on this device or heads of
            this width.
        TypeError: It cannot compute in this type.
    """
    if name == "auto":
        for candidate in AUTO_ORDER.get(device.type, ()):
            if not _lacks(candidate, operation) and not refusal(candidate, device, dtype, head_dim):
                return load_backend(candidate)
        return load_backend("reference")
    error = _lacks(name, operation) or refusal(name, device, dtype, head_dim)
    if error:
        raise error
    return load_backend(name)


def backend_with(name: str, operation: str) -> str:
    """The backend of this name where it has the operation, else "auto".

    A program that runs on a named backend leaves to "auto" what that one does not offer.
    """
    require_backend(name)
    return name if name == "auto" or _lacks(name, operation) is None else "auto"


def _lacks(name: str, operation: str) -> ValueError | None:
    if hasattr(load_backend(name), operation):
        return None
    having = [repr(other) for other in BACKENDS if hasattr(load_backend(other), operation)]
    return ValueError(
        f"backend={name!r} has no {operation}: use backend='auto' or one of {', '.join(having)}"
    )


def refusal(
    name: str, device: torch.device, dtype: torch.dtype | None = None, head_dim: int = 1
) -> RuntimeError | ValueError | TypeError | None:
    """The error to raise where a backend cannot serve such tensors; ``None`` if it can.

    Args:
        name: A backend's name.
        device: The tensors' device.
        dtype: Their type; ``None``: not asked.
        head_dim: Width of attention's heads.
    """
    backend = load_backend(name)
    if reason := backend.unavailable():
        return RuntimeError(f"backend={name!r} cannot run here: {reason}")
    if reason := backend.refusal(device):
        return ValueError(f"backend={name!r} cannot take tensors on {str(device)!r}: {reason}")
    if dtype is not None and dtype not in backend.dtypes:
        *others, last = (str(known).removeprefix("torch.") for known in backend.dtypes)
        known = f"{', '.join(others)} and {last}" if others else last
        return TypeError(
            f"backend={name!r} takes {known}; got {dtype}. Use backend='reference' for {dtype}"
        )
    if backend.max_head_dim is not None and head_dim > backend.max_head_dim:
        return ValueError(
            f"backend={name!r} takes heads of width up to {backend.max_head_dim}; query has "
            f"width {head_dim}. Use backend='auto' or 'reference' for wider heads"
        )
    return None
