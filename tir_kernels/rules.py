"""The caller's choices: how counts become weights, and where tokens meet class embeddings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .registry import load
from .scalars import finite_number, real_number, whole_number

if TYPE_CHECKING:
    from torch import Tensor

PLACEMENTS = ("tokens", "attention", "both", "values")

WeightOfCount = Callable[[int, int, float, float], float]
LARGEST_WEIGHT = 2.0**128 - 2.0**104  # float32's largest number


@dataclass(frozen=True)
class WeightRule:
    """The rule by which the number of classes that select a patch token becomes its weight.

    With β = ``strength``, μ = ``center`` and C classes, a token selected by s classes gets

    ========== ==========================================
    kind       weight of count s
    ========== ==========================================
    linear     1 at s = 0, else 1 - β(s - μ)
    extremes   1 - β(s - μ) at s = 1 and s = C, else 1
    suppress   0 at s = C, else 1
    amplify    1 - β(1 - μ) at s = 1, else 1
    none       1
    ========== ==========================================

    and, the two halves of "linear": "suppress-linear", its weights below 1, and "amplify-linear",
    those above; all others are 1.

    Args:
        kind: One of the names above, or another one in ``RULES``. "linear" is the published method
            (arXiv 2605.25799).
        strength: β, any finite number that leaves the weights finite in float32.
        center: μ; ``None`` means (C + 1) / 2, which is 3 for the usual five classes.
        top_ratio: Each class selects its ``int(N * top_ratio)`` most relevant of N patch tokens;
            a number in [0, 1].

    Numbers may be any real ones, NumPy's too; they are kept as floats.

    Raises:
        ValueError: A kind, strength, center or ratio outside what is allowed.
        TypeError: A strength, center or ratio that is not a real number.
    """

    kind: str = "linear"
    strength: float = 0.5
    center: float | None = None
    top_ratio: float = 0.3

    def __post_init__(self) -> None:
        if self.kind not in RULES:
            raise ValueError(f"kind must be one of {', '.join(RULES)}; got {self.kind!r}")
        place = RULES[self.kind]
        if isinstance(place, str):
            RULES[self.kind] = load(place)
        # The class is frozen: this is how its fields are set.
        object.__setattr__(self, "strength", finite_number("strength", self.strength))
        if self.center is not None:
            object.__setattr__(self, "center", finite_number("center", self.center))
        object.__setattr__(self, "top_ratio", ratio("top_ratio", self.top_ratio))

    def table(self, num_classes: int) -> Tensor:
        """The weight of each count.

        Args:
            num_classes: C, at least 1.

        Returns:
            (C + 1,) float32 on the CPU; entry s is the weight of a token that s classes select.

        Raises:
            TypeError: A number of classes that is not a whole number.
            ValueError: One below 1, or for which a weight is beyond float32.
        """
        import torch  # here, because settings need rules and must not wait for PyTorch

        num_classes = whole_number("num_classes", num_classes)
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1; got {num_classes}")
        weight_of: Any = RULES[self.kind]
        center = (num_classes + 1) / 2 if self.center is None else self.center
        weights = [
            float(weight_of(count, num_classes, self.strength, center))
            for count in range(num_classes + 1)
        ]
        if max(map(abs, weights)) > LARGEST_WEIGHT:
            raise ValueError(
                f"strength={self.strength} and center={self.center} give {num_classes} classes "
                "weights beyond float32; choose a smaller strength"
            )
        # Neither the process's default dtype nor its default device may decide.
        return torch.tensor(weights, dtype=torch.float32, device="cpu")


def linear(count: int, num_classes: int, strength: float, center: float) -> float:
    """1 for a token that no class selects, else a ramp that falls with the count."""
    return 1.0 if count == 0 else _ramp(count, strength, center)


def extremes(count: int, num_classes: int, strength: float, center: float) -> float:
    """The ramp for tokens that one class or all select, else 1."""
    return _ramp(count, strength, center) if count in (1, num_classes) else 1.0


def suppress(count: int, num_classes: int, strength: float, center: float) -> float:
    """0 for tokens that all classes select, else 1."""
    return 0.0 if count == num_classes else 1.0


def amplify(count: int, num_classes: int, strength: float, center: float) -> float:
    """The ramp for tokens that one class selects, else 1."""
    return _ramp(count, strength, center) if count == 1 else 1.0


def suppress_linear(count: int, num_classes: int, strength: float, center: float) -> float:
    """The part of the linear rule that turns tokens down, else 1."""
    return min(1.0, linear(count, num_classes, strength, center))


def amplify_linear(count: int, num_classes: int, strength: float, center: float) -> float:
    """The part of the linear rule that turns tokens up, else 1."""
    return max(1.0, linear(count, num_classes, strength, center))


def unweighted(count: int, num_classes: int, strength: float, center: float) -> float:
    """1 for every token."""
    return 1.0


# Kind of rule -> function (count, num_classes, strength, center) -> weight, or "module:function".
RULES: dict[str, WeightOfCount | str] = {
    "linear": linear,
    "extremes": extremes,
    "suppress": suppress,
    "amplify": amplify,
    "suppress-linear": suppress_linear,
    "amplify-linear": amplify_linear,
    "none": unweighted,
}


def _ramp(count: int, strength: float, center: float) -> float:
    return 1.0 - strength * (count - center)


@dataclass(frozen=True, eq=False)
class JointSpace:
    """The map from a block's tokens (width D) to the joint image-text space (width E).

    It is the image tower's final LayerNorm followed by its projection; where the tower pools by
    attention, it follows what the pool makes of each token. Every part may be ``None``:

    Args:
        norm_weight: (D,) LayerNorm gain; ``None`` means 1.
        norm_bias: (D,) LayerNorm offset; ``None`` means 0.
        norm_eps: LayerNorm's epsilon; ``None`` means that no LayerNorm is applied at all.
        proj: (D, E) projection, applied as ``tokens @ proj``; ``None`` means none, so E = D.

    The parts may be float32, float16 or bfloat16 whatever the type of the tokens, and they receive
    no gradient: selection is piecewise constant.

    Raises:
        ValueError, TypeError: A part of the wrong rank, size or type.
    """

    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    norm_eps: float | None = 1e-5
    proj: Tensor | None = None

    def __post_init__(self) -> None:
        from torch import Tensor

        ranks = (("norm_weight", 1, "(D,)"), ("norm_bias", 1, "(D,)"), ("proj", 2, "(D, E)"))
        widths: dict[str, int] = {}
        for name, rank, shape in ranks:
            part = getattr(self, name)
            if part is None:
                continue
            if not isinstance(part, Tensor):
                raise TypeError(f"{name} must be a tensor or None; got {type(part).__name__}")
            if not part.is_floating_point():
                raise TypeError(f"{name} must have a floating point dtype; got {part.dtype}")
            if part.dim() != rank:
                raise ValueError(f"{name} must have shape {shape}; got {tuple(part.shape)}")
            widths[name] = part.shape[0]
        if len(set(widths.values())) > 1:
            raise ValueError(f"the parts of JointSpace must share one width D; got {widths}")
        if self.norm_eps is None:
            if self.norm_weight is not None or self.norm_bias is not None:
                raise ValueError(
                    "norm_eps=None switches LayerNorm off, so norm_weight and norm_bias must be "
                    "None too; pass a positive norm_eps to use them"
                )
        else:
            norm_eps = finite_number("norm_eps", self.norm_eps)
            if norm_eps < 0:
                raise ValueError(f"norm_eps must not be negative; got {norm_eps}")
            object.__setattr__(self, "norm_eps", norm_eps)


def ratio(name: str, value: object) -> float:
    """A number in [0, 1] as a float; refuses any other."""
    number = real_number(name, value, "a number in [0, 1]")
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"{name} must lie in [0, 1]; got {value}")
    return number
