"""What the methods share that learn prompts."""

from __future__ import annotations

from dataclasses import dataclass

from tir_kernels.fewshot import fields
from tir_kernels.fewshot.methods.option_fields import LOGIT_SCALE_HELP, steps
from tir_kernels.fewshot.methods.protocol import Method
from tir_kernels.fewshot.methods.templates import single_template, templates
from tir_kernels.fewshot.methods.zero_shot import TEMPLATE_HELP


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
