"""Each method's step may become a CUDA graph, held on a CPU: replayed by its addresses alone, it
trains to the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from fewshot.method_cases import prompt_model
from fewshot.train.recorded_step import RecordedStep
from fewshot.train.test_resume import Keeper, StopError, train
from fewshot.training_cases import EPISODES, as_method, make_model, make_tokenizer
from torch import Tensor, nn

from bench.step_kernels import as_on_a_gpu
from tir_kernels.fewshot import EpisodeResult, Runtime, finetune_episodes
from tir_kernels.fewshot.methods import (
    METHODS,
    Learner,
    Method,
    Observer,
    ParameterGroup,
    method_class,
    plot,
)
from tir_kernels.fewshot.train import batch
from tir_kernels.operators import checks

pytestmark = pytest.mark.slow

STEPS = 5
STEPPED = [name for name in METHODS if method_class(name)().steps]
DROPOUT = {"lora_dropout": 0.25}
MOVING = {"clip-adapter": {"adapter_reduction": 1, "feature_lr": 1.0}}  # or no unit is active


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a GPU does otherwise than a CPU, done on the CPU."""
    monkeypatch.setattr(batch, "_optimizer", optimizer_on_a_gpu(batch._optimizer))
    # While operators are recorded, tables are still those that were kept before.
    monkeypatch.setattr(checks, "_makes_other_tensors", lambda: False)
    monkeypatch.setattr(plot, "may_wait_for", lambda tensor: False)
    with as_on_a_gpu():
        yield


def optimizer_on_a_gpu(make: Callable[..., Any]) -> Callable[..., Any]:
    """The engine's optimizers, with learning rates that change in tensors."""

    def made(group: ParameterGroup, device: torch.device, is_scaled: bool) -> Any:
        settings = dict(group.settings)
        if group.schedule is not None:
            settings["lr"] = torch.tensor(float(settings["lr"]))
        return make(group._replace(settings=settings), device, is_scaled)

    return made


def trained(method: Method, model: nn.Module, **more: Any) -> list[EpisodeResult]:
    return finetune_episodes(model, make_tokenizer(), EPISODES, method, **more)


def assert_replayed_is_the_same(
    method: Method, monkeypatch: pytest.MonkeyPatch, model: nn.Module | None = None, **more: Any
) -> None:
    model = make_model() if model is None else model
    expected = trained(method, model, **more)
    before = RecordedStep.replays
    monkeypatch.setattr(batch, "RepeatedStep", RecordedStep)
    found = trained(method, model, **more)
    assert RecordedStep.replays - before == STEPS - 2
    for one, other in zip(found, expected, strict=True):
        assert len(set(other.losses)) > 2
        assert one.losses == other.losses
        assert torch.equal(one.query_logits, other.query_logits)
        assert list(one.trained) == list(other.trained)
        for name, tensor in one.trained.items():
            assert torch.equal(tensor, other.trained[name]), name


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize("name", STEPPED)
def test_every_method_trains_by_addresses_alone(name, monkeypatch) -> None:
    options = DROPOUT if hasattr(method_class(name), "lora_dropout") else MOVING.get(name, {})
    method = as_method(name, steps=STEPS, **options)
    assert_replayed_is_the_same(method, monkeypatch, prompt_model())


VARIANTS = {
    "in the softmax": as_method("tir", placement="attention", **DROPOUT),
    "centroids": as_method("tir", placement="both", relevance="centroids"),
    "most attended": as_method("tir", selection="attention"),
    "random patches": as_method("tir", selection="random", placement="values"),
    "frozen texts": as_method(
        "tir", lora_towers="vision", context_tokens=0, lora_schedule="cosine"
    ),
    "frozen images": as_method("lora", lora_towers="text", lora_schedule="cosine/8"),
    "a context for each class": as_method("coop", context_scope="per-class"),
}


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_train_by_addresses_alone(variant, monkeypatch) -> None:
    assert_replayed_is_the_same(replace(VARIANTS[variant], steps=STEPS), monkeypatch)


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize("runtime", [Runtime(precision="bfloat16"), Runtime(checkpoint=True)])
def test_however_it_runs(runtime, monkeypatch) -> None:
    method = as_method("tir", steps=STEPS, **DROPOUT)
    assert_replayed_is_the_same(method, monkeypatch, runtime=runtime)


class Looking(Observer):
    """Runs the model between the steps, in evaluation mode, on classes that it shows anew."""

    every = 1

    def observe(self, step, learner, inputs) -> None:
        learner.logits(inputs.flip(1), learner.classes())


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize("name", ["tir", "temperature-dropout", "maple"])
def test_observed_between_replays(name, monkeypatch) -> None:
    method = as_method(name, steps=STEPS)
    assert_replayed_is_the_same(method, monkeypatch, observers=[Looking()])


@pytest.mark.usefixtures("on_a_gpu")
def test_replays_see_the_images_of_their_step_and_are_saved(monkeypatch) -> None:
    method = as_method("tir", steps=6, lora_schedule="cosine", **DROPOUT)
    expected, every_loss = train(method, None, batch_size=4)
    monkeypatch.setattr(batch, "RepeatedStep", RecordedStep)
    keeper = Keeper([4])
    with pytest.raises(StopError):
        train(method, keeper, batch_size=4)
    found, later = train(method, keeper, batch_size=4)
    assert later == every_loss[4:]
    assert torch.equal(found.query_logits, expected.query_logits)


class Slipping(Learner):
    """A learner whose step depends on something that no graph knows of."""

    def __init__(self, kind: str) -> None:
        self.kind, self.factor = kind, 1.0
        self.weight = nn.Parameter(torch.ones(1, 3, 2))
        self.shift = torch.zeros(1)

    def training_losses(self, inputs, labels):
        scores = inputs.flatten(2)[..., :2] @ self.weight.mT
        if self.kind == "a number":
            self.factor += 1.0
        elif self.kind == "another tensor":
            self.shift = self.shift + 1
        elif self.kind == "read":
            self.factor = float(self.weight.detach().sum())
        elif self.kind == "made":
            self.shift = torch.tensor([2.0])
        return self.loss(self.factor * scores + self.shift, labels) + self.shift.sum()


def slipping(kind: str, steps: int) -> list[float]:
    learner, images = (
        Slipping(kind),
        torch.randn(1, 3, 2, generator=torch.Generator().manual_seed(0)),
    )
    optimizer = torch.optim.SGD([learner.weight], lr=0.1)

    def step() -> Tensor:
        losses = learner.training_losses(images, torch.arange(3)[None])
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
        return losses.detach()

    repeated = batch.RepeatedStep(step, torch.device("cpu"), as_graph=True)
    return [repeated().item() for _ in range(steps)]


def test_a_step_that_may_be_a_graph(monkeypatch) -> None:
    expected = slipping("", 6)
    monkeypatch.setattr(batch, "RepeatedStep", RecordedStep)
    assert slipping("", 6) == expected


def test_a_number_that_changes_is_found(monkeypatch) -> None:
    expected = slipping("a number", 6)
    monkeypatch.setattr(batch, "RepeatedStep", RecordedStep)
    assert slipping("a number", 6) != expected


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("read", "reads a number"),
        ("made", "processor's numbers"),
        ("another tensor", "nobody keeps"),
    ],
)
def test_what_no_graph_can_do_is_found(kind, why, monkeypatch) -> None:
    monkeypatch.setattr(batch, "RepeatedStep", RecordedStep)
    with pytest.raises(AssertionError, match=why):
        slipping(kind, 6)
