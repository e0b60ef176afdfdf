"""Work beside other work on a GPU: on a stream of its own, also in a step that becomes a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class SecondStream:
    """A stream that forks from the current one and is joined before its results are read.

    A graph that is captured meanwhile has both as branches; the backward pass follows by itself,
    since autograd takes each operator's gradient on the operator's stream. On a CPU all runs as if
    this were not there.
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._results: tuple[Tensor, ...] | None = None

    @property
    def is_under_way(self) -> bool:
        """Whether there are results that must not be read yet."""
        return self._results is not None

    def run(
        self,
        function: Callable[[], Any],
        device: torch.device,
        read: Iterable[Tensor] = (),
    ) -> Any:
        """The result of a function, to be read behind ``join`` alone.

        Args:
            function: What runs on the second stream; it gives a tensor, or a tuple of tensors.
            device: Where it runs.
            read: Tensors made on the current stream for this pass alone, that the function reads.
        """
        if device.type != "cuda":
            return function()
        import torch

        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        for tensor in read:  # their memory must not be used anew before this stream is done
            tensor.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            result = function()
        self._results = result if isinstance(result, tuple) else (result,)
        return result

    def join(self) -> None:
        """Let what the current stream does from now on come behind the function."""
        if self._results is None or self._stream is None:
            return
        import torch

        current = torch.cuda.current_stream(self._stream.device)
        current.wait_stream(self._stream)
        for tensor in self._results:
            tensor.record_stream(current)
        self._results = None
