"""CLIP-Adapter: a small network behind the image tower."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from tir_kernels.fewshot import fields
from tir_kernels.fewshot.methods.option_fields import LOGIT_SCALE_HELP, rate, share, steps
from tir_kernels.fewshot.methods.protocol import Kit, Learner, Method, ParameterGroup
from tir_kernels.fewshot.methods.schedules import warmed_cosine
from tir_kernels.fewshot.methods.templates import templates
from tir_kernels.fewshot.methods.zero_shot import TEMPLATE_HELP, FrozenFeatures

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class CLIPAdapter(Method):
    """CLIP-Adapter: image features mixed with those that a small trained network makes of them.

    ``f' = normalise(r A(f) + (1 - r) f)`` with ``A(f) = ReLU(ReLU(f W₁) W₂)`` and the ratio r, then
    ``logits = logit_scale f' tᵀ``. W₁ (E, E / reduction) and W₂ start at random, so that without
    steps it is not zero-shot. SGD with momentum 0.9 and weight decay 5e-4, a cosine behind one step
    at 1e-5. Each view of a support image is an image of its own to train on; the program draws new
    crops in every epoch, and steps of 32 images.
    """

    name = "clip-adapter"
    source = "arXiv 2110.04544"
    family = "frozen features"
    shown_fields: ClassVar[tuple[str, ...]] = ("adapter_ratio",)

    steps: int = steps(200)
    feature_lr: float = rate(2e-3)
    adapter_ratio: float = fields.real(
        0.2, "Share of the adapter's output in CLIP-Adapter's features, in [0, 1].", least=0
    )
    adapter_reduction: int = fields.whole(
        4,
        "CLIP-Adapter's hidden layer is the features' width by this.",
        least=1,
        most=8192,
        reason="no features are as wide",
    )
    logit_scale: float = fields.real(100.0, LOGIT_SCALE_HELP, least=0)
    template: tuple[str, ...] | None = templates(TEMPLATE_HELP)

    def __post_init__(self) -> None:
        super().__post_init__()
        share("adapter_ratio", self.adapter_ratio)

    @contextmanager
    def start(self, kit: Kit) -> Iterator[Learner]:
        yield _Adapter(self, kit)


class _Adapter(FrozenFeatures):
    _down: Tensor  # (G, E, H)
    _up: Tensor  # (G, H, E)

    def __init__(self, method: CLIPAdapter, kit: Kit) -> None:
        super().__init__(kit, method.logit_scale, method.template)
        self._method, self._seeds = method, kit.seeds

    def fit(self, inputs: Tensor, labels: Tensor) -> None:
        import torch
        from torch import nn

        self.texts()  # before steps, which may become a graph
        width = inputs.shape[-1]
        hidden = max(1, width // self._method.adapter_reduction)
        generators = [torch.Generator().manual_seed(seed) for seed in self._seeds]

        def drawn(rows: int, columns: int) -> nn.Parameter:
            """As nn.Linear starts: uniform up to 1 / √rows."""
            own = [torch.rand(rows, columns, generator=each, device="cpu") for each in generators]
            return nn.Parameter(((2 * torch.stack(own) - 1) / rows**0.5).to(inputs.device))

        self._down, self._up = drawn(width, hidden), drawn(hidden, width)

    def logits(self, inputs: Tensor, classes: Any) -> Tensor:
        features, ratio = inputs.float(), self._method.adapter_ratio
        adapted = ((features @ self._down).relu() @ self._up).relu()
        return super().logits(ratio * adapted + (1 - ratio) * features, classes)

    def parameters(self) -> list[ParameterGroup]:
        method = self._method
        both: list[Any] = [self._down, self._up]
        settings = {"lr": method.feature_lr, "momentum": 0.9, "weight_decay": 5e-4}
        return [
            ParameterGroup(both, "SGD", settings, warmed_cosine(method.steps, method.feature_lr))
        ]

    def trained(self) -> dict[str, Tensor]:
        """ "down" (G, E, H) and "up" (G, H, E)."""
        return {"down": self._down, "up": self._up}

    def restore(self, trained: Mapping[str, Tensor]) -> None:
        self._down, self._up = trained["down"], trained["up"]
