"""The operators as plain PyTorch: what every other backend is measured against.

Everything is computed in float32, or in float64 where an input is float64.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from tir_kernels.precision import without_autocast

from .common import (
    COSINE_EPS,
    KERNEL_DTYPES,
    MAX_EXPONENT,
    empty_gradients,
    empty_result,
)
from .inputs import AttentionInputs, BackwardInputs, RelevanceInputs, StatisticsInputs
from .optional import DropoutInputs
from .protocol import AttentionStatistics, Gradients, Pair

Inputs = TypeVar("Inputs", RelevanceInputs, AttentionInputs, StatisticsInputs)
Others = ParamSpec("Others")
Result = TypeVar("Result")


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    is_double = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if is_double else torch.float32


def _without_autocast(
    function: Callable[Concatenate[Inputs, Others], Result],
) -> Callable[Concatenate[Inputs, Others], Result]:
    """Keep an autocast region around the operator from rounding the products inside it."""

    @functools.wraps(function)
    def run(inputs: Inputs, *args: Others.args, **kwargs: Others.kwargs) -> Result:
        with without_autocast(inputs[0].device.type):
            return function(inputs, *args, **kwargs)

    return run


def _within_range(rows: Tensor, tiny_too: bool = False) -> tuple[Tensor, Tensor]:
    """Rows scaled by powers of two where their squares might overflow; and the powers, (..., 1).

    A row of ordinary magnitude is scaled by 1, and no scaling rounds anything. ``tiny_too``: rows
    whose squares might vanish are scaled as well.
    """
    limit, wanted = 50, 40  # exponents of two
    highest = 1000 if rows.dtype == torch.float64 else 120
    largest = rows.abs().amax(-1, keepdim=True)
    is_extreme = (largest > 2.0**limit) & largest.isfinite()
    if tiny_too:
        is_extreme |= largest < 2.0**-limit
    power = (wanted - torch.frexp(largest)[1]).clamp(max=highest).to(rows.dtype).exp2()
    factor = torch.where(is_extreme, power, 1.0)
    return rows * factor, factor


def _powers_of_weights(weights: Tensor) -> Tensor:
    """Powers of two, (B, L), by which weights are divided, so that probabilities divided by the
    quotients stay in float32's range; 0 for ordinary weights.

    The key that a query attends to most has a probability per weight of 1 / weight, whatever the
    other weights are. Of a tiny weight it is half of the exponent: a probability too small for
    float32 may be a large multiple of the weight. Zeros are taken for the image's largest weight
    where all are tiny.
    """
    ordinary, highest = 60, 120
    largest = weights.amax(-1, keepdim=True).clamp(max=1.0)
    weights = torch.where(weights == 0, largest, weights)
    exponents = torch.frexp(weights)[1] - 1
    halves = torch.div(exponents, 2, rounding_mode="trunc")
    powers = torch.where(exponents < -ordinary, halves, 0)
    powers = torch.where(exponents > ordinary, exponents.clamp(max=highest), powers)
    return powers.masked_fill(~((weights > 0) & weights.isfinite()), 0)


def _normalize(rows: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """``rows / (|rows| + COSINE_EPS)`` for rows that come multiplied by ``scale``, (..., 1)."""
    rows, factor = _within_range(rows, tiny_too=True)
    return rows / (rows.norm(dim=-1, keepdim=True) + COSINE_EPS * (factor * scale))


@_without_autocast
def exact_relevance(inputs: RelevanceInputs) -> Tensor:
    """Relevance in the type it is computed in, so that float64 inputs give a float64 oracle."""
    tokens, class_embeddings, norm_weight, norm_bias, norm_eps, proj, num_prefix_tokens = inputs
    dtype = compute_dtype(tokens, class_embeddings, norm_weight, norm_bias, proj)
    features, factor = _within_range(tokens[:, num_prefix_tokens:].to(dtype))
    scale: Tensor | float = factor
    if norm_eps is not None:
        features = F.layer_norm(
            features,
            features.shape[-1:],
            None if norm_weight is None else norm_weight.to(dtype),
            None if norm_bias is None else norm_bias.to(dtype),
            norm_eps,
        )
        scale = 1.0  # LayerNorm forgets it; beside huge tokens, eps is nothing
    if proj is not None:
        features = features @ proj.to(dtype)
    classes = class_embeddings.to(dtype)
    features, classes = _normalize(features, scale), _normalize(classes)
    batch, num_groups = tokens.shape[0], classes.shape[0]
    grouped = features.reshape(num_groups, batch // num_groups, *features.shape[1:])
    cosines = torch.matmul(classes[:, None], grouped.mT)
    return cosines.reshape(batch, classes.shape[1], features.shape[1])


def count_selections(relevance: Tensor, top_k: int) -> Tensor:
    """(B, C, N) relevance -> (B, N) int32: how many classes have a token among their top_k.

    Ties go to the lower token index and NaN ranks below every number. Two stable sorts give exactly
    that order: by value first, then numbers before NaN.
    """
    batch, _, num_patches = relevance.shape
    is_nan = relevance.isnan()
    by_value = relevance.masked_fill(is_nan, -torch.inf).sort(dim=-1, descending=True, stable=True)[
        1
    ]
    numbers_first = is_nan.gather(-1, by_value).to(torch.uint8).sort(dim=-1, stable=True)[1]
    selected = by_value.gather(-1, numbers_first)[..., :top_k]
    is_selected = torch.zeros_like(relevance, dtype=torch.int32).scatter_(-1, selected, 1)
    return is_selected.sum(1, dtype=torch.int32).reshape(batch, num_patches)


def look_up_weights(counts: Tensor, table: Tensor, num_prefix_tokens: int) -> Tensor:
    """(B, N) counts and (C + 1,) table -> (B, L) weights, with 1 for the prefix tokens."""
    return F.pad(table[counts.long()], (num_prefix_tokens, 0), value=1.0)


def _masked(tensor: Tensor, weights: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Keys or values, 0 in rows that no query attends to, so that not even NaN gets out."""
    rows = tensor.to(dtype)
    return rows if weights is None else rows.masked_fill((weights <= 0)[:, None, :, None], 0.0)


