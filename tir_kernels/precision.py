"""The type that an autocast region asks for."""

from __future__ import annotations

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
