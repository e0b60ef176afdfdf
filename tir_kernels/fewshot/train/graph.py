"""Training steps that the processor never waits for: CUDA graphs, and losses read as they come."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_WARM_UP_STEPS = 3
_STEPS_AHEAD = 64  # far enough that the device never waits for the processor


class RepeatedStep:
    """Runs a training step again and again; on CUDA as a graph, once the first ones have run.

    A step at few images is bound by launching its kernels; a graph launches all of them at once.

    Args:
        step: Takes a step and returns its losses; it must do the same work each time, on the same
            tensors, and never wait for the device.
        device: Where it runs; it need not be the current device.
        as_graph: Whether it may become a graph.
    """

    def __init__(self, step: Callable[[], Tensor], device: torch.device, as_graph: bool) -> None:
        self._step = step
        self._graph: torch.cuda.CUDAGraph | None = None
        self._losses: Tensor | None = None
        self._as_graph = as_graph and device.type == "cuda"
        self._steps_taken = 0
        self._side_stream = torch.cuda.Stream(device) if self._as_graph else None

    def __call__(self) -> Tensor:
        """The step's losses; of a graph always the same tensor, overwritten by the next step."""
        if not self._as_graph:
            return self._step()
        self._steps_taken += 1
        if self._steps_taken <= _WARM_UP_STEPS:
            return self._off_the_main_stream()
        if self._graph is None:
            self._graph = self._capture()
        self._graph.replay()
        assert self._losses is not None
        return self._losses

    def _capture(self) -> torch.cuda.CUDAGraph:
        """The step as a graph; capturing runs nothing.

        Raises:
            torch.OutOfMemoryError: The step or its graph has too little memory.
        """
        assert self._side_stream is not None
        device, graph = self._side_stream.device, torch.cuda.CUDAGraph()
        shortage = ""
        try:
            with (
                torch.cuda.device(device),
                # A capture that fails leaves its own stream current; this one puts it back.
                torch.cuda.stream(torch.cuda.current_stream(device)),
                # Other threads of the process may do what a capture forbids, on their streams.
                torch.cuda.graph(
                    graph, stream=self._side_stream, capture_error_mode="thread_local"
                ),
            ):
                try:
                    self._losses = self._step()
                except torch.OutOfMemoryError as error:
                    shortage = str(error)
                    raise
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # Ending a capture that memory did not suffice for can fail in turn, and hide why.
            if not shortage and "out of memory" not in str(error):
                raise
            raise torch.OutOfMemoryError(shortage or str(error)) from error
        return graph

    def _off_the_main_stream(self) -> Tensor:
        # What will be captured must have run on another stream before.
        assert self._side_stream is not None
        main = torch.cuda.current_stream(self._side_stream.device)
        self._side_stream.wait_stream(main)
        with torch.cuda.stream(self._side_stream):
            losses = self._step()
        main.wait_stream(self._side_stream)
        losses.record_stream(main)
        return losses


class _Place(NamedTuple):
    """Where a step's losses are copied to, and what tells that they are there."""

    losses: Tensor  # (G,), pinned
    is_filled: torch.cuda.Event


def _places(losses: Tensor) -> list[_Place]:
    """Places for the losses of as many steps as the processor may be ahead of the device."""
    shape = (_STEPS_AHEAD, *losses.shape)
    pinned = torch.empty(shape, dtype=losses.dtype, device="cpu", pin_memory=True)
    return [_Place(row, torch.cuda.Event()) for row in pinned]


class LossLog:
    """The losses of G episodes, step by step, each up to the first that is not finite.

    Args:
        size: G.
        on_step: Called with the episode's position, the step from 0, and its loss.

    Attributes:
        losses: One list an episode, of the steps that have been read.
    """

    def __init__(self, size: int, on_step: Callable[[int, int, float], None] | None) -> None:
        self.losses: list[list[float]] = [[] for _ in range(size)]
        self._on_step = on_step
        self._steps_read = 0
        # On a GPU: places that losses are copied to, those in use first. Pinned, or a copy would
        # wait; a few that take turns, since the first uses of pinned memory wait too.
        self._under_way: deque[_Place] = deque()
        self._free: deque[_Place] = deque()

    def add(self, losses: Tensor) -> None:
        """Take a step's losses (G,) without waiting for them."""
        if losses.device.type != "cuda":
            self._read(losses)
            return
        if not self._free and not self._under_way:
            self._free.extend(_places(losses))
        if not self._free:
            self._read_oldest()
        place = self._free.popleft()
        place.losses.copy_(losses.detach(), non_blocking=True)
        place.is_filled.record(torch.cuda.current_stream(losses.device))
        self._under_way.append(place)
        while self._under_way and self._under_way[0].is_filled.query():
            self._read_oldest()

    def resume(self, losses: list[list[float]]) -> None:
        """Go on behind the losses of an earlier part of the training."""
        self.losses = [list(own) for own in losses]
        self._steps_read = max(map(len, losses))

    def finish(self) -> list[list[float]]:
        """Wait for what is under way, and return the losses."""
        while self._under_way:
            self._read_oldest()
        return self.losses

    @property
    def all_failed(self) -> bool:
        """Whether no episode has a finite loss any more, as far as has been read."""
        return all(own and not math.isfinite(own[-1]) for own in self.losses)

    def _read_oldest(self) -> None:
        """Read the losses of the first step that is under way, once they have come."""
        place = self._under_way.popleft()
        place.is_filled.synchronize()
        self._read(place.losses)
        self._free.append(place)

    def _read(self, losses: Tensor) -> None:
        step, self._steps_read = self._steps_read, self._steps_read + 1
        for index, loss in enumerate(losses.tolist()):
            own = self.losses[index]
            if own and not math.isfinite(own[-1]):
                continue
            own.append(loss)
            if self._on_step is not None and math.isfinite(loss):
                self._on_step(index, step, loss)
