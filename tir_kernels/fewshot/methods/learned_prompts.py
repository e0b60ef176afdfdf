"""What the methods share that learn prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tir_kernels.fewshot import fields
from tir_kernels.fewshot.methods.option_fields import LOGIT_SCALE_HELP, steps
from tir_kernels.fewshot.methods.protocol import Learner, Method, ParameterGroup
from tir_kernels.fewshot.methods.templates import single_template, templates
from tir_kernels.fewshot.methods.zero_shot import TEMPLATE_HELP

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class LearnedPrompts(Method):
    """Prompts that start from one template, at the logit scale of CLIP."""

    family = "tuned towers"

    steps: int = steps(100, least=1)
    logit_scale: float = fields.real(100.0, LOGIT_SCALE_HELP, least=0)
    template: tuple[str, ...] | None = templates(TEMPLATE_HELP)

    def __post_init__(self) -> None:
        super().__post_init__()
        single_template(self.template)


class ContextLearner(Learner):
    """A learner that trains contexts, and nothing else."""

    _method: Any  # with ``context_lr`` and ``steps``
    _contexts: nn.Parameter  # (G, ..., context_tokens, W)

    def parameters(self) -> list[ParameterGroup]:
        from tir_kernels.fewshot.methods.prompts import prompt_group

        return [prompt_group([self._contexts], self._method.context_lr, self._method.steps)]

    def trained(self) -> dict[str, Tensor]:
        """ "context" (G, ..., context_tokens, W)."""
        return {"context": self._contexts}

    def restore(self, trained: Mapping[str, Tensor]) -> None:
        import torch

        with torch.no_grad():
            self._contexts.copy_(trained["context"])
