"""The tensors of one shape, shared by all implementations, and what is right for them.

Float64 is computed for a few images and heads, chosen at both ends of the batch: whatever an
implementation does to one image it does to all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tir_kernels import AttentionStatistics, JointSpace, WeightRule

from .cases import WrongResultError
from .formulas import plain_attention, plain_relevance, plain_statistics
from .settings import DTYPES
from .shapes import PREFIX_TOKENS, Point
from .timing import Call

# Allowed distance from float64, as a share of the norm: four rounding steps of the type. float32
# products may run in TF32, whose step is 2^-10, where PyTorch's settings say so.
_STEP = {torch.float32: 2**-10, torch.float16: 2**-10, torch.bfloat16: 2**-7}
_STEPS = 4

# Share of the selections that rounding may turn: those that lie next to the threshold.
_TURNED = {torch.float32: 0.002, torch.float16: 0.02, torch.bfloat16: 0.02}


# The result of an operator; of the whole one, with ``return_weights=True``, its weights too.
Forward = Callable[..., Any]


class Problem:
    """The tensors of one shape.

    Attributes:
        arguments: For the plain formula.
        options: For our operator, by name.
        leaves: Tensors that gradients are taken for.
        grad_output: The gradient of the output.
    """

    arguments: tuple[Any, ...]
    options: dict[str, Any]
    leaves: tuple[Tensor, ...] = ()
    grad_output: Tensor | None = None

    def verify(self, forward: Forward, direction: str, *, is_weighted: bool = True) -> None:
        """Compare a forward pass, and with a backward pass its gradients, with float64.

        Raises:
            WrongResultError: One of the results is off.
        """
        raise NotImplementedError

    def call(self, forward: Forward, direction: str) -> Call:
        """What is timed: the forward pass, the backward pass of one forward pass, or both."""
        if direction == "forward":
            return torch.no_grad()(forward)
        if direction == "backward":
            gradients = functools.partial(torch.autograd.grad, forward(), retain_graph=True)
            return functools.partial(gradients, self.leaves, self.grad_output)
        return lambda: torch.autograd.grad(forward(), self.leaves, self.grad_output)


class AttentionProblem(Problem):
    """Query, key, value as views of a packed projection, key weights and an upstream gradient.

    Attributes:
        leaves: Query, key and value (B, H, L, d), views of (B, L, 3, H, d); another number of
            queries than keys is a projection of its own.
        weights: (B, L) float32, positive.
        grad_output: (B, H, Lq, d).
        is_causal: Whether a query sees the keys up to its own place alone.
    """

    grad_output: Tensor

    def __init__(self, point: Point, device: str) -> None:
        sizes = point.images, point.heads, point.length, point.head_dim
        batch, heads, length, head_dim = sizes
        self.dtype = DTYPES[point.dtype]
        self.is_causal = point.is_causal

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, device=device).to(self.dtype)

        parts = random(batch, length, 3, heads, head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        if point.queries is not None:
            parts = random(batch, point.queries, heads, head_dim).transpose(1, 2), *parts[1:]
        self.leaves = tuple(part.requires_grad_() for part in parts)
        self.weights = torch.rand(batch, length, device=device) + 0.5
        self.grad_output = random(batch, heads, point.num_queries, head_dim)
        self.arguments = *self.leaves, self.weights
        self.options = dict(zip(("q", "k", "v", "weights"), self.arguments, strict=True))
        if self.is_causal:  # else calls stay as they are without it
            self.arguments = *self.arguments, True
            self.options["is_causal"] = True

    def verify(self, forward: Forward, direction: str, *, is_weighted: bool = True) -> None:
        weights = self.weights if is_weighted else torch.ones_like(self.weights)
        self.verify_with(forward, weights, direction)

    def verify_with(self, forward: Forward, weights: Tensor, direction: str) -> None:
        leaves = [_corners(leaf).double().requires_grad_() for leaf in self.leaves]
        exact = functools.partial(
            plain_attention, *leaves, _ends(weights).double(), is_causal=self.is_causal
        )
        found = _results(forward, direction, self.leaves, self.grad_output)
        expected = _results(exact, direction, leaves, _corners(self.grad_output).double())
        names = ("output", "gradient of q", "gradient of k", "gradient of v")
        for name, result, right in zip(names, found, expected, strict=False):
            require_close(name, _corners(result), right, self.dtype)


class StatisticsProblem(AttentionProblem):
    """Query and key as views of a packed projection, and key weights."""

    def __init__(self, point: Point, device: str) -> None:
        super().__init__(point, device)
        self.arguments = *self.leaves[:2], self.weights
        del self.options["v"]
        self.options["num_prefix_tokens"] = PREFIX_TOKENS

    def verify(self, forward: Forward, direction: str, *, is_weighted: bool = True) -> None:
        """Compare all four statistics with float64."""
        with torch.no_grad():
            found = forward()
        query, key, _ = (_corners(leaf).double() for leaf in self.leaves)
        expected = plain_statistics(query, key, _ends(self.weights).double())
        for name, ours, exact in zip(AttentionStatistics._fields, found, expected, strict=True):
            require_close(name, _corners(ours), exact, self.dtype)


class RelevanceProblem(Problem):
    """Tokens (B, L, D), classes (C, E) and the joint space of a tower like ViT-B/16, in one type.

    Attributes:
        num_classes: C.
        rule: Linear, with a center that gives every count a weight of its own, so that counts can
            be read back from weights.
        top_k: Tokens each class selects.
    """

    def __init__(self, point: Point, device: str) -> None:
        self.dtype, model_dim = DTYPES[point.dtype], point.model_dim

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, device=device)

        tokens = random(point.images, point.length, model_dim).to(self.dtype)
        classes = random(point.num_classes, point.joint_dim).to(self.dtype)
        gain = (1 + 0.1 * random(model_dim)).to(self.dtype)
        offset = (0.1 * random(model_dim)).to(self.dtype)
        proj = (random(model_dim, point.joint_dim) * model_dim**-0.5).to(self.dtype)
        self.num_classes = point.num_classes
        self.rule = WeightRule(center=point.num_classes / 2 + 0.25)
        self.top_k = int(point.patches * self.rule.top_ratio)
        self.arguments = tokens, classes, (gain, offset, 1e-5), proj
        self.options = {
            "tokens": tokens,
            "class_embeddings": classes,
            "joint_space": JointSpace(gain, offset, 1e-5, proj),
            "num_prefix_tokens": PREFIX_TOKENS,
        }

    @functools.cached_property
    def exact_relevance(self) -> Tensor:
        """(few images, C, N) in float64."""
        tokens, classes, (gain, offset, eps), proj = self.arguments[:4]
        norm = gain.double(), offset.double(), eps
        return plain_relevance(_ends(tokens).double(), classes.double(), norm, proj.double())

    def verify(self, forward: Forward, direction: str, *, is_weighted: bool = True) -> None:
        """Compare the cosines (B, C, N)."""
        with torch.no_grad():
            require_close("relevance", _ends(forward()), self.exact_relevance, self.dtype)


class TokenWeightsProblem(RelevanceProblem):
    """Tokens and classes, of which the weights (B, L) are wanted."""

    def __init__(self, point: Point, device: str) -> None:
        super().__init__(point, device)
        self.arguments = *self.arguments, self.top_k, self.rule.strength, self.rule.center
        self.options["rule"] = self.rule

    def verify(self, forward: Forward, direction: str, *, is_weighted: bool = True) -> None:
        """Check that the weights follow from the right counts."""
        with torch.no_grad():
            found = forward()
        self.verify_counts(found[0] if isinstance(found, tuple) else found)  # ours: counts too

    def verify_counts(self, weights: Tensor) -> None:
        weights = _ends(weights)
        if not (weights[:, :PREFIX_TOKENS] == 1).all():
            raise WrongResultError("prefix tokens have weights other than 1")
        table = self.rule.table(self.num_classes).to(weights)
        distances = (weights[:, PREFIX_TOKENS:, None] - table).abs()
        nearest, counts = distances.min(-1)
        if not (nearest < 1e-3).all():
            raise WrongResultError("weights are none of those that the rule gives")
        chosen = self.exact_relevance.topk(self.top_k, dim=-1).indices
        selected = torch.zeros_like(self.exact_relevance).scatter_(-1, chosen, 1.0)
        turned = (counts - selected.sum(1)).abs().sum().item()
        # Selections turn in pairs: one token in, one out.
        allowed = max(_TURNED[self.dtype] * counts.numel() * self.num_classes, 2)
        if turned > allowed:
            raise WrongResultError(
                f"counts differ from float64 by {turned:.0f} selections; {allowed:.0f} may turn"
            )


class ReweightedProblem(Problem):
    """A whole re-weighted attention: tokens as wide as all heads together.

    Attributes:
        attention: Query, key and value.
        relevance: Tokens and classes.
    """

    def __init__(self, point: Point, device: str) -> None:
        self.attention = AttentionProblem(point, device)
        self.relevance = TokenWeightsProblem(point, device)
        self.leaves, self.grad_output = self.attention.leaves, self.attention.grad_output
        query, key, value = self.leaves
        self.options = {"q": query, "k": key, "v": value, **self.relevance.options}

    def verify(self, forward: Forward, direction: str, *, is_weighted: bool = True) -> None:
        """Check the weights an implementation returns, then its attention with these weights.

        A selection that rounding turns changes the output by more than rounding does; taken in two
        steps both checks are sharp.
        """
        with torch.no_grad():
            output, (weights, *_) = forward(return_weights=True)
        self.relevance.verify_counts(weights)
        self.attention.verify_with(forward, weights, direction)
        with torch.no_grad():
            require_close("output without weights", forward(), output, output.dtype)


def _results(
    forward: Forward, direction: str, leaves: Sequence[Tensor], grad_output: Tensor
) -> list[Tensor]:
    """The output, and with a backward pass the gradients."""
    with torch.set_grad_enabled(direction != "forward"):
        output = forward()
    if direction == "forward":
        return [output]
    return [output, *torch.autograd.grad(output, leaves, grad_output)]


def require_close(name: str, result: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Raises WrongResultError where a result is further from the exact one than rounding goes."""
    if result.shape != exact.shape:
        raise WrongResultError(f"{name} has shape {tuple(result.shape)}, not {tuple(exact.shape)}")
    exact = exact.detach().double()
    distance = ((result.detach().double() - exact).norm() / exact.norm()).item()
    allowed = _STEPS * _STEP[dtype]
    if not distance <= allowed:  # NaN is wrong too
        raise WrongResultError(f"{name} is off by {distance:.2g} of its norm; {allowed:.2g} is due")


def _ends(tensor: Tensor) -> Tensor:
    """The first and the last image."""
    return tensor[:: max(len(tensor) - 1, 1)]


def _corners(tensor: Tensor) -> Tensor:
    """The first and the last head of the first and the last image."""
    images = _ends(tensor.detach())
    return images[:, :: max(images.shape[1] - 1, 1)]