def _without_later_keys(scores: Tensor, is_causal: bool) -> Tensor:
    """(B, H, Lq, L) scores or exponents, -inf where a query i must not see a key j > i."""
    if not is_causal:
        return scores
    is_later = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(is_later, -torch.inf)


def _attend(inputs: AttentionInputs | StatisticsInputs) -> Pair:
    """Probabilities (B, H, Lq, L) and log-sum-exp (B, H, Lq), in the type they are computed in."""
    query, key, weights, scale = inputs.query, inputs.key, inputs.weights, inputs.scale
    dtype = compute_dtype(query, weights)
    scores = query.to(dtype) @ _masked(key, weights, dtype).mT * scale
    scores = _without_later_keys(scores, inputs.is_causal)
    if weights is not None:
        # Adding log(weight) to the scores is the definition; the maximum is then taken over
        # attended keys only, and a row that attends to nothing has a log-sum-exp of -inf.
        scores = scores + weights.to(dtype).clamp(min=0).log()[:, None, None, :]
    log_sum_exp = scores.logsumexp(-1)
    empty_row = log_sum_exp.isneginf()[..., None]
    return (scores - log_sum_exp[..., None]).exp().masked_fill(empty_row, 0.0), log_sum_exp


@_without_autocast
def attention_forward(inputs: AttentionInputs) -> Pair:
    probabilities, log_sum_exp = _attend(inputs)
    output = probabilities @ _masked(inputs.value, inputs.weights, probabilities.dtype)
    return empty_result(inputs.query).copy_(output), log_sum_exp


