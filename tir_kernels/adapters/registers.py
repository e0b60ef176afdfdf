"""Tokens appended to those of an image, and neurons moved onto them: registers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tir_kernels.adapters.handle import Handle
from tir_kernels.adapters.sinks import norm_outliers
from tir_kernels.scalars import whole_number
from tir_kernels.towers import vision_tower
from tir_kernels.towers.hooks import last_linear, on_neurons, on_output
from tir_kernels.towers.protocol import Block, Modifier, VisionTower

FOUND_AT_ONCE = 16  # images
REGISTER_VALUES = ("neuron", "layer")


class Neuron(NamedTuple):
    """A neuron of a block's MLP."""

    layer: int
    number: int


class AppendedTokens(Handle):
    """Tokens behind an image's own from the first block to the last, whose output lacks them.

    As a context manager it removes itself at the end. It is a setting of the model.

    Args:
        tower: The opened tower.
    """

    def __init__(self, tower: VisionTower) -> None:
        blocks = tower.blocks
        if any(block.adapters for block in blocks):
            raise RuntimeError(
                "model's blocks have adapters that would take registers for patches; call their "
                "remove() first"
            )
        self._norm_pre = _norm_pre(tower)
        self._places: list[tuple[Block, _Entrance]] = []
        self._watches: list[RemovableHandle] = []
        try:
            self._enter_at(blocks[0], appends=True)
            if len(blocks) > 1:
                self._enter_at(blocks[-1])
        except TypeError:  # and a block that cannot be opened leaves none changed
            self.remove()
            raise
        self._watch(on_output(blocks[-1], _Drop(self)))

    def _enter_at(self, block: Block, appends: bool = False) -> None:
        """Put an adapter on a block, so that it is run whole; on the first, one that appends."""
        entrance = _Entrance(self if appends else None)
        block.put(entrance, changes_attention=False)
        self._places.append((block, entrance))

    def _watch(self, hook: RemovableHandle) -> None:
        self._watches.append(hook)

    def tokens(self, hidden: Tensor) -> Tensor | None:
        """(B, R, D), what is appended to tokens (B, L, D) as they enter the first block."""
        raise NotImplementedError

    @property
    def count(self) -> int:
        """How many tokens are behind an image's own at present."""
        raise NotImplementedError

    def remove(self) -> None:
        for block, entrance in self._places:
            block.take(entrance)
        for hook in self._watches:
            hook.remove()
        self._places, self._watches = [], []


class _Entrance:
    """The adapter on a block; without a handle it only keeps the block whole."""

    def __init__(self, handle: AppendedTokens | None) -> None:
        self.handle = handle

    def enter(self, hidden: Tensor) -> tuple[Tensor, Modifier | None]:
        tokens = None if self.handle is None else self.handle.tokens(hidden)
        if tokens is None:
            return hidden, None
        return torch.cat([hidden, tokens.to(hidden)], 1), None


class _Drop:
    """The end of the last block."""

    def __init__(self, handle: AppendedTokens) -> None:
        self.handle = handle

    def __call__(self, hidden: Tensor) -> Tensor:
        return hidden[:, : hidden.shape[1] - self.handle.count]


def _norm_pre(tower: VisionTower) -> Callable[[Tensor], Tensor]:
    """What tokens with positions go through in front of the tower's first block."""
    norm_pre = getattr(tower, "norm_pre", None)  # towers need not have it
    if norm_pre is None:
        kind = type(getattr(tower, "module", tower)).__name__
        raise TypeError(
            f"model's image tower, a {kind}, takes no registers behind its patches: it has no "
            "norm_pre, as none has whose blocks take rotary positions or masks of patches alone; "
            "choose an architecture such as ViT-B-16"
        )
    return norm_pre


