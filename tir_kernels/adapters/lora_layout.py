"""How PEFT's format names and shapes LoRA: of packed projections, and of separate ones.

PEFT adapts an ``nn.MultiheadAttention`` by one pair of factors for its packed query, key and value
projection, and one for its output projection. Three pairs of rank r are one packed pair of rank
3 r, with the A stacked and the B on the diagonal. The output projection is not adapted here, so its
pair is zero; as both its factors are, neither gets a gradient, and it stays so if PEFT trains on.

Separate ``nn.Linear`` projections, as transformers' models have them, each have a pair of their
own, of which an adapter may leave some out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tir_kernels.adapters.lora import PROJECTIONS, LoRA, Place

Pair = tuple[Tensor, Tensor]

PREFIX = "base_model.model."
_PARTS = {
    "a": "lora_A.weight",
    "b": "lora_B.weight",
    "out_a": "base_layer.out_proj.lora_A.weight",
    "out_b": "base_layer.out_proj.lora_B.weight",
}
_SEPARATE_PARTS = ("lora_A.weight", "lora_B.weight")


@dataclass(frozen=True)
class Owner:
    """A module with projections.

    Args:
        place: Its block, as "visual.3".
        path: Its path in the model.
        names: Which projections it has.
        shape: Output and input width of each.
    """

    place: str
    path: str
    names: tuple[str, ...]
    shape: tuple[int, int]

    @classmethod
    def of(cls, block: str, place: Place) -> Owner:
        return cls(block, place.path, tuple(place.names), place.linear.shape[1:])


class Layout(Protocol):
    """One of the two; keys are those of the tensors in a file."""

    def settings(self, lora: LoRA) -> dict[str, Any]: ...  # of PEFT's configuration
    def pattern(self, paths: Sequence[str]) -> str: ...  # of target_modules
    def shapes(self, owner: Owner, rank: int) -> dict[str, tuple[int, int]]: ...
    def write(self, owner: Owner, pairs: Mapping[str, Pair]) -> dict[str, Tensor]: ...
    def read(
        self, owners: Sequence[Owner], tensors: Mapping[str, Tensor], rank: int
    ) -> tuple[int, dict[str, Pair]]: ...  # the rank of each projection, and the pairs by name
    def may_lack(self, owner: Owner, tower: Sequence[Owner], held: set[str]) -> bool: ...
    def refuse(self, directory: Path, owner: Owner, tensors: Mapping[str, Tensor]) -> None: ...


class Packed:
    """Of ``nn.MultiheadAttention``."""

    def settings(self, lora: LoRA) -> dict[str, Any]:
        # PEFT's lora_alpha / (3 rank) is our alpha / sqrt(rank).
        alpha = 3 * lora.alpha * math.sqrt(lora.rank)
        alpha = int(alpha) if float(alpha).is_integer() else alpha
        return {"r": 3 * lora.rank, "lora_alpha": alpha, "use_rslora": False}

    def pattern(self, paths: Sequence[str]) -> str:
        return f"({_stems(paths, 2)})\\.\\d+\\.attn"

    def _key(self, owner: Owner, part: str) -> str:
        return f"{PREFIX}{owner.path}.{_PARTS[part]}"

    def shapes(self, owner: Owner, rank: int) -> dict[str, tuple[int, int]]:
        width = owner.shape[1]
        shapes = {
            "a": (rank, width),
            "b": (3 * width, rank),
            "out_a": (rank, width),
            "out_b": (width, rank),
        }
        return {self._key(owner, part): shape for part, shape in shapes.items()}

    def write(self, owner: Owner, pairs: Mapping[str, Pair]) -> dict[str, Tensor]:
        a = torch.cat([pairs[name][0] for name in PROJECTIONS])
        parts = {
            "a": a,
            "b": torch.block_diag(*(pairs[name][1] for name in PROJECTIONS)),
            "out_a": torch.zeros_like(a),
            "out_b": torch.zeros_like(a.T),
        }
        return {self._key(owner, part): tensor for part, tensor in parts.items()}

    def read(
        self, owners: Sequence[Owner], tensors: Mapping[str, Tensor], rank: int
    ) -> tuple[int, dict[str, Pair]]:
        packed = [(tensors[self._key(o, "a")], tensors[self._key(o, "b")]) for o in owners]
        is_diagonal = rank % 3 == 0 and all(_is_block_diagonal(b) for _, b in packed)
        own_rank = rank // 3 if is_diagonal else rank
        pairs = {}
        for owner, (a, b) in zip(owners, packed, strict=True):
            for index, (name, part) in enumerate(zip(PROJECTIONS, b.chunk(3), strict=True)):
                own = (
                    slice(index * own_rank, (index + 1) * own_rank) if is_diagonal else slice(None)
                )
                pairs[f"{owner.place}.{name}"] = (a[own], part[:, own])
        return own_rank, pairs

    def may_lack(self, owner: Owner, tower: Sequence[Owner], held: set[str]) -> bool:
        return False

    def refuse(self, directory: Path, owner: Owner, tensors: Mapping[str, Tensor]) -> None:
        """Refuse an output projection that is changed."""
        key = self._key(owner, "out_b")
        if tensors[self._key(owner, "out_a")].any() and tensors[key].any():
            raise ValueError(
                f"{directory} adapts the output projection too ({key!r} is not zero); in PEFT, "
                "freeze the parameters with 'out_proj' in their names"
            )


class Separate:
    """Of an ``nn.Linear`` for each projection."""

    def settings(self, lora: LoRA) -> dict[str, Any]:
        # A scale of lora_alpha / sqrt(r).
        return {"r": lora.rank, "lora_alpha": lora.alpha, "use_rslora": True}

    def pattern(self, paths: Sequence[str]) -> str:
        inner = "|".join(dict.fromkeys(re.escape(path.rsplit(".", 1)[1]) for path in paths))
        attentions = dict.fromkeys(re.escape(path.rsplit(".", 2)[1]) for path in paths)
        return f"({_stems(paths, 3)})\\.\\d+\\.({'|'.join(attentions)})\\.({inner})"

    def shapes(self, owner: Owner, rank: int) -> dict[str, tuple[int, int]]:
        output, width = owner.shape
        shapes = ((rank, width), (output, rank))
        return dict(zip(self._keys(owner), shapes, strict=True))

    def _keys(self, owner: Owner) -> list[str]:
        return [f"{PREFIX}{owner.path}.{part}" for part in _SEPARATE_PARTS]

    def write(self, owner: Owner, pairs: Mapping[str, Pair]) -> dict[str, Tensor]:
        (name,) = owner.names
        return dict(zip(self._keys(owner), pairs[name], strict=True))

    def read(
        self, owners: Sequence[Owner], tensors: Mapping[str, Tensor], rank: int
    ) -> tuple[int, dict[str, Pair]]:
        pairs = {}
        for owner in owners:
            a, b = (tensors[key] for key in self._keys(owner))
            pairs[f"{owner.place}.{owner.names[0]}"] = (a, b)
        return rank, pairs

    def may_lack(self, owner: Owner, tower: Sequence[Owner], held: set[str]) -> bool:
        """Whether an adapter leaves a projection out, which it must do in all blocks of a tower."""
        return not any(
            key in held for each in tower if each.names == owner.names for key in self._keys(each)
        )

    def refuse(self, directory: Path, owner: Owner, tensors: Mapping[str, Tensor]) -> None:
        """Nothing: an adapter of other modules has other keys."""


def layout_of(places: Sequence[Place]) -> Layout | None:
    """The layout of projections, or ``None`` for those that PEFT's format does not know."""
    owners = [place.linear.owner for place in places]
    if all(isinstance(owner, nn.MultiheadAttention) for owner in owners):
        return Packed()
    if all(isinstance(owner, nn.Linear) for owner in owners):
        return Separate() if all(len(place.names) == 1 for place in places) else None
    return None


def _stems(paths: Sequence[str], levels: int) -> str:
    """The paths of the lists of blocks, as alternatives of a regular expression.

    For whole paths, since PEFT takes plain names for endings of paths: the text tower's
    ``transformer.resblocks.0.attn`` is an ending of the image tower's.
    """
    stems = dict.fromkeys(path.rsplit(".", levels)[0] for path in paths)
    return "|".join(re.escape(stem) for stem in stems)


def _is_block_diagonal(b: Tensor) -> bool:
    """Whether (3 W, 3 r) is zero outside its three (W, r) blocks."""
    blocks = b.unflatten(0, (3, -1)).unflatten(2, (3, -1)).transpose(1, 2)  # (3, 3, W, r)
    return not blocks[~torch.eye(3, dtype=torch.bool, device=b.device)].any()
