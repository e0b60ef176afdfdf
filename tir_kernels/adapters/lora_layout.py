"""How PEFT's format names and shapes LoRA, by the kind of module that has the projections.

Three pairs of rank r, of query, key and value, are one pair of rank 3 r of the projection that
packs them, with the A stacked and the B on the diagonal. An ``nn.MultiheadAttention`` has a pair of
its output projection besides. That is not adapted here, so its pair is zero; as both its factors
are, neither gets a gradient, and it stays so if PEFT trains on.

Separate ``nn.Linear`` projections each have a pair of their own, of which an adapter may leave some
out. In a model that also has packed ones, whose rank the file gives for all, their pairs are filled
up to rank 3 r with zeros, which stay so for the same reason.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tir_kernels.adapters.lora import PROJECTIONS, LoRA, Place

Pair = tuple[Tensor, Tensor]

PREFIX = "base_model.model."
_A, _B = "lora_A.weight", "lora_B.weight"
_OUT_A, _OUT_B = f"base_layer.out_proj.{_A}", f"base_layer.out_proj.{_B}"


class Form(Protocol):
    """The pairs of one kind of module; keys are those of its tensors, behind its path."""

    is_packed: bool

    def pattern(self, paths: Sequence[str]) -> str: ...  # of target_modules
    def shapes(self, owner: Owner, rank: int) -> dict[str, tuple[int, int]]: ...
    def write(self, pairs: Sequence[Pair], rank: int) -> dict[str, Tensor]: ...
    def is_split(self, a: Tensor, b: Tensor) -> bool: ...  # whether a third of the rank is enough
    def read(self, a: Tensor, b: Tensor, is_split: bool) -> list[Pair]: ...


@dataclass(frozen=True)
class Owner:
    """A module with projections.

    Args:
        place: Its block, as "visual.3".
        path: Its path in the model.
        names: Which projections it has.
        shape: Output and input width of each.
        form: How PEFT's format has them.
    """

    place: str
    path: str
    names: tuple[str, ...]
    shape: tuple[int, int]
    form: Form

    @classmethod
    def of(cls, block: str, place: Place) -> Owner | None:
        """The owner of a place; ``None`` where PEFT's format knows nothing of it."""
        form = _form_of(place)
        if form is None:
            return None
        return cls(block, place.path, tuple(place.names), place.linear.shape[1:], form)

    def key(self, part: str) -> str:
        return f"{PREFIX}{self.path}.{part}"

    def shapes(self, rank: int) -> dict[str, tuple[int, int]]:
        """The shapes of its tensors in a file of some rank, by their keys."""
        return {self.key(part): each for part, each in self.form.shapes(self, rank).items()}


class SeparateLinear:
    """Of an ``nn.Linear`` for one projection."""

    is_packed = False

    def pattern(self, paths: Sequence[str]) -> str:
        inner = "|".join(dict.fromkeys(re.escape(path.rsplit(".", 1)[1]) for path in paths))
        attentions = dict.fromkeys(re.escape(path.rsplit(".", 2)[1]) for path in paths)
        return f"({_stems(paths, 3)})\\.\\d+\\.({'|'.join(attentions)})\\.({inner})"

    def shapes(self, owner: Owner, rank: int) -> dict[str, tuple[int, int]]:
        output, width = owner.shape
        return {_A: (rank, width), _B: (len(owner.names) * output, rank)}

    def write(self, pairs: Sequence[Pair], rank: int) -> dict[str, Tensor]:
        ((a, b),) = pairs
        more = rank - len(a)
        return {_A: F.pad(a, (0, 0, 0, more)), _B: F.pad(b, (0, more))}

    def is_split(self, a: Tensor, b: Tensor) -> bool:
        rank = len(a) // 3
        return len(a) % 3 == 0 and not (a[rank:].any() or b[:, rank:].any())

    def read(self, a: Tensor, b: Tensor, is_split: bool) -> list[Pair]:
        rank = len(a) // 3 if is_split else len(a)
        return [(a[:rank], b[:, :rank])]


class PackedLinear(SeparateLinear):
    """Of an ``nn.Linear`` for all three projections."""

    is_packed = True

    def write(self, pairs: Sequence[Pair], rank: int) -> dict[str, Tensor]:
        a, b = zip(*pairs, strict=True)
        return {_A: torch.cat(a), _B: torch.block_diag(*b)}

    def is_split(self, a: Tensor, b: Tensor) -> bool:
        if len(a) % 3:
            return False
        blocks = b.unflatten(0, (3, -1)).unflatten(2, (3, -1)).transpose(1, 2)  # (3, 3, O, r)
        return not blocks[~torch.eye(3, dtype=torch.bool, device=b.device)].any()

    def read(self, a: Tensor, b: Tensor, is_split: bool) -> list[Pair]:
        parts = b.chunk(3)
        if not is_split:  # as PEFT trains it: the three share A
            return [(a, part) for part in parts]
        columns = [part.chunk(3, 1)[index] for index, part in enumerate(parts)]
        return list(zip(a.chunk(3), columns, strict=True))