class TestTimeRegisters(AppendedTokens):
    """Handle of :func:`add_test_time_registers`."""

    __test__ = False  # no test, whatever it is called

    def __init__(self, tower: VisionTower, registers: int, value: str) -> None:
        self.registers = registers
        self.value = value
        self._prefix = tower.num_prefix_tokens
        self._blocks = tower.blocks
        self._columns: dict[int, tuple[Tensor, Tensor]] = {}
        self._is_on = False
        super().__init__(tower)

    def set_neurons(self, groups: Sequence[Sequence[Neuron]]) -> None:
        """Set the register neurons; of G groups of images, of each its own.

        Without any in all groups the tower is as it was, and so it is where they are refused.

        Raises:
            TypeError: A block whose MLP's neurons are not known.
            ValueError: There is no such block or neuron.
        """
        self._unset()
        try:
            self._set(groups)
        except (TypeError, ValueError):
            self._unset()
            raise

    def _set(self, groups: Sequence[Sequence[Neuron]]) -> None:
        layers = sorted({neuron.layer for own in groups for neuron in own})
        for layer in layers:
            if not 0 <= layer < len(self._blocks):
                raise ValueError(
                    f"neurons must be of blocks 0 to {len(self._blocks) - 1}; got block {layer}"
                )
            numbers = sorted({n.number for own in groups for n in own if n.layer == layer})
            block = self._blocks[layer]
            most = last_linear(block).in_features - 1
            if not 0 <= numbers[0] <= numbers[-1] <= most:
                raise ValueError(f"neurons of block {layer} must be of 0 to {most}; got {numbers}")
            chosen = [[Neuron(layer, number) in own for number in numbers] for own in groups]
            self._columns[layer] = (
                torch.tensor(numbers),
                torch.tensor(chosen),
            )
            self._watch(on_neurons(block, _Edit(self, layer)))
            if layer not in (0, len(self._blocks) - 1):
                self._enter_at(block)
        self._is_on = bool(layers)

    def _unset(self) -> None:
        ends = 1 if len(self._blocks) == 1 else 2
        for block, entrance in self._places[ends:]:
            block.take(entrance)
        for hook in self._watches[1:]:
            hook.remove()
        self._places, self._watches = self._places[:ends], self._watches[:1]
        self._columns, self._is_on = {}, False

    @property
    def count(self) -> int:
        return self.registers if self._is_on else 0

    def tokens(self, hidden: Tensor) -> Tensor | None:
        if not self.count:
            return None
        batch, _, width = hidden.shape
        return self._norm_pre(hidden.new_zeros(batch, self.count, width))

    def edit(self, layer: int, values: Tensor) -> Tensor:
        """(B, L, K) activations of a block's neurons, those of the register neurons moved."""
        columns, chosen = (each.to(values.device) for each in self._columns[layer])
        if len(values) % len(chosen):
            raise ValueError(
                f"neurons were set for {len(chosen)} groups, of which {len(values)} images are no "
                "whole number"
            )
        of_image = chosen.repeat_interleave(len(values) // len(chosen), 0)[:, None]  # (B, 1, U)
        own = values[..., columns]
        largest = _largest(own)
        if self.value == "layer":
            largest = _largest((largest * of_image).mT).mT
        end = values.shape[1] - self.registers
        moved = own.clone()
        moved[:, self._prefix : end] = 0
        moved[:, end:] = largest
        return values.index_copy(-1, columns, torch.where(of_image, moved, own))


class _Edit:
    """The place of the change in one block's MLP."""

    def __init__(self, handle: TestTimeRegisters, layer: int) -> None:
        self.handle = handle
        self.layer = layer

    def __call__(self, values: Tensor) -> Tensor:
        return self.handle.edit(self.layer, values)


def _largest(values: Tensor) -> Tensor:
    """(B, L, U) -> (B, 1, U), the values of largest magnitude, with their signs."""
    return values.gather(1, values.abs().argmax(1, keepdim=True))


def add_test_time_registers(
    model: nn.Module | VisionTower, registers: int = 1, value: str = "neuron"
) -> TestTimeRegisters:
    """Move the work of register neurons from patches to tokens that are appended for it.

    Registers enter as zeros behind the positional embedding. In each neuron that is set, they get
    the activation of largest magnitude over all tokens, and patches get 0 (arXiv 2506.08010). The
    tower is as it was until ``handle.set_neurons(find_register_neurons(model, images))``. Adapters
    that are put on behind them, and measures, see registers as patches.

    Args:
        model: A model whose image tower can be opened, or that tower, without adapters on its
            blocks, LoRA aside.
        registers: R, the number of tokens; without any, patches get 0 all the same.
        value: "neuron", each neuron's own largest activation, or "layer", the largest of all set
            neurons of the block, as the published program has it for one of its models.

    Raises:
        TypeError, ValueError: An unsuitable model, number or value.
        RuntimeError: Adapters are on the blocks.
    """
    tower = vision_tower(model)
    registers = whole_number("registers", registers)
    if registers < 0:
        raise ValueError(f"registers must be at least 0; got {registers}")
    if value not in REGISTER_VALUES:
        raise ValueError(f"value must be one of {', '.join(REGISTER_VALUES)}; got {value!r}")
    return TestTimeRegisters(tower, registers, value)


@torch.no_grad()
def find_register_neurons(
    model: nn.Module | VisionTower,
    images: Tensor,
    count: int = 10,
    *,
    last_layer: int | None = None,
    norm_cut: float | None = None,
    groups: int = 1,
) -> list[list[Neuron]]:
    """The neurons that make patches stand out by their norm, from unlabelled images.

    A neuron's score is its mean absolute activation over the patches that stand out at the end of
    the last block, and its mean over the images that have such patches.

    Args:
        model: A model whose image tower can be opened, or that tower.
        images: (B, 3, H, W), or the tokens (B, L, D) that enter the first block.
        count: Neurons of highest score that are taken.
        last_layer: The last block whose neurons are; ``None``: that in the middle, 5 of 12.
        norm_cut: The norm above which a patch stands out; ``None``: as in
            :func:`tir_kernels.adapters.sinks.norm_outliers`.
        groups: G, of which each has B / G images and neurons of its own.

    Returns:
        The neurons of each group, the highest score first; none where no patch stands out.

    Raises:
        TypeError, ValueError: An unsuitable model, block or number of groups.
    """
    tower = vision_tower(model)
    blocks, prefix = tower.blocks, tower.num_prefix_tokens
    last_layer = max(len(blocks) // 2 - 1, 0) if last_layer is None else last_layer
    if not 0 <= last_layer < len(blocks):
        raise ValueError(f"last_layer must lie between 0 and {len(blocks) - 1}; got {last_layer}")
    if len(images) % groups:
        raise ValueError(f"groups must divide the {len(images)} images; got {groups}")
    tokens = tower.embed(images) if images.dim() == 4 else images
    parts: list[list[Tensor]] = [[] for _ in range(last_layer + 1)]
    has_outliers = []
    for hidden in tokens.split(FOUND_AT_ONCE):
        output = hidden
        for block in blocks:
            output = block(output)
        stands_out = norm_outliers(output[:, prefix:], norm_cut)
        has_outliers.append(stands_out.any(1))
        _add_scores(blocks[: last_layer + 1], hidden, stands_out, parts)
    scores = [torch.cat(own).unflatten(0, (groups, -1)).sum(1) for own in parts]  # (G, K) each
    ends = torch.tensor([own.shape[1] for own in scores]).cumsum(0).tolist()
    flat = torch.cat(scores, 1)
    found = torch.cat(has_outliers).unflatten(0, (groups, -1)).any(1).tolist()
    best = flat.argsort(dim=1, descending=True, stable=True)[:, :count].tolist()
    return [
        [_neuron(place, ends) for place in own] if is_found else []
        for own, is_found in zip(best, found, strict=True)
    ]


def _neuron(place: int, ends: list[int]) -> Neuron:
    layer = next(index for index, end in enumerate(ends) if place < end)
    return Neuron(layer, place - (ends[layer - 1] if layer else 0))


def _add_scores(
    blocks: Sequence[Block], hidden: Tensor, stands_out: Tensor, parts: list[list[Tensor]]
) -> None:
    """Add each block's (b, K) mean absolute activations over the patches (b, N) that stand out."""
    shares = stands_out / stands_out.sum(1, keepdim=True).clamp(min=1)
    for block, own in zip(blocks, parts, strict=True):

        def see(values: Tensor, own: list[Tensor] = own) -> None:
            patches = values[:, values.shape[1] - shares.shape[1] :]
            own.append(torch.einsum("bn,bnk->bk", shares, patches.float().abs()))

        hook = on_neurons(block, see)
        try:
            hidden = block(hidden)
        finally:
            hook.remove()