@_without_autocast
def attention_statistics(inputs: StatisticsInputs) -> AttentionStatistics:
    weights, num_prefix_tokens = inputs.weights, inputs.num_prefix_tokens
    probabilities, log_sum_exp = _attend(inputs)

    def received_from(queries: slice) -> Tensor:
        rows = probabilities[:, :, queries]
        means = rows.sum(2) / max(rows.shape[2], 1)
        return means if weights is None else means.masked_fill((weights <= 0)[:, None], 0.0)

    return AttentionStatistics(
        received_from(slice(num_prefix_tokens)),
        received_from(slice(num_prefix_tokens, None)),
        torch.special.entr(probabilities).sum(-1),
        log_sum_exp,
    )


@_without_autocast
def attention_backward(inputs: AttentionInputs, backward: BackwardInputs) -> Gradients:
    query, key, value, weights, scale, is_causal = inputs
    dtype = compute_dtype(query, weights)
    queries, keys, values = (t.to(dtype) for t in (query, key, value))
    output, grads = backward.output.to(dtype), backward.grad_output.to(dtype)
    empty_row = backward.log_sum_exp.isneginf()[..., None]
    log_sums = backward.log_sum_exp.to(dtype)[..., None]
    shift: Tensor | float = 0.0
    if weights is not None:
        # At weight 0 the derivative of the weight has a finite limit that needs the true key and
        # value, so these are zeroed only where the weight is negative, which acts as a constant 0.
        is_negative = (weights < 0)[:, None, :, None]
        keys, values = keys.masked_fill(is_negative, 0.0), values.masked_fill(is_negative, 0.0)
        # A probability divided by a huge or tiny weight would leave float32's range.
        powers = _powers_of_weights(weights.to(dtype)).to(dtype)
        scaled = weights.to(dtype).clamp(min=0) * torch.exp2(-powers)
        shift = (powers * math.log(2))[:, None, None, :]

    exponents = queries @ keys.mT * scale - log_sums + shift
    exponents = _without_later_keys(exponents, is_causal).clamp(max=MAX_EXPONENT)
    per_weight = exponents.exp().masked_fill(empty_row, 0.0)  # probability / scaled weight
    grad_probabilities = grads @ values.mT
    delta = (grads * output).sum(-1, keepdim=True)
    grad_per_weight = per_weight * (grad_probabilities - delta)
    grad_weights = query.new_empty(0, dtype=dtype if weights is None else weights.dtype)

    probabilities, grad_scores = per_weight, grad_per_weight
    if weights is not None:
        factor, ignored = scaled[:, None, None, :], (weights <= 0)[:, None, None, :]
        probabilities = (per_weight * factor).masked_fill(ignored, 0.0)
        grad_scores = (grad_per_weight * factor).masked_fill(ignored, 0.0)
        if backward.needs_weights_grad:
            of_weights = grad_per_weight.sum((1, 2)).masked_fill(weights < 0, 0.0)
            grad_weights = (of_weights * torch.exp2(-powers)).to(weights.dtype)
    grad_query = grad_scores @ _masked(key, weights, dtype) * scale
    grad_key = grad_scores.mT @ queries * scale
    grad_value = probabilities.mT @ grads
    first, second, third = empty_gradients(inputs, backward.is_packed)
    return first.copy_(grad_query), second.copy_(grad_key), third.copy_(grad_value), grad_weights


def philox_dropout(inputs: DropoutInputs, output: Tensor) -> None:
    rows, seeds, step, stream, first_branch, threshold, scale = inputs
    groups, branches, sequences, length, width = output.shape
    device = rows.device
    num_blocks = (width + 7) // 8

    def counter(count: int, dimension: int) -> Tensor:
        shape = [1] * 5
        shape[dimension] = count
        return torch.arange(count, device=device).view(shape)

    place = counter(num_blocks, 4) | (counter(branches, 1) + first_branch << 16) | stream << 24
    counters = [place, counter(length, 3), counter(sequences, 2), step.view([1] * 5)]
    words = _philox(counters, seeds.view(-1, 1, 1, 1, 1))
    shape = (groups, branches, sequences, length, num_blocks)
    bits = [half.expand(shape) for word in words for half in (word & 0xFFFF, word >> 16)]
    is_kept = torch.cat(bits, -1)[..., :width] >= threshold
    output.copy_(torch.where(is_kept, rows[:, None].to(compute_dtype(rows)) * scale, 0.0))


