"""Repeated steps as CUDA graphs: where they are captured, and what failures say."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tir_kernels.fewshot.train import graph
from tir_kernels.fewshot.train.graph import LossLog, RepeatedStep

WARM_UP = 3
SECOND = torch.device("cuda", 1)


class FakeCuda:
    """Stands in for torch.cuda: remembers what is current, and what a capture was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current_device = 0
        self.streams: dict[int, object] = {0: "main of 0", 1: "main of 1"}
        self.captures: list[dict] = []
        self.replays = 0
        self.is_capturing = False
        self.end_fails = ""
        for name in ("device", "stream", "graph", "current_stream", "CUDAGraph", "Stream"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def Stream(self, device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(device=device, wait_stream=lambda other: None)

    def current_stream(self, device: torch.device) -> SimpleNamespace:
        stream = self.streams[device.index]
        if isinstance(stream, str):
            stream = self.streams[device.index] = self.Stream(device)
        return stream

    def CUDAGraph(self) -> SimpleNamespace:
        def replay() -> None:
            self.replays += 1

        return SimpleNamespace(replay=replay)

    @contextlib.contextmanager
    def device(self, device: torch.device):
        before, self.current_device = self.current_device, device.index
        try:
            yield
        finally:
            self.current_device = before

    @contextlib.contextmanager
    def stream(self, stream: SimpleNamespace):
        index = stream.device.index
        before, self.streams[index] = self.streams[index], stream
        try:
            with self.device(stream.device):
                yield
        finally:
            self.streams[index] = before

    @contextlib.contextmanager
    def graph(self, graph, stream=None, capture_error_mode="global"):
        self.captures.append(
            {"device": self.current_device, "stream": stream, "mode": capture_error_mode}
        )
        before, self.streams[self.current_device] = self.streams[self.current_device], stream
        self.is_capturing = True
        try:
            yield
        finally:
            self.is_capturing = False
            if self.end_fails:  # as in PyTorch, the stream then stays
                raise RuntimeError(self.end_fails)
            self.streams[self.current_device] = before


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


def losses(value: float = 0.0) -> SimpleNamespace:
    return SimpleNamespace(value=value, record_stream=lambda stream: None)


def test_a_step_is_captured_on_its_own_device_and_side_stream(fake: FakeCuda) -> None:
    seen: list[tuple[int, object]] = []

    def step() -> SimpleNamespace:
        seen.append((fake.current_device, fake.streams[1]))
        return losses(len(seen))

    repeated = RepeatedStep(step, SECOND, as_graph=True)
    results = [repeated() for _ in range(WARM_UP + 3)]
    assert len(seen) == WARM_UP + 1
    assert seen == [(1, repeated._side_stream)] * (WARM_UP + 1)
    assert fake.captures == [{"device": 1, "stream": repeated._side_stream, "mode": "thread_local"}]
    assert fake.replays == 3
    assert [result.value for result in results] == [1, 2, 3, 4, 4, 4]
    assert fake.current_device == 0


def capture_failing(fake: FakeCuda, error: Exception | None, end_fails: str = "") -> None:
    def step() -> SimpleNamespace:
        if fake.is_capturing and error is not None:
            raise error
        return losses()

    repeated = RepeatedStep(step, SECOND, as_graph=True)
    for _ in range(WARM_UP):
        repeated()
    main = fake.streams[1]
    fake.end_fails = end_fails
    try:
        repeated()
    finally:
        assert fake.streams[1] is main
        assert fake.current_device == 0
        assert fake.replays == 0


@pytest.mark.parametrize("end_fails", ["", "operation failed due to a previous error"])
def test_too_little_memory_in_a_capture_says_so(fake: FakeCuda, end_fails: str) -> None:
    with pytest.raises(torch.OutOfMemoryError, match="tried to allocate 2 GiB"):
        capture_failing(fake, torch.OutOfMemoryError("tried to allocate 2 GiB"), end_fails)


def test_too_little_memory_for_the_graph_says_so(fake: FakeCuda) -> None:
    with pytest.raises(torch.OutOfMemoryError, match="CUDA error: out of memory"):
        capture_failing(fake, None, "CUDA error: out of memory")


def test_other_failures_of_a_capture_stay_what_they_are(fake: FakeCuda) -> None:
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing") as caught:
        capture_failing(fake, RuntimeError("operation not permitted when stream is capturing"))
    assert not isinstance(caught.value, torch.OutOfMemoryError)


class LateEvent:
    """Stands in for an event of a GPU: it comes when it is waited for, or with its turn."""

    has_come = False

    def record(self, stream: object) -> None:
        self.has_come = False

    def query(self) -> bool:
        return self.has_come

    def synchronize(self) -> None:
        self.has_come = True


class OnGpu:
    """Stands in for losses on a GPU, whose copies are there at once."""

    device = SECOND
    dtype = torch.float32

    def __init__(self, *values: float) -> None:
        self._values = torch.tensor(values)
        self.shape = self._values.shape

    def detach(self) -> Tensor:
        return self._values


@pytest.fixture
def pinned(fake: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """All pinned memory that is made, which is none where there is no GPU."""
    made: list[Tensor] = []
    empty = torch.empty

    def spy(*shape: object, pin_memory: bool = False, **options: object) -> Tensor:
        tensor = empty(*shape, **options)
        made.extend([tensor] if pin_memory else [])
        return tensor

    monkeypatch.setattr(torch, "empty", spy)
    monkeypatch.setattr(torch.cuda, "Event", LateEvent)
    return made


@pytest.mark.parametrize("steps", [1, graph._STEPS_AHEAD, 3 * graph._STEPS_AHEAD + 5])
def test_losses_come_in_order_through_one_pinned_buffer(pinned: list[Tensor], steps: int) -> None:
    seen: list[tuple[int, int, float]] = []
    log = LossLog(2, lambda *arguments: seen.append(arguments))
    for step in range(steps):
        log.add(OnGpu(step, 1000 + step))  # type: ignore[arg-type]
    assert len(seen) == 2 * max(0, steps - graph._STEPS_AHEAD)  # none is waited for before its turn
    assert log.finish() == [[*range(steps)], [*range(1000, 1000 + steps)]]
    assert seen == [(own, step, 1000.0 * own + step) for step in range(steps) for own in (0, 1)]
    assert [tuple(each.shape) for each in pinned] == [(graph._STEPS_AHEAD, 2)]


def test_losses_that_have_come_are_read(pinned: list[Tensor]) -> None:
    log = LossLog(1, None)
    log.add(OnGpu(1.0))  # type: ignore[arg-type]
    assert log.losses == [[]]
    log._under_way[0].is_filled.synchronize()
    log.add(OnGpu(2.0))  # type: ignore[arg-type]
    assert log.losses == [[1.0]]
    assert log.finish() == [[1.0, 2.0]]
    log.add(OnGpu(3.0))  # type: ignore[arg-type]
    assert log.finish() == [[1.0, 2.0, 3.0]]
    assert len(pinned) == 1


def counting_step(device: torch.device) -> tuple[Tensor, Callable[[], Tensor]]:
    parameter = torch.zeros(4, device=device, requires_grad=True)
    optimizer = torch.optim.SGD([parameter], lr=1.0)

    def step() -> Tensor:
        loss = -parameter.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # in a thread of PyTorch's own
        optimizer.step()
        return loss.detach().reshape(1)

    return parameter, step


def second_gpu() -> torch.device:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    return SECOND


@pytest.mark.gpu
@pytest.mark.parametrize("is_second", [False, True])
def test_a_graph_trains_every_step(is_second: bool) -> None:
    """Also while another thread allocates, and while another device is current."""
    device = second_gpu() if is_second else torch.device("cuda", 0)
    parameter, step = counting_step(device)
    repeated = RepeatedStep(step, device, as_graph=True)
    is_over = threading.Event()

    def allocate() -> None:
        while not is_over.is_set():
            torch.zeros(8, pin_memory=True).to(device)

    other = threading.Thread(target=allocate)
    other.start()
    try:
        with torch.cuda.device(0):
            seen = [repeated().item() for _ in range(8)]
    finally:
        is_over.set()
        other.join()
    assert seen == [-4.0 * step for step in range(8)]
    assert parameter.tolist() == [8.0] * 4


@pytest.mark.gpu
def test_losses_of_a_gpu_are_read_in_order() -> None:
    log, losses = LossLog(2, None), torch.zeros(2, device="cuda")
    steps = 2 * graph._STEPS_AHEAD + 3
    for _ in range(steps):
        log.add(losses)
        losses += 1
    assert log.finish() == [[float(step) for step in range(steps)]] * 2


@pytest.mark.gpu
def test_memory_that_runs_out_in_a_capture_leaves_the_device_usable() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    taken = 0

    def step() -> Tensor:
        nonlocal taken
        taken += 1
        if taken > WARM_UP:
            return torch.empty(2**50, dtype=torch.uint8, device=device)
        return torch.zeros(1, device=device)

    repeated = RepeatedStep(step, device, as_graph=True)
    for _ in range(WARM_UP):
        repeated()
    before = torch.cuda.current_stream(device)
    with pytest.raises(torch.OutOfMemoryError):
        repeated()
    assert torch.cuda.current_stream(device) == before
    parameter, plain = counting_step(device)
    again = RepeatedStep(plain, device, as_graph=True)
    for _ in range(WARM_UP + 2):
        again()
    assert parameter.tolist() == [WARM_UP + 2.0] * 4
