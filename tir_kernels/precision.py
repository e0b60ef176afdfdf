"""The type that an autocast region around a call asks for, and a way not to follow it."""

from __future__ import annotations

import contextlib
from typing import Any

import torch


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The type in which an autocast region around the call multiplies on such a device.

    ``None`` where there is no such region; "meta" tensors know none at all.
    """
    if not torch.amp.is_autocast_available(device_type):
        return None
    if not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Keep an autocast region around the call from rounding the products inside."""
    if autocast_dtype(device_type) is None:
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)
