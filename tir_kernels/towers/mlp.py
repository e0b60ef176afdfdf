"""An MLP in the open: its first bias and its activation as one operator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from tir_kernels.operators.bias_activation import bias_activation
from tir_kernels.towers import products
from tir_kernels.towers.opening import Opened, is_untouched


@dataclass(frozen=True, eq=False)
class FusedActivation:
    """What is put on an MLP.

    Args:
        backend: Of ``bias_activation``.
    """

    backend: str


class OpenedMlp(Opened):
    """An MLP with a :class:`FusedActivation` on it; a family says what its layers are.

    On a GPU, PyTorch's products take the bias along themselves, so nothing changes there.

    Attributes:
        kinds: Class of an activation -> its kind for ``bias_activation``.
    """

    kinds: ClassVar[Mapping[type, str]]

    def in_turn(self) -> Sequence[nn.Module]:
        """All layers, each of which takes what the one before gives."""
        raise NotImplementedError

    def forward(self, hidden: Tensor) -> Tensor:
        layers = self.in_turn()
        kind = self._kind(layers)
        if kind is None or hidden.device.type != "cpu":
            return self.plain_forward(hidden)
        linear, _, *others = layers
        product = products.linear(hidden, linear.weight)  # type: ignore[arg-type]
        backend = self.tir_adapters[-1].backend
        hidden = bias_activation(product, linear.bias, kind, backend=backend)  # type: ignore[arg-type]
        for layer in others:
            hidden = products.through(layer, hidden)
        return hidden

    def _kind(self, layers: Sequence[nn.Module]) -> str | None:
        """The kind of the activation; ``None`` where the operator is not what the layers do."""
        if len(layers) < 2 or type(layers[0]) is not nn.Linear:
            return None
        linear, activation = layers[:2]
        if not (is_untouched(linear) and is_untouched(activation)):  # they are not called
            return None
        if linear.bias is not None and linear.bias.requires_grad:
            return None
        kind = self.kinds.get(type(activation))
        by_tanh = kind == "gelu" and getattr(activation, "approximate", "none") == "tanh"
        return "gelu_tanh" if by_tanh else kind
