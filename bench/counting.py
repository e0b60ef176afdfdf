"""Useful work: the bytes an operator must move and the floating point operations it must do.

Every input is read once and every output written once. Operations are those of the matrix products,
a multiplication and an addition being two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .shapes import Point

NUMBER_BYTES = 4  # of float32 and int32


@dataclass(frozen=True)
class Cost:
    """Useful bytes and floating point operations of one call."""

    bytes: int
    flops: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.flops + other.flops)


class Transformer(NamedTuple):
    """Sequences of one length that pass through the blocks of a transformer."""

    sequences: int
    length: int
    width: int
    layers: int


def attention_cost(point: Point, direction: str) -> Cost:
    """Attention with one weight per key.

    Forward: queries, keys, values and weights in, outputs out; two products (scores, outputs).
    Backward: these, the outputs, their gradients and the log-sum-exp of each row in, three
    gradients out; five products (scores again, since storing them would move more, and the
    gradients of probabilities, queries, keys and values). Products are of the pairs that a query
    sees.
    """
    if direction == "forward+backward":
        return attention_cost(point, "forward") + attention_cost(point, "backward")
    weights = point.images * point.length * NUMBER_BYTES
    product = 2 * point.pairs * point.head_dim
    # Queries and outputs, keys and values: half of all tensors are of either kind.
    tensors = (point.rows + point.key_rows) * point.head_dim * point.itemsize
    if direction == "forward":
        return Cost(2 * tensors + weights, 2 * product)
    log_sum_exp = point.rows * NUMBER_BYTES
    return Cost(4 * tensors + weights + log_sum_exp, 5 * product)


def statistics_cost(point: Point) -> Cost:
    """Queries, keys and weights in, four results out; one product, which gives the scores."""
    others = (point.images * point.length + 4 * point.rows) * NUMBER_BYTES
    return Cost(2 * _head_bytes(point) + others, 2 * point.rows * point.length * point.head_dim)


def relevance_cost(point: Point) -> Cost:
    """Patch tokens, norm, projection and classes in, (B, C, N) float32 cosines out.

    Two products: tokens with the projection, features with the classes.
    """
    tokens = point.images * point.patches * point.model_dim
    # Projection, norm's gain and offset.
    joint_space = point.model_dim * point.joint_dim + 2 * point.model_dim
    inputs = (tokens + joint_space + point.num_classes * point.joint_dim) * point.itemsize
    features = point.images * point.patches * point.joint_dim
    return Cost(inputs + _cosine_bytes(point), 2 * features * (point.model_dim + point.num_classes))


def token_weights_cost(point: Point) -> Cost:
    """Relevance whose cosines stay inside: weights (B, L) and counts (B, N) come out."""
    relevance = relevance_cost(point)
    weights = point.images * point.length * NUMBER_BYTES
    inside = _cosine_bytes(point) - _count_bytes(point) - weights
    return Cost(relevance.bytes - inside, relevance.flops)


def reweighted_attention_cost(point: Point, direction: str) -> Cost:
    """Relevance, counts and attention as one: the weights themselves need not exist in memory.

    The attention's bytes for them stand for the counts, which the forward pass writes and the
    backward pass reads. Tokens are as wide as all heads together.
    """
    attention = attention_cost(point, direction)
    if direction == "backward":
        return attention
    relevance = relevance_cost(point)
    return Cost(relevance.bytes - _cosine_bytes(point), relevance.flops) + attention


def fused_memory(point: Point, direction: str) -> int:
    """Bytes that a fused ``reweighted_attention`` may add to the peak.

    Outputs (B, H, L, d), counts (B, N), one float32 statistic per row and the relevance (B, C, N);
    with the backward pass three gradients and one more statistic per row.
    """
    statistics = point.rows * NUMBER_BYTES
    forward = _head_bytes(point) + statistics + _cosine_bytes(point) + _count_bytes(point)
    return forward if direction == "forward" else forward + 3 * _head_bytes(point) + statistics


def score_bytes(point: Point) -> int:
    """Size of one (B, H, L, L) tensor of float32."""
    return point.rows * point.length * NUMBER_BYTES


def _head_bytes(point: Point) -> int:
    return point.rows * point.head_dim * point.itemsize


def _cosine_bytes(point: Point) -> int:
    return point.images * point.num_classes * point.patches * NUMBER_BYTES


def _count_bytes(point: Point) -> int:
    return point.images * point.patches * NUMBER_BYTES


def transformer_flops(tower: Transformer) -> int:
    """A forward pass through the blocks of a transformer with a fourfold MLP.

    Per token: queries, keys and values 3 D², output projection D², MLP 8 D² multiply-adds; per
    pair of tokens: scores and outputs, D each.
    """
    per_layer = 12 * tower.length * tower.width**2 + 2 * tower.length**2 * tower.width
    return 2 * tower.sequences * tower.layers * per_layer


def step_cost(*towers: Transformer) -> Cost:
    """A fine-tuning step with frozen weights: forward, and a backward pass for activations only.

    A product with a frozen weight costs one product again in the backward pass. So the step is two
    forward passes, and the float32 weights of the blocks are read twice. The low-rank factors, less
    than a hundredth, and everything outside the blocks are not counted.
    """
    forward = sum(map(transformer_flops, towers))
    parameters = 12 * sum(tower.layers * tower.width**2 for tower in towers)
    return Cost(2 * parameters * NUMBER_BYTES, 2 * forward)


def episode_cost(step: Cost, steps: int, step_on_queries: Cost) -> Cost:
    """The training steps of an episode, and a forward pass with the query images.

    A forward pass is half of a step.
    """
    return Cost(
        steps * step.bytes + step_on_queries.bytes // 2,
        steps * step.flops + step_on_queries.flops // 2,
    )
