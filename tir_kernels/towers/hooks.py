"""Functions called with what a block has made: its output, or its MLP's neurons."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

# Given a tensor, batch first: the one to go on with in its place, or None to leave it.
Seen = Callable[[Tensor], Tensor | None]


def on_output(block: Any, seen: Seen) -> RemovableHandle:
    """Call a function with the tokens (B, L, D) that leave an opened block, in every pass."""
    return block.module.register_forward_hook(_OutputHook(seen, block.batch_first))


def on_neurons(block: Any, seen: Seen) -> RemovableHandle:
    """Call a function with the activations (B, L, K) of the neurons of an opened block's MLP.

    They are what its last linear map takes: behind the activation, and behind a gate where there is
    one.

    Raises:
        TypeError: An MLP of a kind whose last linear map is not known.
    """
    return last_linear(block).register_forward_pre_hook(_InputHook(seen, block.batch_first))


def last_linear(block: Any) -> nn.Linear:
    """The last linear map of an opened block's MLP, whose inputs are the MLP's neurons.

    Raises:
        TypeError: An MLP of a kind in which it is not known.
    """
    mlp = getattr(block.module, "mlp", None)
    names = getattr(block, "last_linears", ())
    last = next((getattr(mlp, name) for name in names if hasattr(mlp, name)), None)
    if not isinstance(last, nn.Linear):
        kind = type(block.module if mlp is None else mlp).__name__
        raise TypeError(
            f"model has blocks with an MLP of kind {kind}, whose neurons are not known; choose an "
            "architecture with the library's usual MLP"
        )
    return last


class _OutputHook:
    """A forward hook; an object, so that a copy of the model has its own."""

    def __init__(self, seen: Seen, batch_first: bool) -> None:
        self.seen = seen
        self.batch_first = batch_first

    def _result(self, tensor: Tensor) -> Tensor | None:
        if self.batch_first:
            return self.seen(tensor)
        result = self.seen(tensor.transpose(0, 1))
        return None if result is None else result.transpose(0, 1)

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        return self._result(output)


class _InputHook(_OutputHook):
    """A forward pre-hook."""

    def __call__(self, module: nn.Module, inputs: Any, output: Any = None) -> Tensor | None:
        return self._result(inputs[0])
