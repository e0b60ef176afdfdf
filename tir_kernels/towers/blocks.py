"""The part of a tower's block that is alike in all families: where adapters are put."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from tir_kernels.towers.opening import Opened, put_on, require_own_forward, take_off
from tir_kernels.towers.protocol import AttentionCall, BlockAdapter

Self = TypeVar("Self", bound="BlockBase")


class BlockBase:
    """A view of one block of a model.

    Args:
        module: The library's block.
        path: Its path in the model.

    Attributes:
        opened: Class of a block, an attention, a linear map or an MLP -> the class that stands in
            for it.
        products: Class of a module -> the names of its parameters that are multiplied, or added to
            a product: those that an autocast region converts.
        attention_name: The block's attribute that is its attention.
        last_linears: Names that the last linear map of its MLP may have.
        batch_first: Whether the library's block takes the batch first.
    """

    opened: ClassVar[Mapping[type, type[Opened]]]
    products: ClassVar[Mapping[type, tuple[str, ...]]] = {
        **dict.fromkeys((nn.Linear, NonDynamicallyQuantizableLinear), ("weight", "bias")),
        nn.MultiheadAttention: (
            *("in_proj_weight", "in_proj_bias"),
            *("q_proj_weight", "k_proj_weight", "v_proj_weight"),
        ),
    }
    attention_name: ClassVar[str] = "attn"
    last_linears: ClassVar[tuple[str, ...]] = ("fc2",)
    batch_first: bool = True

    def __init__(self, module: Any, path: str) -> None:
        self.module = module
        self.path = path

    @property
    def attention(self) -> Any:
        return getattr(self.module, self.attention_name, None)

    @property
    def attention_path(self) -> str:
        return f"{self.path}.{self.attention_name}"

    @property
    def adapters(self) -> tuple[BlockAdapter, ...]:
        return self.module.tir_adapters if isinstance(self.module, Opened) else ()

    def twin(self: Self) -> Self:
        """The same block with the same parameters and adapters, which takes further adapters
        without the model's notice."""
        twin = copy.copy(self)
        twin.module = _with_own_children(self.module)
        if self.attention is not None:
            setattr(twin.module, self.attention_name, _with_own_children(self.attention))
        return twin

    def attention_of(self, hidden: Tensor) -> AttentionCall:
        """The attention of tokens (B, L, D) as they enter, without modifiers; it must be opened."""
        return self.attention.call_of(self.norm_first(hidden))

    def norm_first(self, hidden: Tensor) -> Tensor:
        """(B, L, D) as the attention takes them."""
        raise NotImplementedError

    def check_attention(self) -> None:
        """Refuse an attention that can't be opened, with a TypeError."""
        raise NotImplementedError

    def put(self, adapter: BlockAdapter, changes_attention: bool) -> None:
        """Put an adapter on the block.

        Args:
            adapter: Sees what enters the block.
            changes_attention: Whether it gives modifiers.

        Raises:
            TypeError: A block or attention that can't be opened.
        """
        if not isinstance(self.module, Opened) and type(self.module) not in self.opened:
            raise TypeError(
                f"model has a block of kind {type(self.module).__name__}, which no adapter knows; "
                "choose an architecture with the library's usual blocks"
            )
        if changes_attention:
            self.check_attention()
            require_own_forward(self.module)
            put_on(self.attention, adapter, self.opened)
        put_on(self.module, adapter, self.opened)

    def take(self, adapter: BlockAdapter) -> None:
        """Take an adapter off again; harmless where it is not on."""
        if any(each is adapter for each in self.adapters):
            take_off(self.module, adapter)
            take_off(self.attention, adapter)

    def put_low_rank(self, owner: Any, low_rank: nn.Module, handle: Any) -> None:
        """Put LoRA on the owner of some linear maps of the block.

        Raises:
            TypeError: An attention that can't be opened.
            RuntimeError: LoRA is on it already.
        """
        if getattr(owner, "low_rank", None) is not None:
            raise RuntimeError(
                "model has LoRA already: call remove() on the handle of its add_lora(), which "
                "loras_of(model) finds"
            )
        self.check_attention()
        put_on(owner, handle, self.opened)
        owner.low_rank = low_rank

    def take_low_rank(self, owner: Any, handle: Any) -> None:
        """Take LoRA off again."""
        del owner.low_rank
        take_off(owner, handle)


def _with_own_children(module: nn.Module) -> Any:
    """A shallow copy whose children can be replaced without the original's notice."""
    twin = copy.copy(module)
    vars(twin)["_modules"] = dict(module._modules)
    return twin
