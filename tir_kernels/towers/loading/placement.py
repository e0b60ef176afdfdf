"""Where a model is put."""

from __future__ import annotations

import torch
from torch import nn

from tir_kernels.errors import FewShotError, first_line
from tir_kernels.text import setting


def usable_device(device: str | torch.device) -> torch.device:
    """The device of this name.

    Raises:
        FewShotError: It can't be used here.
    """
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise FewShotError(
            f"{setting('device', device)} can't be used here: {first_line(error)}; "
            f"{setting('device', 'cpu')} always works"
        ) from error
    if target.type == "meta":
        raise FewShotError(
            f"{setting('device', 'meta')} holds no values; pass cpu or another device"
        )
    return target


def moved(model: nn.Module, device: torch.device) -> nn.Module:
    """The model on a device.

    Raises:
        FewShotError: The device can't take it.
    """
    try:
        return model.to(device)
    except RuntimeError as error:  # of which running out of memory is one
        raise FewShotError(
            f"{setting('device', device)} can't take the model: {first_line(error)}; free its "
            "memory, or "
            "pass another device"
        ) from error
