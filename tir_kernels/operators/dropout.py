"""Philox dropout: random numbers that are counted, not drawn one after the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tir_kernels.backends.optional import DropoutInputs
from tir_kernels.operators.checks import require_same_device, require_tensor
from tir_kernels.operators.choose import choose_backend, require_backend
from tir_kernels.operators.library import OPS, define, define_fake
from tir_kernels.scalars import real_number, whole_number


def philox_dropout(
    rows: Tensor,
    seeds: Tensor,
    step: Tensor,
    *,
    stream: int = 0,
    first_branch: int = 0,
    num_branches: int = 1,
    probability: float = 0.5,
    backend: str = "auto",
) -> Tensor:
    """Dropout without state: the random numbers are counted, not drawn one after the other.

    Whether a channel is kept depends on its group's seed, on ``stream``, branch and ``step``, on
    the number of its sequence in the group, its position and its channel: not on the device or the
    backend, the other groups or how far sequences are padded. Calling again gives the same. No
    gradient flows.

    Args:
        rows: (G, S, T, D) of G groups of S sequences; float32, float16, bfloat16 or, on the
            reference backend, float64.
        seeds: (G,) int64, on the device of ``rows``.
        step: (1,) int64 in [0, 2^32), on the device of ``rows``.
        stream: Which layer asks, in [0, 256).
        first_branch, num_branches: Each of K branches gets dropout of its own, numbered from
            ``first_branch``; the numbers end before 256.
        probability: Of being dropped, in [0, 1); rounded to a multiple of 2^-16.
        backend: "auto", or a name of :func:`available_backends` that has this operation.

    Returns:
        (G, K, S, T, D) in the type of ``rows``: 0 where dropped, else ``rows / (1 - probability)``.

    Raises:
        ValueError, TypeError: A shape, type or number outside these, or a backend that has no
            dropout.
        RuntimeError: A backend that cannot run here.
    """
    numbers = check_dropout(
        rows, seeds, step, (stream, first_branch, num_branches), probability, backend
    )
    return OPS.philox_dropout(rows.detach(), seeds, step, *numbers, backend)


def check_dropout(
    rows: Tensor,
    seeds: Tensor,
    step: Tensor,
    places: tuple[int, int, int],
    probability: float,
    backend: str,
) -> tuple[int, int, int, float]:
    """The numbers of a dropout as such: of its ``places``, the stream and branches, and the last.

    Raises:
        ValueError, TypeError: An unsuitable one.
    """
    require_backend(backend)
    require_tensor("rows", rows, "(G, S, T, D)")
    for name, tensor, shape in (("seeds", seeds, rows.shape[:1]), ("step", step, (1,))):
        if not isinstance(tensor, Tensor) or tensor.dtype != torch.int64:
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be an int64 tensor; got {kind}")
        if tensor.shape != shape:
            raise ValueError(
                f"{name} must have shape {tuple(shape)} beside rows of shape {tuple(rows.shape)}; "
                f"got {tuple(tensor.shape)}"
            )
        require_same_device(name, tensor, "rows", rows)
    probability = real_number("probability", probability)
    if not 0 <= probability < 1:
        raise ValueError(f"probability must lie in [0, 1); got {probability}")
    names = ("stream", "first_branch", "num_branches")
    stream, first_branch, num_branches = (
        whole_number(name, place) for name, place in zip(names, places, strict=True)
    )
    end_branch = first_branch + num_branches
    if not (0 <= stream < 256 and 0 <= first_branch <= end_branch <= 256):
        raise ValueError(
            f"stream and branches must lie in [0, 256); got stream {stream}, branches "
            f"{first_branch} to {end_branch - 1}"
        )
    return stream, first_branch, num_branches, probability


@define(
    "philox_dropout(Tensor rows, Tensor seeds, Tensor step, int stream, int first_branch, "
    "int num_branches, float probability, str backend) -> Tensor"
)
def _philox_dropout(*arguments: Any) -> Tensor:
    rows, seeds, step, stream, first_branch, _, probability, name = arguments
    backend: Any = choose_backend(name, "philox_dropout", rows.device, rows.dtype)
    output = _fake_dropout(*arguments)
    if output.numel() == 0:
        return output
    inputs = dropout_inputs(rows, seeds, step, stream, first_branch, probability)
    backend.philox_dropout(inputs, output)
    return output


def dropout_inputs(
    rows: Tensor, seeds: Tensor, step: Tensor, stream: int, first_branch: int, probability: float
) -> DropoutInputs:
    """What a backend is given."""
    # 16 bits decide: what is drawn has a probability that is a multiple of 2^-16.
    threshold = min(round(probability * 2**16), 2**16 - 1)
    scale = 1 / (1 - threshold / 2**16)
    return DropoutInputs(rows.contiguous(), seeds, step, stream, first_branch, threshold, scale)


@define_fake("philox_dropout")
def _fake_dropout(rows: Tensor, *rest: Any) -> Tensor:
    num_branches = rest[4]
    return rows.new_empty((rows.shape[0], num_branches, *rows.shape[1:]))
