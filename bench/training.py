"""The training that a benchmark runs: a method with its options, and what it runs in."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from tir_kernels.fewshot import Runtime
from tir_kernels.fewshot.methods import Method, method_class
from tir_kernels.fewshot.methods.prompts import default_logit_scale


@dataclass(frozen=True)
class Training:
    """A method, its runtime, and the support images per class, which every program goes by."""

    method: Any  # a LoRA, or a subclass of it
    runtime: Runtime
    shots: int = 5

    @property
    def logit_scale(self) -> float:
        return default_logit_scale(self.method.logit_scale, self.shots)

    def having(self, **options: Any) -> Training:
        """The same with other options of the method."""
        return replace(self, method=replace(self.method, **options))

    def running(self, **settings: Any) -> Training:
        """The same with other settings of the runtime."""
        return replace(self, runtime=replace(self.runtime, **settings))

    def of_method(self, name: str) -> Training:
        """The same with another method, with the options that both have."""
        chosen: type[Method] = method_class(name)
        shared = {
            field.name: getattr(self.method, field.name)
            for field in fields(chosen)
            if hasattr(self.method, field.name)
        }
        return replace(self, method=chosen(**shared))