def _philox(counter: list[Tensor], key: Tensor) -> list[Tensor]:
    """Philox4x32-10 on int64 tensors that hold 32 bits each; the key holds 64."""
    low = 0xFFFFFFFF
    keys = [key & low, key >> 32 & low]
    for _ in range(10):
        first, second = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57  # modulo 2^64
        counter = [
            (second >> 32 & low) ^ counter[1] ^ keys[0],
            second & low,
            (first >> 32 & low) ^ counter[3] ^ keys[1],
            first & low,
        ]
        keys = [keys[0] + 0x9E3779B9 & low, keys[1] + 0xBB67AE85 & low]
    return counter


def bias_activation(
    hidden: Tensor, bias: Tensor | None, kind: str, grad_output: Tensor | None
) -> Tensor:
    """The activation, or the gradient of ``hidden`` where there is one of the output."""
    dtype = compute_dtype(hidden)
    x = hidden.to(dtype) if bias is None else hidden.to(dtype) + bias.to(dtype)
    if kind != "quick_gelu":
        approximate = "tanh" if kind == "gelu_tanh" else "none"
        if grad_output is None:
            return F.gelu(x, approximate=approximate).to(hidden.dtype)
        grads = torch.ops.aten.gelu_backward(grad_output.to(dtype), x, approximate=approximate)
        return grads.to(hidden.dtype)
    sigmoid = torch.sigmoid(1.702 * x)
    if grad_output is None:
        return (x * sigmoid).to(hidden.dtype)
    slope = sigmoid * (1 + 1.702 * x * (1 - sigmoid))
    return (grad_output.to(dtype) * slope).to(hidden.dtype)


def add_norm(
    hidden: Tensor,
    change: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    total: Tensor,
    normed: Tensor,
) -> None:
    """Fill the sum, if there is a change, and it normalised."""
    if change is not None:
        hidden = total.copy_(hidden + change)
    dtype = compute_dtype(hidden)
    gains = weight.to(dtype), None if bias is None else bias.to(dtype)
    normed.copy_(F.layer_norm(hidden.to(dtype), hidden.shape[-1:], *gains, eps))


def add_norm_backward(
    total: Tensor,
    weight: Tensor,
    grad_total: Tensor | None,
    grad_normed: Tensor,
    eps: float,
    grad_hidden: Tensor,
    grad_change: Tensor,
) -> None:
    """Fill the gradient of the sum, and where it has room, the same in another type."""
    dtype = compute_dtype(total)
    centred = total.to(dtype) - total.to(dtype).mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    normed, slope = centred * scale, grad_normed.to(dtype) * weight.to(dtype)
    along_normed = (slope * normed).mean(-1, keepdim=True)
    grad = scale * (slope - slope.mean(-1, keepdim=True) - normed * along_normed)
    grad_hidden.copy_(grad if grad_total is None else grad + grad_total)
    if grad_change.numel():
        grad_change.copy_(grad if grad_total is None else grad + grad_total)


class ReferenceBackend:
    """Plain PyTorch, on any device and in float64 too."""

    name = "reference"
    max_head_dim = None
    dtypes = (*KERNEL_DTYPES, torch.float64)
    attention_forward = staticmethod(attention_forward)
    attention_backward = staticmethod(attention_backward)
    attention_statistics = staticmethod(attention_statistics)
    philox_dropout = staticmethod(philox_dropout)
    bias_activation = staticmethod(bias_activation)
    add_norm = staticmethod(add_norm)
    add_norm_backward = staticmethod(add_norm_backward)

    def unavailable(self) -> str:
        return ""

    def refusal(self, device: torch.device) -> str:
        return ""

    def relevance(self, inputs: RelevanceInputs) -> Tensor:
        return exact_relevance(inputs).float()

    def token_weights(self, inputs: RelevanceInputs, table: Tensor, top_k: int) -> Pair:
        counts = count_selections(self.relevance(inputs), top_k)
        return look_up_weights(counts, table, inputs.num_prefix_tokens), counts
