"""The settings of a few-shot fine-tune."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from tir_kernels.operators.choose import require_backend
from tir_kernels.rules import PLACEMENTS, RULE_KINDS, WeightRule
from tir_kernels.scalars import real_number, whole_number

METHODS = ("tir", "lora", "zero-shot")
PRECISIONS = ("float32", "bfloat16", "float16")

# Least and most of each whole number, and why not more.
_BOUNDS = {
    "steps": (1, 10**6, "no few-shot training takes as many"),
    "shots": (1, 10**6, "no class has as many images"),
    "lora_rank": (1, 8192, "no layer is as wide"),
    "context_tokens": (0, 1024, "no text tower has as many positions"),
    "seed": (0, 2**63 - 1, "generators take 63 bits"),
}
_REAL = ("top_ratio", "strength", "lora_alpha", "lora_dropout", "lora_lr", "context_lr")


@dataclass(frozen=True)
class FewShotConfig:
    """The method's settings, with its published defaults (arXiv 2605.25799).

    Args:
        method: "tir" (LoRA, prompt context and token re-weighting), "lora" (the same without
            re-weighting) or "zero-shot" (no training).
        steps: Full-batch training steps per episode.
        shots: Support images per class; it also chooses the default ``logit_scale``.
        top_ratio: Share of the patch tokens each class selects, in [0, 1].
        strength: β of the weight rule.
        rule: Kind of ``tir_kernels.WeightRule``.
        layers: Vision blocks that are re-weighted; ``None`` means depth - 4 and depth - 2.
        placement: "tokens" (the published method), "attention" or "both".
        text_layer: Text block whose class embeddings give the relevance; ``None``: depth - 2.
        lora_rank: Rank of LoRA on the query, key and value projections of both towers.
        lora_alpha: LoRA's scale is ``lora_alpha / sqrt(lora_rank)``.
        lora_dropout: Dropout in front of LoRA's A while training, in [0, 1).
        lora_lr: AdamW's learning rate for LoRA.
        context_tokens: Learned prompt context vectors, started as "a photo of a"; 0 for none.
        context_lr: SGD's learning rate for the context (momentum 0.9, weight decay 5e-4).
        logit_scale: Factor of the cosine in the loss; ``None``: 4, or 2 for one shot.
        precision: "float32", or the type of an autocast region: "bfloat16", "float16".
        device: Device of the model and all tensors.
        seed: Of LoRA's initialisation and dropout.
        backend: Backend of the operators; see ``tir_kernels.available_backends()``.

    Raises:
        ValueError: A value outside what is allowed.
        TypeError: A value that is not of the field's kind. Any ``numbers.Real`` is a number, and
            what ``operator.index`` takes is a whole one; they are kept as ``float`` and ``int``.
    """

    method: str = "tir"
    steps: int = 100
    shots: int = 5
    top_ratio: float = 0.3
    strength: float = 0.5
    rule: str = "linear"
    layers: tuple[int, ...] | None = None
    placement: str = "tokens"
    text_layer: int | None = None
    lora_rank: int = 16
    lora_alpha: float = 8
    lora_dropout: float = 0.25
    lora_lr: float = 2e-4
    context_tokens: int = 4
    context_lr: float = 2e-3
    logit_scale: float | None = None
    precision: str = "float32"
    device: str = "cpu"
    seed: int = 0
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name in _BOUNDS:
            self._set(name, whole_number(name, getattr(self, name), "a whole number"))
        for name in _REAL:
            self._set(name, _real_number(name, getattr(self, name)))
        if self.logit_scale is not None:
            self._set("logit_scale", _real_number("logit_scale", self.logit_scale))
        if self.text_layer is not None:
            self._set("text_layer", whole_number("text_layer", self.text_layer, "a whole number"))
        if self.layers is not None:
            self._set("layers", _layers(self.layers))
        _require_choice("method", self.method, METHODS)
        _require_choice("placement", self.placement, PLACEMENTS)
        _require_choice("precision", self.precision, PRECISIONS)
        _require_choice("rule", self.rule, RULE_KINDS)
        require_backend(self.backend)
        for name, (least, most, reason) in _BOUNDS.items():
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"{name} must be at least {least}; got {value}")
            if value > most:
                raise ValueError(f"{name} must be at most {most}, since {reason}; got {value}")
        for name in ("lora_lr", "context_lr", "lora_alpha"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a finite number of at least 0; got {value}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must lie in [0, 1); got {self.lora_dropout}")
        if self.logit_scale is not None and not math.isfinite(self.logit_scale):
            raise ValueError(f"logit_scale must be finite; got {self.logit_scale}")
        WeightRule(self.rule, self.strength, top_ratio=self.top_ratio)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    @property
    def resolved_logit_scale(self) -> float:
        """The factor of the cosine that is used: ``logit_scale``, or the method's default."""
        if self.logit_scale is not None:
            return float(self.logit_scale)
        return 2.0 if self.shots == 1 else 4.0


def _require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def _real_number(name: str, value: object) -> float | int:
    # An int stays one: it is written to a run's settings, where 8 and 8.0 would be two values.
    return value if type(value) is int else real_number(name, value)


def _layers(layers: object) -> tuple[int, ...]:
    if not isinstance(layers, Iterable):
        raise TypeError(f"layers must be a list of whole numbers; got {layers!r}")
    return tuple(whole_number("layers", layer, "a list of whole numbers") for layer in layers)
