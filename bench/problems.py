"""The tensors of one shape, shared by all implementations, and what is right for them.

Float64 is computed for a few images and heads, chosen at both ends of the batch: whatever an
implementation does to one image it does to all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from tir_kernels import JointSpace, WeightRule

from .cases import WrongResultError
from .settings import DTYPES
from .shapes import PREFIX_TOKENS, Point
from .timing import Call

# Allowed distance from float64, as a share of the norm: four rounding steps of the type. float32
# products may run in TF32, whose step is 2^-10, where PyTorch's settings say so.
_STEP = {torch.float32: 2**-10, torch.float16: 2**-10, torch.bfloat16: 2**-7}
_STEPS = 4

# Share of the selections that rounding may turn: those that lie next to the threshold.
_TURNED = {torch.float32: 0.002, torch.float16: 0.02, torch.bfloat16: 0.02}


Forward = Callable[[], Tensor]


@dataclass(frozen=True)
class WholeForward:
    """A forward pass that can also tell which weights it used: (output, weights)."""

    run: Forward
    with_weights: Callable[[], tuple[Tensor, Tensor]]

    def __call__(self) -> Tensor:
        return self.run()


class Problem(Protocol):
    """The tensors of one shape."""

    def verify(self, forward: Forward, direction: str, *, is_weighted: bool = True) -> None:
        """Compare a forward pass, and with a backward pass its gradients, with float64.

        Raises:
            WrongResultError: One of the results is off.
        """

    def call(self, forward: Forward, direction: str) -> Call:
        """The call that is measured."""


class AttentionProblem:
    """Query, key, value as views of a packed projection, key weights and an upstream gradient.

    Attributes:
        query, key, value: (B, H, L, d), views of (B, L, 3, H, d).
        weights: (B, L) float32, positive.
        scale: d ** -0.5.
        grad_output: (B, H, L, d).
        leaves: Query, key and value, which gradients are taken for.
    """

    def __init__(self, point: Point, device: str) -> None:
        sizes = point.images, point.heads, point.length, point.head_dim
        batch, heads, length, head_dim = sizes
        dtype = DTYPES[point.dtype]
        packed = torch.randn(batch, length, 3, heads, head_dim, device=device).to(dtype)
        self.query, self.key, self.value = (
            part.requires_grad_() for part in packed.permute(2, 0, 3, 1, 4).unbind(0)
        )
        self.weights = torch.rand(batch, length, device=device) + 0.5
        self.scale = head_dim**-0.5
        self.grad_output = torch.randn(sizes, device=device).to(dtype)

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value

    def call(self, forward: Forward, direction: str) -> Call:
        return _directed(forward, direction, self.leaves, self.grad_output)

    def verify(self, forward: Forward, direction: str, *, is_weighted: bool = True) -> None:
        self.verify_with(forward, self.weights if is_weighted else None, direction)

    def verify_with(self, forward: Forward, weights: Tensor | None, direction: str) -> None:
        names = ("output", "gradient of q", "gradient of k", "gradient of v")
        with_gradients = direction != "forward"
        with torch.set_grad_enabled(with_gradients):
            output = forward()
        results = [output]
        if with_gradients:
            results += torch.autograd.grad(output, self.leaves, self.grad_output)
        expected = self._exact(weights, with_gradients)
        for name, result, exact in zip(names, results, expected, strict=False):
            require_close(name, self._corners(result), exact, self.query.dtype)

    def _corners(self, tensor: Tensor) -> Tensor:
        images, heads = (_ends(tensor.shape[i], tensor.device) for i in (0, 1))
        return tensor.detach()[images][:, heads]

    def _exact(self, weights: Tensor | None, with_gradients: bool) -> list[Tensor]:
        inputs = [self._corners(leaf).double().requires_grad_() for leaf in self.leaves]
        query, key, value = inputs
        scores = query @ key.mT * self.scale
        if weights is not None:
            bias = weights[_ends(len(weights), weights.device)].double().clamp(min=0).log()
            scores = scores + bias[:, None, None, :]
        output = scores.softmax(-1) @ value
        if not with_gradients:
            return [output.detach()]
        upstream = self._corners(self.grad_output).double()
        return [output.detach(), *torch.autograd.grad(output, inputs, upstream)]


class RelevanceProblem:
    """Tokens, classes and the joint space of a tower like ViT-B/16, in one type.

    Attributes:
        tokens: (B, L, D).
        classes: (C, E).
        space: Norm and projection (D, E).
        rule: Linear, with a center that gives every count a weight of its own, so that counts can
            be read back from weights.
        top_k: Tokens each class selects.
    """

    def __init__(self, point: Point, device: str) -> None:
        dtype, model_dim, classes = DTYPES[point.dtype], point.model_dim, point.num_classes

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, device=device)

        self.tokens = random(point.images, point.length, model_dim).to(dtype)
        self.classes = random(classes, point.joint_dim).to(dtype)
        self.gain = (1 + 0.1 * random(model_dim)).to(dtype)
        self.offset = (0.1 * random(model_dim)).to(dtype)
        self.proj = (random(model_dim, point.joint_dim) * model_dim**-0.5).to(dtype)
        self.space = JointSpace(self.gain, self.offset, 1e-5, self.proj)
        self.rule = WeightRule(center=classes / 2 + 0.25)
        self.top_k = int(point.patches * self.rule.top_ratio)
        self.dtype = dtype

    @functools.cached_property
    def exact_relevance(self) -> Tensor:
        """(few images, C, N) in float64."""
        images = _ends(len(self.tokens), self.tokens.device)
        features = self.tokens[images][:, PREFIX_TOKENS:].double()
        gain, offset, proj = (part.double() for part in (self.gain, self.offset, self.proj))
        features = F.layer_norm(features, gain.shape, gain, offset, 1e-5) @ proj
        return F.normalize(self.classes.double(), dim=-1) @ F.normalize(features, dim=-1).mT

    def call(self, forward: Forward, direction: str) -> Call:
        return _directed(forward, direction, (), None)

    def verify(self, forward: Forward, direction: str, *, is_weighted: bool = True) -> None:
        """Compare the cosines (B, C, N)."""
        with torch.no_grad():
            relevance = forward()
        images = _ends(len(relevance), relevance.device)
        require_close("relevance", relevance[images], self.exact_relevance, self.dtype)


class TokenWeightsProblem(RelevanceProblem):
    """Tokens and classes, of which the weights (B, L) are wanted."""

    def verify(self, forward: Forward, direction: str, *, is_weighted: bool = True) -> None:
        """Check that the weights follow from the right counts."""
        with torch.no_grad():
            weights = forward()
        self.verify_counts(weights)

    def verify_counts(self, weights: Tensor) -> None:
        weights = weights[_ends(len(weights), weights.device)]
        if not (weights[:, :PREFIX_TOKENS] == 1).all():
            raise WrongResultError("prefix tokens have weights other than 1")
        num_classes = len(self.classes)
        table = self.rule.table(num_classes).to(weights)
        distances = (weights[:, PREFIX_TOKENS:, None] - table).abs()
        nearest, counts = distances.min(-1)
        if not (nearest < 1e-3).all():
            raise WrongResultError("weights are none of those that the rule gives")
        chosen = self.exact_relevance.topk(self.top_k, dim=-1).indices
        selected = torch.zeros_like(self.exact_relevance).scatter_(-1, chosen, 1.0)
        turned = (counts - selected.sum(1)).abs().sum().item()
        # Selections turn in pairs: one token in, one out.
        allowed = max(_TURNED[self.dtype] * counts.numel() * num_classes, 2)
        if turned > allowed:
            raise WrongResultError(
                f"counts differ from float64 by {turned:.0f} selections; {allowed:.0f} may turn"
            )


class ReweightedProblem:
    """A whole re-weighted attention: tokens as wide as all heads together.

    Attributes:
        attention: Query, key and value.
        relevance: Tokens and classes.
    """

    def __init__(self, point: Point, device: str) -> None:
        self.attention = AttentionProblem(point, device)
        self.relevance = TokenWeightsProblem(point, device)

    def call(self, forward: Forward, direction: str) -> Call:
        return self.attention.call(forward, direction)

    def verify(self, forward: WholeForward, direction: str, *, is_weighted: bool = True) -> None:
        """Check the weights an implementation finds, then its attention with these weights.

        A selection that rounding turns changes the output by more than rounding does; taken in two
        steps both checks are sharp.
        """
        with torch.no_grad():
            output, weights = forward.with_weights()
        self.relevance.verify_counts(weights)
        self.attention.verify_with(forward, weights, direction)
        with torch.no_grad():
            require_close("output without weights", forward(), output, output.dtype)


def _directed(
    forward: Forward, direction: str, leaves: Sequence[Tensor], grad_output: Tensor | None
) -> Call:
    """The timed call: the forward pass, the backward pass of one forward pass, or both."""
    if direction == "forward":
        return torch.no_grad()(forward)
    if direction == "backward":
        output = forward()
        return lambda: torch.autograd.grad(output, leaves, grad_output, retain_graph=True)
    return lambda: torch.autograd.grad(forward(), leaves, grad_output)


def require_close(name: str, result: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Raises WrongResultError where a result is further from the exact one than rounding goes."""
    if result.shape != exact.shape:
        raise WrongResultError(f"{name} has shape {tuple(result.shape)}, not {tuple(exact.shape)}")
    exact = exact.double()
    distance = ((result.detach().double() - exact).norm() / exact.norm()).item()
    allowed = _STEPS * _STEP[dtype]
    if not distance <= allowed:  # NaN is wrong too
        raise WrongResultError(f"{name} is off by {distance:.2g} of its norm; {allowed:.2g} is due")


def _ends(size: int, device: torch.device) -> Tensor:
    """The first and the last index."""
    return torch.tensor(sorted({0, size - 1}), device=device)
