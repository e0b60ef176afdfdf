"""Useful work: the bytes an operator must move and the floating point operations it must do.

Every input is read once and every output written once. Operations are those of the matrix products,
a multiplication and an addition being two.
"""

from __future__ import annotations

from dataclasses import dataclass

FLOAT32_BYTES = 4
INT32_BYTES = 4


@dataclass(frozen=True)
class Cost:
    """Useful bytes and floating point operations of one call."""

    bytes: int
    flops: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.flops + other.flops)


def attention_cost(
    batch: int, heads: int, length: int, width: int, itemsize: int, direction: str
) -> Cost:
    """Attention with one weight per key.

    Forward: queries, keys, values and weights in, outputs out; two products (scores, outputs).
    Backward: these, the outputs, their gradients and the log-sum-exp of each row in, three
    gradients out; five products (scores again, since storing them would move more, and the
    gradients of probabilities, queries, keys and values).
    """
    if direction == "forward+backward":
        shape = (batch, heads, length, width, itemsize)
        return attention_cost(*shape, "forward") + attention_cost(*shape, "backward")
    per_head = batch * heads * length * width * itemsize
    weights = batch * length * FLOAT32_BYTES
    product = 2 * batch * heads * length * length * width
    if direction == "forward":
        return Cost(4 * per_head + weights, 2 * product)
    log_sum_exp = batch * heads * length * FLOAT32_BYTES
    return Cost(8 * per_head + weights + log_sum_exp, 5 * product)


def _relevance_inputs(
    batch: int, patches: int, model_width: int, joint_width: int, classes: int, itemsize: int
) -> int:
    tokens = batch * patches * model_width
    joint_space = model_width * joint_width + 2 * model_width  # projection, norm's gain and offset
    return (tokens + joint_space + classes * joint_width) * itemsize


def relevance_cost(
    batch: int, patches: int, model_width: int, joint_width: int, classes: int, itemsize: int
) -> Cost:
    """Patch tokens, norm, projection and classes in, (B, C, N) float32 cosines out.

    Two products: tokens with the projection, features with the classes.
    """
    inputs = _relevance_inputs(batch, patches, model_width, joint_width, classes, itemsize)
    cosines = batch * classes * patches * FLOAT32_BYTES
    flops = 2 * batch * patches * joint_width * (model_width + classes)
    return Cost(inputs + cosines, flops)


def token_weights_cost(
    batch: int,
    patches: int,
    prefix: int,
    model_width: int,
    joint_width: int,
    classes: int,
    itemsize: int,
) -> Cost:
    """Relevance whose cosines stay inside: weights (B, L) and counts (B, N) come out."""
    sizes = (batch, patches, model_width, joint_width, classes, itemsize)
    counts = batch * patches * INT32_BYTES
    weights = batch * (prefix + patches) * FLOAT32_BYTES
    return Cost(_relevance_inputs(*sizes) + weights + counts, relevance_cost(*sizes).flops)


def reweighted_attention_cost(
    batch: int,
    heads: int,
    length: int,
    width: int,
    prefix: int,
    joint_width: int,
    classes: int,
    itemsize: int,
    direction: str,
) -> Cost:
    """Relevance, counts and attention as one: the weights themselves need not exist in memory.

    The attention's bytes for them stand for the counts, which the forward pass writes and the
    backward pass reads. Tokens are as wide as all heads together.
    """
    patches = length - prefix
    relevance = relevance_cost(batch, patches, heads * width, joint_width, classes, itemsize)
    cosines = batch * classes * patches * FLOAT32_BYTES
    attention = attention_cost(batch, heads, length, width, itemsize, direction)
    if direction == "backward":
        return attention
    return Cost(relevance.bytes - cosines, relevance.flops) + attention


def transformer_flops(sequences: int, length: int, width: int, layers: int) -> int:
    """A forward pass through the blocks of a transformer with a fourfold MLP.

    Per token: queries, keys and values 3 D², output projection D², MLP 8 D² multiply-adds; per
    pair of tokens: scores and outputs, D each.
    """
    per_layer = 12 * length * width**2 + 2 * length**2 * width
    return 2 * sequences * layers * per_layer


def step_cost(
    images: int,
    length: int,
    width: int,
    layers: int,
    prompts: int,
    text_length: int,
    text_width: int,
    text_layers: int,
) -> Cost:
    """A fine-tuning step with frozen weights: forward, and a backward pass for activations only.

    A product with a frozen weight costs one product again in the backward pass. So the step is two
    forward passes, and the float32 weights of the blocks are read twice. The low-rank factors, less
    than a hundredth, and everything outside the blocks are not counted.
    """
    forward = transformer_flops(images, length, width, layers) + transformer_flops(
        prompts, text_length, text_width, text_layers
    )
    parameters = 12 * (layers * width**2 + text_layers * text_width**2)
    return Cost(2 * parameters * FLOAT32_BYTES, 2 * forward)


def episode_cost(step: Cost, steps: int, step_on_queries: Cost) -> Cost:
    """The training steps of an episode, and a forward pass with the query images.

    A forward pass is half of a step.
    """
    return Cost(
        steps * step.bytes + step_on_queries.bytes // 2,
        steps * step.flops + step_on_queries.flops // 2,
    )


def fused_memory(
    batch: int,
    heads: int,
    length: int,
    width: int,
    prefix: int,
    classes: int,
    itemsize: int,
    direction: str,
) -> int:
    """Bytes that a fused ``reweighted_attention`` may add to the peak.

    Outputs (B, H, L, d), counts (B, N), one float32 statistic per row and the relevance (B, C, N);
    with the backward pass three gradients and one more statistic per row.
    """
    patches = length - prefix
    per_head = batch * heads * length * width * itemsize
    statistics = batch * heads * length * FLOAT32_BYTES
    relevance = batch * classes * patches * FLOAT32_BYTES
    forward = per_head + statistics + relevance + batch * patches * INT32_BYTES
    return forward if direction == "forward" else forward + 3 * per_head + statistics
