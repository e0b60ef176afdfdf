"""A named backend serves all that it offers in a training; "auto" serves the rest."""

from collections.abc import Callable
from typing import Any

import pytest
from fewshot.training_cases import EPISODES, as_method, make_model, make_tokenizer

from tir_kernels.backends.reference import ReferenceBackend
from tir_kernels.fewshot import Runtime, finetune_episodes
from tir_kernels.operators.choose import load_backend

ALWAYS = {"attention_forward", "attention_backward"}
OPTIONAL = {"bias_activation", "philox_dropout"}


@pytest.mark.parametrize("lacks", [False, True])
@pytest.mark.parametrize(("name", "placement"), [("tir", "attention"), ("lora", None)])
def test_a_named_backend_serves_all(
    monkeypatch: pytest.MonkeyPatch, name: str, placement: str | None, lacks: bool
) -> None:
    served: dict[str, set[str]] = {"reference": set(), "cpu": set()}

    def noting(backend: str, operation: str) -> Callable[..., Any]:
        own = getattr(load_backend(backend), operation)

        def noted(*arguments: Any) -> Any:
            served[backend].add(operation)
            return own(*arguments)

        return noted

    for backend in served:
        for operation in ALWAYS | OPTIONAL:
            monkeypatch.setattr(load_backend(backend), operation, noting(backend, operation))
    if lacks:
        for operation in OPTIONAL:
            monkeypatch.delattr(load_backend("reference"), operation)
            monkeypatch.delattr(ReferenceBackend, operation)
    options = {} if placement is None else {"placement": placement}
    method = as_method(name, steps=1, lora_dropout=0.25, **options)
    runtime = Runtime(backend="reference")
    finetune_episodes(make_model(), make_tokenizer(), EPISODES[:1], method, runtime=runtime)
    assert served == {
        "reference": ALWAYS if lacks else ALWAYS | OPTIONAL,
        "cpu": OPTIONAL if lacks else set(),
    }
