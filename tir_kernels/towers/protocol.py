"""The seams of the towers: what adapters may rely on, and what a new family has to give.

B images or texts, L tokens, D model width, H heads, d head width, E joint width."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from tir_kernels import JointSpace


class KeyWeights(Protocol):
    """Weights of the keys that one operator derives and uses, so that they are never written."""

    def attend(self, call: AttentionCall) -> Tensor: ...  # (B, H, Lq, d)
    def form(self) -> Tensor: ...  # (B, L), for a modifier that has to see them


class AttentionCall(NamedTuple):
    """The inputs of one attention, after QK-norm and rotary embedding; modifiers change them."""

    query: Tensor  # (B, H, Lq, d)
    key: Tensor  # (B, H, L, d)
    value: Tensor  # (B, H, L, d)
    scale: float | None = None  # None: d ** -0.5
    key_weights: Tensor | KeyWeights | None = None  # (B, L); None: all keys count alike
    mask: Tensor | None = None  # added to the scores; (Lq, L) or (B, H, Lq, L)
    backend: str = "auto"
    is_causal: bool = False  # each query attends to the keys up to its own place; without a mask


Modifier = Callable[[AttentionCall, Tensor], AttentionCall]  # given what entered, (B, L, D)


class BlockAdapter(Protocol):
    """An adapter on a block: it may change what enters, and the attention of the same pass."""

    def enter(self, hidden: Tensor) -> tuple[Tensor, Modifier | None]: ...  # (B, L, D)


class Linear(NamedTuple):
    """One linear map of a block, perhaps packed with others into one matrix."""

    owner: nn.Module  # takes the low-rank change, as the submodule ``low_rank``
    shape: tuple[int, int, int]  # parts, output width, input width
    is_called: bool = True  # False: the library reads the owner's weight past its forward


class Block(Protocol):
    """A transformer block, batch first whatever the library's own layout is."""

    @property
    def attention_path(self) -> str: ...  # in the model
    @property
    def linears(self) -> Mapping[str, Linear]: ...  # "q", "k", "v"; of one owner, as packed
    @property
    def adapters(self) -> tuple[BlockAdapter, ...]: ...
    def __call__(self, hidden: Tensor, mask: Any = None) -> Tensor: ...  # Tensor or KnownMask
    def attention_of(self, hidden: Tensor) -> AttentionCall: ...  # with LoRA, without modifiers
    def twin(self) -> Block: ...  # takes adapters without the model's notice
    def first_tokens(self, hidden: Tensor, count: int) -> Tensor | None: ...  # None: run it whole
    def put(self, adapter: BlockAdapter, changes_attention: bool) -> None: ...
    def take(self, adapter: BlockAdapter) -> None: ...
    def put_low_rank(self, owner: nn.Module, low_rank: nn.Module, handle: Any) -> None: ...
    def take_low_rank(self, owner: nn.Module, handle: Any) -> None: ...


class VisionTower(Protocol):
    """An image tower in parts: ``pool(blocks(embed(images)))`` are the image features."""

    @property
    def num_prefix_tokens(self) -> int: ...  # in front; has_class_token: docs/towers.md
    @property
    def reads(self) -> int | None: ...  # how many of the first tokens pool reads; None: all
    @property
    def blocks(self) -> Sequence[Block]: ...
    @property
    def joint_space(self) -> JointSpace: ...  # takes compared_tokens the rest of the way
    def compared_tokens(self, hidden: Tensor) -> Tensor: ...  # (B, L, D) -> (B, L, K)
    def embed(self, images: Tensor) -> Tensor: ...  # (B, 3, H, W) -> (B, L, D)
    def pool(self, hidden: Tensor) -> Tensor: ...  # (B, L, D) -> (B, E)
    def patch_features(self, hidden: Tensor) -> Tensor: ...  # (B, L, D) -> (B, patches, E)


class TextTower(Protocol):
    """A text tower in parts, from token ids (C, T) to class embeddings (C, E)."""

    @property
    def is_causal(self) -> bool: ...
    @property
    def blocks(self) -> Sequence[Block]: ...
    def embed(self, token_ids: Tensor) -> Tensor: ...  # (C, T) -> (C, T, W), without positions
    def last_position(self, token_ids: Tensor) -> Tensor: ...  # (C,), what pool reads
    def key_mask(self, token_ids: Tensor) -> Tensor | None: ...  # (C, L) bool; None: all are keys
    def start(self, embeddings: Tensor) -> Tensor: ...  # -> (C, L, W), what enters the first block
    def mask(self, length: int, key_mask: Tensor | None) -> Any: ...  # as its blocks take it
    def pool(self, hidden: Tensor, last_position: Tensor) -> Tensor: ...  # -> (C, E)
