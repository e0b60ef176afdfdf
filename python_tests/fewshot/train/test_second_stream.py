"""The text tower beside the image tower: when it starts, and when it is waited for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fewshot.training_cases import (
    EPISODES,
    METHOD,
    as_method,
    assert_same,
    make_model,
    make_tokenizer,
)
from torch import Tensor

from tir_kernels.fewshot import Runtime, finetune_episode
from tir_kernels.fewshot.methods import lora
from tir_kernels.fewshot.methods.second_stream import SecondStream

GPU = torch.device("cuda", 0)


class FakeStreams:
    """Stands in for the streams of torch.cuda: notes what happens in which order, and where."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.main = self._named("main")
        self.current = self.main
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self._named("second"))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self.stream)

    def _named(self, name: str) -> SimpleNamespace:
        def wait_stream(other: SimpleNamespace) -> None:
            self.log.append(f"{name} waits for {other.name}")

        return SimpleNamespace(name=name, device=GPU, wait_stream=wait_stream)

    @contextlib.contextmanager
    def stream(self, stream: SimpleNamespace) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def tensor(self, name: str) -> Any:
        """Stands in for a tensor whose memory another stream comes to use."""
        return SimpleNamespace(
            record_stream=lambda stream: self.log.append(f"{stream.name} uses {name}")
        )


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> FakeStreams:
    return FakeStreams(monkeypatch)


@pytest.mark.parametrize("is_pair", [False, True])
def test_a_function_forks_and_is_joined_once(streams: FakeStreams, is_pair: bool) -> None:
    second, result = SecondStream(), streams.tensor("result")

    def function() -> Any:
        streams.log.append(f"{streams.current.name} runs")
        return (result, result) if is_pair else result

    assert not second.is_under_way
    second.run(function, GPU, [streams.tensor("factors")])
    assert second.is_under_way
    second.join()
    second.join()
    assert not second.is_under_way
    assert streams.log == [
        "second waits for main",
        "second uses factors",
        "second runs",
        "main waits for second",
        *["main uses result"] * (1 + is_pair),
    ]


def test_a_cpu_knows_no_streams(streams: FakeStreams) -> None:
    second = SecondStream()
    assert second.run(lambda: (1, 2), torch.device("cpu"), [streams.tensor("factors")]) == (1, 2)
    assert not second.is_under_way
    second.join()
    assert streams.log == []


class Watched(SecondStream):
    """A second stream that is none; it notes when it would fork and be joined."""

    log: list[str]

    def run(
        self, function: Callable[[], Any], device: torch.device, read: Iterable[Tensor] = ()
    ) -> Any:
        self.log.append("fork")
        result = function()
        self._results = ()
        return result

    def join(self) -> None:
        if self.is_under_way:
            self.log.append("join")
        self._results = None


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    Watched.log = []
    monkeypatch.setattr(lora, "SecondStream", Watched)
    return Watched.log


IMAGES = [f"image {layer}" for layer in range(4)]  # the last block runs for the class token alone
# What happens in a step, behind the fork and the text tower.
ORDERS = {
    "lora": [*IMAGES, "join"],
    "tir": [*IMAGES[:2], "join", *IMAGES[2:]],  # in block 1, the first that is re-weighted
    "atha": ["join", *IMAGES],  # its own logits, which know nothing of streams
    "mind": IMAGES,  # its own losses, which do not fork
}


@pytest.mark.parametrize("name", ORDERS)
def test_texts_are_waited_for_where_they_are_first_read(watched: list[str], name: str) -> None:
    model, method = make_model(), as_method(name, steps=1)
    for tower, blocks in (("text", model.transformer), ("image", model.visual.transformer)):
        for layer, block in enumerate(blocks.resblocks):
            note = f"{tower} {layer}"
            block.register_forward_pre_hook(lambda block, inputs, note=note: watched.append(note))
    finetune_episode(model, make_tokenizer(), EPISODES[0], method)
    texts = [f"text {layer}" for layer in range(3)] if method.context_tokens else []
    begin = watched.index("fork") if "fork" in watched else watched.index(IMAGES[0])
    step = [note for note in watched[begin:] if not note.startswith("text")]
    fork = ["fork"] if "fork" in watched else []
    expected = fork + ORDERS[name]
    assert bool(fork) is (name != "mind")
    assert step[: len(expected)] == expected
    if fork and texts:
        assert watched[begin + 1 : begin + 1 + len(texts)] == texts


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["lora", "tir", "atha"])
def test_a_gpu_trains_the_same_with_one_stream(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Also in the steps behind the first three, which are a graph."""
    method, runtime = as_method(name, steps=METHOD.steps), Runtime(device="cuda")

    def train() -> Any:
        model = make_model().cuda()
        return finetune_episode(model, make_tokenizer(), EPISODES[0], method, runtime=runtime)

    two = train()
    monkeypatch.setattr(SecondStream, "run", lambda self, function, *rest: function())
    assert_same(two, train())
