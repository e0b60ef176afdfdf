"""The oracle of results: float64, and the error plain PyTorch itself makes.

The rule: against float64, our largest and our mean error may be at most twice that of the same
formula in plain PyTorch at the same dtype, plus one rounding step of the largest value.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tir_kernels import JointSpace
from tir_kernels.backends.common import MAX_EXPONENT
from tir_kernels.backends.inputs import AttentionInputs, BackwardInputs, RelevanceInputs
from tir_kernels.backends.protocol import Backend
from tir_kernels.backends.reference import ReferenceBackend
from tir_kernels.backends.reference import exact_relevance as relevance_in_float64

REFERENCE = ReferenceBackend()


def assert_as_accurate(
    name: str, ours: Tensor, plain: Tensor, exact: Tensor, magnitude: Tensor | None = None
) -> None:
    """Compare with ``exact`` (float64); ``plain`` is plain PyTorch's result at our dtype.

    ``magnitude`` is the sum of the absolute values of the terms that ``exact`` sums, in float32
    arithmetic: where they cancel, a rounding step of the terms is more than one of the result.
    """
    assert ours.shape == exact.shape, name
    assert ours.isfinite().all(), f"{name} is not finite"
    if ours.numel() == 0:
        return
    step = torch.finfo(plain.dtype).eps * exact.abs()
    if magnitude is not None:
        step += torch.finfo(torch.float32).eps * magnitude
    error, plain_error = (ours.double() - exact).abs(), (plain.double() - exact).abs()
    assert error.max() <= 2 * plain_error.max() + step.max(), (
        f"{name}: largest error {error.max():.3g}, plain PyTorch's {plain_error.max():.3g}"
    )
    assert error.mean() <= 2 * plain_error.mean() + step.mean(), (
        f"{name}: mean error {error.mean():.3g}, plain PyTorch's {plain_error.mean():.3g}"
    )


def run_attention(
    backend: Backend, inputs: AttentionInputs, grad_output: Tensor, needs_weights_grad: bool = True
) -> tuple[Tensor, ...]:
    """Output, log-sum-exp, and the gradients of query, key, value and weights by a backend."""
    output, log_sum_exp = backend.attention_forward(inputs)
    backward = BackwardInputs(output, log_sum_exp, grad_output, needs_weights_grad)
    return (output, log_sum_exp, *backend.attention_backward(inputs, backward))


def _bias(q: Tensor, k: Tensor, weights: Tensor, is_causal: bool) -> Tensor:
    """(B, 1, Lq, L), what is added to the scores: logarithms of weights, -inf for later keys."""
    bias = weights.clamp(min=0).log()[:, None, None, :].expand(-1, 1, q.shape[2], -1)
    if not is_causal:
        return bias
    is_later = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
    return bias.masked_fill(is_later, -torch.inf)


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, weights: Tensor, scale: float, is_causal: bool = False
) -> Tensor:
    """Weighted attention as anyone would write it in PyTorch, at the dtype of q."""
    bias = _bias(q, k, weights, is_causal)
    attended = (bias > -torch.inf).any(-1, keepdim=True)
    scores = (q @ k.mT * scale).float() if q.dtype != torch.float64 else q @ k.mT * scale
    scores = scores + bias.to(scores.dtype)
    probabilities = torch.where(attended, scores, 0.0).softmax(-1) * attended
    return probabilities.to(q.dtype) @ v


def plain_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor,
    scale: float,
    grad_output: Tensor,
    is_causal: bool = False,
) -> tuple[Tensor, ...]:
    """Output and gradients of q, k, v by autograd through :func:`plain_attention`."""
    inputs = [t.detach().requires_grad_() for t in (q, k, v)]
    output = plain_attention(*inputs, weights, scale, is_causal)
    return (output.detach(), *torch.autograd.grad(output, inputs, grad_output))


def exact_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor,
    scale: float,
    grad_output: Tensor,
    is_causal: bool = False,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Output and gradients of q, k, v and weights in float64, and the magnitudes of their terms.

    A backward pass is given the output as it was stored, rounded to the type of q. The gradients
    of the scores subtract its product with ``grad_output``, so one rounding of it is among their
    terms. It is also given the log-sum-exp as it was stored, in float32, and subtracts that from
    the scores: far from 0, as where weights are small, a rounding step of it is more than one of
    the scores.
    """
    rounding = max(1.0, torch.finfo(q.dtype).eps / 2 / torch.finfo(torch.float32).eps)
    q, k, v, weights, grad_output = (t.double() for t in (q, k, v, weights, grad_output))
    inputs = AttentionInputs(q, k, v, weights, scale, is_causal)
    output, log_sum_exp, *grads = run_attention(REFERENCE, inputs, grad_output)
    empty = log_sum_exp.isneginf()[..., None]
    per_weight = (q @ k.mT * scale - log_sum_exp[..., None]).clamp(max=MAX_EXPONENT)
    # An exponential passes on the rounding of its argument's terms.
    score_terms = q.abs() @ k.abs().mT * abs(scale)
    per_weight = per_weight.exp().masked_fill(empty, 0.0)
    if is_causal:
        per_weight = per_weight.tril()
    positive = weights.clamp(min=0)[:, None, None, :]
    forward = per_weight * positive * (1 + score_terms)
    per_weight = per_weight * (1 + score_terms + log_sum_exp.abs()[..., None].masked_fill(empty, 0))
    probabilities = per_weight * positive
    upstream = grad_output.abs()
    stored = (upstream * output.abs()).sum(-1, keepdim=True) * rounding
    terms = upstream @ v.abs().mT + stored
    magnitudes = (
        forward @ v.abs(),
        probabilities * terms @ k.abs() * abs(scale),
        (probabilities * terms).mT @ q.abs() * abs(scale),
        probabilities.mT @ upstream,
        (per_weight * terms).sum((1, 2)),
    )
    return (output, *grads), magnitudes


