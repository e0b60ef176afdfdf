"""The operators as Triton kernels, for CUDA devices of capability 8.0 and newer.

Nothing here imports Triton before a question is asked that needs it. Under ``TRITON_INTERPRET=1``
the kernels run on the CPU, slowly, which is how they are tested where there is no GPU.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from ..common import reason_of_all

MAX_HEAD_DIM = 256
MIN_CAPABILITY = (8, 0)


def interpreter_is_on() -> bool:
    """Whether Triton interprets kernels instead of compiling them, by Triton's own reading."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def unavailable_reason() -> str:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton (Linux)"
    if interpreter_is_on():
        return ""
    if not torch.cuda.is_available():
        return (
            "no CUDA device is visible to PyTorch; use the cpu backend, or set TRITON_INTERPRET=1 "
            "to run the kernels slowly on the CPU"
        )
    return reason_of_all(_card_reason)


def device_reason(device: torch.device) -> str:
    if interpreter_is_on() and device.type in ("cpu", "cuda"):
        return ""
    if device.type == "cuda":
        return _card_reason(device.index)
    return f"Triton kernels run on CUDA tensors, not on {device.type!r}; use another backend there"


def _card_reason(index: int | None) -> str:
    capability = torch.cuda.get_device_capability(index)
    if capability >= MIN_CAPABILITY:
        return ""
    return (
        f"{torch.cuda.get_device_name(index)} has compute capability "
        f"{capability[0]}.{capability[1]}, and at least "
        f"{MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]} is needed; use the reference backend"
    )


def relevance(
    tokens: Tensor,
    class_embeddings: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float | None,
    proj: Tensor | None,
    num_prefix_tokens: int,
) -> Tensor:
    from .kernels.relevance import relevance as launch

    return launch(
        tokens, class_embeddings, norm_weight, norm_bias, norm_eps, proj, num_prefix_tokens
    )


def token_weights(
    tokens: Tensor,
    class_embeddings: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float | None,
    proj: Tensor | None,
    table: Tensor,
    top_k: int,
    num_prefix_tokens: int,
) -> tuple[Tensor, Tensor]:
    from .kernels.selection import select_and_weigh

    scores = relevance(
        tokens, class_embeddings, norm_weight, norm_bias, norm_eps, proj, num_prefix_tokens
    )
    return select_and_weigh(scores, table, top_k, num_prefix_tokens)


def attention_forward(
    query: Tensor, key: Tensor, value: Tensor, weights: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    from .kernels.attention_forward import attention_forward as launch

    return launch(query, key, value, weights, scale)


def attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    scale: float,
    needs_weights_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from .kernels.attention_backward import attention_backward as launch

    return launch(
        grad_output,
        query,
        key,
        value,
        weights,
        output,
        log_sum_exp,
        scale,
        needs_weights_grad,
    )


def philox_dropout(
    rows: Tensor,
    seeds: Tensor,
    step: Tensor,
    stream: int,
    first_branch: int,
    threshold: int,
    scale: float,
    output: Tensor,
) -> None:
    from .kernels.dropout import philox_dropout as launch

    launch(rows, seeds, step, stream, first_branch, threshold, scale, output)