class MultiheadAttention(PackedLinear):
    """Of ``nn.MultiheadAttention``."""

    def pattern(self, paths: Sequence[str]) -> str:
        return f"({_stems(paths, 2)})\\.\\d+\\.attn"

    def shapes(self, owner: Owner, rank: int) -> dict[str, tuple[int, int]]:
        width = owner.shape[1]
        own = super().shapes(owner, rank)
        return {**own, _OUT_A: (rank, width), _OUT_B: (width, rank)}

    def write(self, pairs: Sequence[Pair], rank: int) -> dict[str, Tensor]:
        own = super().write(pairs, rank)
        return {**own, _OUT_A: torch.zeros_like(own[_A]), _OUT_B: torch.zeros_like(own[_A].T)}


def _form_of(place: Place) -> Form | None:
    owner = place.linear.owner
    if isinstance(owner, nn.MultiheadAttention):
        return MultiheadAttention()
    # PEFT's change of a module that is never called would do nothing.
    if not isinstance(owner, nn.Linear) or not place.linear.is_called:
        return None
    if len(place.names) == 1:
        return SeparateLinear()
    return PackedLinear() if tuple(place.names) == PROJECTIONS else None


def settings(owners: Sequence[Owner], lora: LoRA) -> dict[str, Any]:
    """The rank and scale of PEFT's configuration."""
    if not _any_packed(owners):
        return {"r": lora.rank, "lora_alpha": lora.alpha, "use_rslora": True}  # alpha / sqrt(r)
    # PEFT's lora_alpha / (3 rank) is our alpha / sqrt(rank).
    alpha = 3 * lora.alpha * math.sqrt(lora.rank)
    alpha = int(alpha) if float(alpha).is_integer() else alpha
    return {"r": 3 * lora.rank, "lora_alpha": alpha, "use_rslora": False}


def pattern(owners: Sequence[Owner]) -> str:
    """The modules as PEFT's ``target_modules``, which must match whole paths."""
    paths: dict[type, list[str]] = {}
    for owner in owners:
        paths.setdefault(type(owner.form), []).append(owner.path)
    forms = {type(owner.form): owner.form for owner in owners}
    return "|".join(form.pattern(paths[kind]) for kind, form in forms.items())


def write(owners: Sequence[Owner], pairs: Mapping[str, Pair], rank: int) -> dict[str, Tensor]:
    """The tensors of a file.

    Args:
        owners: The modules.
        pairs: By the names of ``LoRA.factors``.
        rank: As the configuration says it.
    """
    tensors = {}
    for owner in owners:
        own = [pairs[f"{owner.place}.{name}"] for name in owner.names]
        for part, tensor in owner.form.write(own, rank).items():
            tensors[owner.key(part)] = tensor
    return tensors


def read(owners: Sequence[Owner], tensors: Mapping[str, Tensor]) -> tuple[int, dict[str, Pair]]:
    """The rank of each projection, and the pairs by the names of ``LoRA.factors``."""
    found = [(owner, tensors[owner.key(_A)], tensors[owner.key(_B)]) for owner in owners]
    is_split = _any_packed(owners) and all(o.form.is_split(a, b) for o, a, b in found)
    pairs: dict[str, Pair] = {}
    for owner, a, b in found:
        own = owner.form.read(a, b, is_split)
        pairs |= {f"{owner.place}.{n}": pair for n, pair in zip(owner.names, own, strict=True)}
    return len(next(iter(pairs.values()))[0]), pairs


def may_lack(owner: Owner, tower: Sequence[Owner], held: set[str]) -> bool:
    """Whether an adapter leaves a projection out, which it must do in all blocks of a tower."""
    alike = [each for each in tower if each.names == owner.names]
    return not owner.form.is_packed and not any(key in held for o in alike for key in o.shapes(1))


def refuse_output(directory: Path, owner: Owner, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a changed output projection of an ``nn.MultiheadAttention``.

    Raises:
        ValueError: It is changed.
    """
    key = owner.key(_OUT_B)
    if key in tensors and tensors[owner.key(_OUT_A)].any() and tensors[key].any():
        raise ValueError(
            f"{directory} adapts the output projection too ({key!r} is not zero); in PEFT, "
            "freeze the parameters with 'out_proj' in their names"
        )


def _any_packed(owners: Sequence[Owner]) -> bool:
    return any(owner.form.is_packed for owner in owners)


def _stems(paths: Sequence[str], levels: int) -> str:
    """The paths of the lists of blocks, as alternatives of a regular expression.

    For whole paths, since PEFT takes plain names for endings of paths: the text tower's
    ``transformer.resblocks.0.attn`` is an ending of the image tower's.
    """
    stems = dict.fromkeys(path.rsplit(".", levels)[0] for path in paths)
    return "|".join(re.escape(stem) for stem in stems)
