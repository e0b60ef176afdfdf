"""ProLIP: the image tower's last projection is trained, held near what it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from tir_kernels.fewshot import fields
from tir_kernels.fewshot.methods.option_fields import LOGIT_SCALE_HELP, rate, steps
from tir_kernels.fewshot.methods.protocol import Kit, Learner, Method, ParameterGroup
from tir_kernels.fewshot.methods.schedules import cosine
from tir_kernels.fewshot.methods.templates import templates
from tir_kernels.fewshot.methods.zero_shot import TEMPLATE_HELP, FrozenFeatures

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ProLIP(Method):
    """ProLIP: the image tower's last projection, trained with a penalty on its change.

    ``logits = logit_scale normalise(x P) tᵀ``, x what the tower has before its last projection P₀,
    with which P starts; cross entropy plus ``projection_penalty ‖P - P₀‖²``, a sum over entries;
    Adam with epsilon 1e-4, a cosine. Step e sees view e mod V of each image's V views, of which the
    program makes 300.
    """

    name = "prolip"
    source = "arXiv 2410.05270"
    family = "frozen features"
    shown_fields: ClassVar[tuple[str, ...]] = ("feature_lr",)

    steps: int = steps(300)
    feature_lr: float = rate(1e-5)
    projection_penalty: float | None = fields.real(
        None, "Factor of ProLIP's penalty; unset: 1 / shots.", least=0
    )
    logit_scale: float = fields.real(100.0, LOGIT_SCALE_HELP, least=0)
    template: tuple[str, ...] | None = templates(TEMPLATE_HELP)

    @contextmanager
    def start(self, kit: Kit) -> Iterator[Learner]:
        projection = kit.encoder.projection
        if projection is None:
            kind = type(getattr(kit.model, "visual", kit.model))
            tower = f"{kind.__module__.partition('.')[0]}'s {kind.__name__}"
            raise TypeError(
                f"{self.name} trains the projection that an image tower ends with, and this tower, "
                f"{tower}, is not known to end with one; take open_clip's own VisionTransformer or "
                "transformers' CLIPModel, or another method"
            )
        yield _Projection(self, kit, projection)


class _Projection(FrozenFeatures):
    inputs_kind = "features before the projection"

    def __init__(self, method: ProLIP, kit: Kit, projection: Tensor) -> None:
        import torch
        from torch import nn

        super().__init__(kit, method.logit_scale, method.template)
        self._method = method
        given = method.projection_penalty
        self._penalty = 1 / kit.shots if given is None else given
        self._original = projection.detach().float()  # (D, E)
        self._projection: Tensor = nn.Parameter(
            self._original.expand(len(kit.seeds), -1, -1).clone()
        )
        self._step = torch.zeros(1, dtype=torch.int64, device=projection.device)

    def inputs(self, images: Tensor) -> Tensor:
        """(G, S, 3, H, W) -> (G, S, D)."""
        tokens = self._encoder.embed(images.flatten(0, 1))
        return self._encoder.unprojected(tokens).unflatten(0, images.shape[:2])

    def fit(self, inputs: Tensor, labels: Tensor) -> None:
        self.texts()  # before steps, which may become a graph

    def training_set(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs (G, N, V, D) of N images and their V views, labels (G, N)."""
        return inputs.unflatten(1, (-1, self._views)), labels[:, :: self._views]

    def training_losses(self, inputs: Tensor, labels: Tensor) -> Tensor:
        shown = inputs.index_select(2, self._step % self._views).squeeze(2)
        change = (self._projection - self._original).square().sum((1, 2))
        return super().training_losses(shown, labels) + self._penalty * change

    def logits(self, inputs: Tensor, classes: Any) -> Tensor:
        return super().logits(inputs.float() @ self._projection, classes)

    def parameters(self) -> list[ParameterGroup]:
        projection: Any = self._projection
        method = self._method
        settings = {"lr": method.feature_lr, "eps": 1e-4}
        return [ParameterGroup([projection], "Adam", settings, cosine(max(method.steps, 1)))]

    def carried(self) -> Sequence[Tensor]:
        """The number of steps taken."""
        return [self._step]

    def next_step(self) -> None:
        self._step += 1

    def trained(self) -> dict[str, Tensor]:
        """ "projection" (G, D, E)."""
        return {"projection": self._projection}

    def restore(self, trained: Mapping[str, Tensor]) -> None:
        self._projection = trained["projection"]