def plain_weight_gradient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor,
    scale: float,
    grad_output: Tensor,
    is_causal: bool = False,
) -> Tensor:
    """Gradient of the weights as plain PyTorch computes it: all operands at the dtype of q."""
    scores = (q @ k.mT * scale).float()
    bias = _bias(q, k, weights, is_causal)
    log_sums = (scores + bias).logsumexp(-1, keepdim=True)
    empty = log_sums.isneginf()
    per_weight = (scores - log_sums).clamp(max=MAX_EXPONENT).exp().masked_fill(empty, 0.0)
    if is_causal:
        per_weight = per_weight.tril()
    output = plain_attention(q, k, v, weights, scale, is_causal)
    delta = (grad_output * output).float().sum(-1, keepdim=True)
    grads = per_weight * ((grad_output @ v.mT).float() - delta)
    return grads.sum((1, 2)).masked_fill(weights < 0, 0.0)


def assert_attention_as_accurate(
    ours: Sequence[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor,
    scale: float,
    grad_output: Tensor,
    is_causal: bool = False,
) -> None:
    """Compare our output and gradients of q, k, v and weights with float64."""
    arguments = (q, k, v, weights, scale, grad_output, is_causal)
    plain = (*plain_gradients(*arguments), plain_weight_gradient(*arguments))
    exact, magnitudes = exact_attention(*arguments)
    names = ("output", "grad q", "grad k", "grad v", "grad weights")
    for name, *results in zip(names, ours, plain, exact, magnitudes, strict=True):
        assert_as_accurate(name, *results)


def plain_relevance(tokens: Tensor, classes: Tensor, space: JointSpace, prefix: int) -> Tensor:
    """The relevance as anyone would write it, every step at the dtype of the tokens."""
    dtype = tokens.dtype
    features = tokens[:, prefix:]
    if space.norm_eps is not None:
        parts = (None if p is None else p.to(dtype) for p in (space.norm_weight, space.norm_bias))
        features = F.layer_norm(features, features.shape[-1:], *parts, space.norm_eps)
    if space.proj is not None:
        features = features @ space.proj.to(dtype)
    classes = classes.to(dtype).reshape(-1, *classes.shape[-2:])
    classes = classes.repeat_interleave(len(tokens) // len(classes), 0)
    least = torch.finfo(dtype).tiny  # float16 has no 1e-8, and 0 / 0 would say nothing
    features = features / (features.norm(dim=-1, keepdim=True) + 1e-8).clamp(min=least)
    classes = classes / (classes.norm(dim=-1, keepdim=True) + 1e-8).clamp(min=least)
    return classes @ features.mT


def exact_relevance(
    tokens: Tensor, classes: Tensor, space: JointSpace, prefix: int
) -> tuple[Tensor, Tensor]:
    """Relevance (B, C, N) in float64, and the magnitude of its terms."""
    parts = (space.norm_weight, space.norm_bias, space.proj)
    weight, bias, proj = (None if p is None else p.double() for p in parts)
    groups = classes.double().reshape(-1, *classes.shape[-2:])
    exact = relevance_in_float64(
        RelevanceInputs(tokens.double(), groups, weight, bias, space.norm_eps, proj, prefix)
    )
    normed = tokens[:, prefix:].double()
    if space.norm_eps is not None:
        normed = F.layer_norm(normed, normed.shape[-1:], weight, bias, space.norm_eps)
    features, terms = (normed, normed.abs())
    if proj is not None:
        features, terms = normed @ proj, normed.abs() @ proj.abs()
    per_image = groups.repeat_interleave(len(tokens) // len(groups), 0)
    # As in the formula, so that a feature of nothing but zeros has a magnitude too.
    norms = (per_image.norm(dim=-1) + 1e-8)[..., None] * (features.norm(dim=-1) + 1e-8)[:, None]
    return exact, per_image.abs() @ terms.mT / norms


def pick_counts(relevance: Tensor, top_k: int) -> Tensor:
    """(B, C, N) -> (B, N) counts by sorting tuples in Python: slow, and plainly right."""
    batch, num_classes, num_patches = relevance.shape
    counts = torch.zeros(batch, num_patches, dtype=torch.int32)
    for b in range(batch):
        for c in range(num_classes):
            row = relevance[b, c].tolist()
            order = sorted(
                range(num_patches),
                key=lambda n: (row[n] != row[n], -row[n] if row[n] == row[n] else 0.0, n),
            )
            counts[b, order[:top_k]] += 1
    return counts
