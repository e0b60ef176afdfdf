"""The weights of a model among all that a checkpoint holds.

A checkpoint wraps a model's tensors in containers ("state_dict", "model", "ema"), and their names
in prefixes ("module.", "_orig_mod.", "clip."). Rather than a list of all wrappings there are, the
names that the model itself has decide: what holds all of them, in their shapes, is its weights.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from open_clip.convert import convert_state_dict
from open_clip.model import resize_pos_embed, resize_text_pos_embed
from torch import Tensor, nn

from tir_kernels.errors import FewShotError, first_line
from tir_kernels.text import setting
from tir_kernels.towers.loading.stand_ins import StandIn, module_tensors

# Containers in containers: the deepest known are three ("checkpoint", "model", "state_dict").
_MAX_DEPTH = 6
# Bounds on the work that a file made to hurt can cause.
_MAX_PREFIXES = 8
_MAX_NAME_LENGTH = 1000
# Modules that hold another and nothing else. Each may stand anywhere in a name.
_WRAPPERS = frozenset(
    {
        "module",
        "_orig_mod",
        "_fsdp_wrapped_module",
        "_checkpoint_wrapped_module",
        "_forward_module",
    }
)
# Made anew by every model, so that what a file has of them is not needed.
_DISPENSABLE = frozenset(
    {"position_ids", "attn_mask", "input_resolution", "context_length", "vocab_size"}
)
# Only the archives that OpenAI published have these among their tensors.
_MARKS_OF_OPENAI = frozenset({"input_resolution", "context_length", "vocab_size"})
_IMAGE_POSITIONS = "visual.positional_embedding"
_TEXT_POSITIONS = ("positional_embedding", "text.positional_embedding")
_SCALARS = ("logit_scale", "logit_bias")


@dataclass(frozen=True)
class StateDict:
    """Tensors by name, as a checkpoint holds them.

    Args:
        place: Where in the checkpoint they are ("state_dict"); empty: they are all of it.
        tensors: Name -> tensor.
    """

    place: str
    tensors: dict[str, Tensor]

    @property
    def is_openai(self) -> bool:
        """Whether they are surely from an archive that OpenAI published."""
        return self.tensors.keys() >= _MARKS_OF_OPENAI


def state_dicts(content: Any, path: Path, *, is_transformers: bool = False) -> list[StateDict]:
    """All state dicts in a checkpoint.

    Args:
        content: What :func:`read_checkpoint` gave.
        path: The file, for errors.
        is_transformers: Whether the model is one of transformers.

    Raises:
        FewShotError: There are none.
    """
    try:
        found = list(_search(content, "", set()))
    except ValueError as error:
        raise FewShotError(f"can't read the weights {path}: {first_line(error)}") from error
    if not found:
        kind = getattr(content, "full_name", "") or type(content).__name__
        keys = ", ".join(str(key) for key in [*content][:3]) if isinstance(content, Mapping) else ""
        holds = f"an object of type {kind}" + (f" ({keys})" if keys else "")
        raise FewShotError(
            f"can't read the weights {path}: it holds {holds} and no tensors by name; "
            "pass a safetensors file or a plain state dict"
        )
    formats = [_other_format(state, is_transformers) for state in found]
    if all(formats):
        raise FewShotError(f"can't use the weights {path}: they {formats[0]}")
    return [state for state, other in zip(found, formats, strict=True) if not other]


def _other_format(state: StateDict, is_transformers: bool) -> str:
    """The kind of tensors that the model can't have, and what to do; empty if it may."""
    if any("lora_A" in name or "lora_B" in name for name in state.tensors):
        return "hold LoRA factors; merge them into the model and save its weights"
    if not is_transformers and any("vision_model.encoder.layers." in n for n in state.tensors):
        return (
            "are in the format of Hugging Face's CLIPModel; pass its folder, with config.json, as "
            f"{setting('model')}, or the same model's open_clip weights"
        )
    return ""


def _search(content: Any, place: str, seen: set[int], depth: int = 0) -> Iterator[StateDict]:
    if id(content) in seen or depth > _MAX_DEPTH:
        return
    seen.add(id(content))
    if isinstance(content, StandIn):
        if tensors := module_tensors(content):
            yield StateDict(place, tensors)
        return
    if isinstance(content, Mapping):
        entries = [(key, value) for key, value in content.items() if isinstance(key, str)]
        tensors = {key: value for key, value in entries if isinstance(value, Tensor)}
        if tensors:
            yield StateDict(place, tensors)
    elif isinstance(content, (list, tuple)):
        entries = [(str(index), value) for index, value in enumerate(content)]
    else:
        return
    for key, value in entries:
        yield from _search(value, f"{place}.{key}" if place else key, seen, depth + 1)


@dataclass(frozen=True)
class _Reading:
    """One way to read a model's tensors from a checkpoint."""

    place: str
    prefix: str
    tensors: dict[str, Tensor]  # under the model's own names
    num_known: int
    differences: list[str]
    left_out: list[str]  # names of dispensable tensors
    others: int  # tensors outside of the prefix

    @property
    def label(self) -> str:
        parts = [f"'{self.place}'"] if self.place else []
        parts += [f"the tensors named '{self.prefix}…'"] if self.prefix else []
        return " in ".join(reversed(parts)) or "the tensors without a prefix"


def load_weights(
    model: nn.Module, found: list[StateDict], path: Path, architecture: str
) -> list[str]:
    """Load a model's weights, as float32.

    Args:
        model: A model in float32.
        found: The state dicts of a checkpoint.
        path: Its file, for errors.
        architecture: The model in words.

    Returns:
        Notes on what was taken, changed and left out.

    Raises:
        FewShotError: No state dict is this model's, or several are, or its values are no weights.
    """
    expected = model.state_dict()
    readings = [reading for state in found for reading in _readings(state, model, expected)]
    fitting = [reading for reading in readings if not reading.differences]
    if not fitting:
        raise FewShotError(_mismatch(readings, found, path, architecture))
    taken = fitting[0]
    if others := [other for other in fitting[1:] if not _same_values(taken.tensors, other.tensors)]:
        labels = " and ".join(reading.label for reading in (taken, *others[:3]))
        raise FewShotError(
            f"the weights {path} hold several models of {architecture}: {labels}; "
            "save the one that is meant as a file of its own"
        )
    notes = _notes(taken, path)
    state = {name: tensor.detach() for name, tensor in taken.tensors.items()}
    _check_finite(state, path)
    notes += _fit_positions(state, model, path)
    for name in _SCALARS:
        if name in state:
            state[name] = state[name].reshape(expected[name].shape)
    if "logit_bias" in expected and "logit_bias" not in state:
        state["logit_bias"] = torch.zeros_like(expected["logit_bias"])
        notes.append(f"{path} has no logit_bias: 0 was taken")
    model.load_state_dict(state)
    return notes


def _readings(
    state: StateDict, model: nn.Module, expected: Mapping[str, Tensor]
) -> Iterator[_Reading]:
    """The ways to read a state dict that find most of the model's names in it."""
    tensors = {_without_wrappers(name, expected): value for name, value in state.tensors.items()}
    if len(tensors) < len(state.tensors):  # two models that differ in a wrapper alone
        tensors = state.tensors
    try:
        tensors = convert_state_dict(model, tensors)
    except Exception:  # of another format than its names say; the differences tell
        tensors = dict(tensors)
    names = _names_in_files(expected)
    known = Counter(
        prefix
        for name in tensors
        for prefix, rest in _splits(name)
        # The name of a text tower's own part is no sign of another model, however deep that is.
        if rest in names and not (_is_text(prefix) and f"text.{rest}" in names)
    )
    if not known:
        return
    most = max(known.values())
    prefixes = [prefix for prefix, count in known.most_common(_MAX_PREFIXES) if 2 * count > most]
    for prefix in prefixes:
        own: dict[str, Tensor] = {}
        unknown, left_out = [], []
        others = 0
        for name, value in tensors.items():
            is_others = any(
                len(other) > len(prefix) and name.startswith(other) for other in prefixes
            )
            if is_others or not name.startswith(prefix):
                others += 1
                continue
            rest = name[len(prefix) :]
            if rest in names and names[rest] not in own:
                own[names[rest]] = value
            elif rest.rsplit(".", 1)[-1] in _DISPENSABLE:
                left_out.append(rest)
            else:
                unknown.append(rest)
        differences = _differences(expected, own, unknown, model)
        yield _Reading(state.place, prefix, own, known[prefix], differences, left_out, others)


def _without_wrappers(name: str, expected: Mapping[str, Tensor]) -> str:
    if name in expected:
        return name
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _names_in_files(expected: Mapping[str, Tensor]) -> dict[str, str]:
    """Name in a file -> the model's name: a text tower of its own may be saved without "text."."""
    names = {name.removeprefix("text."): name for name in expected}
    return names | {name: name for name in expected}


def _is_text(prefix: str) -> bool:
    return prefix == "text." or prefix.endswith(".text.")


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """Every way to take a name for a prefix and a name."""
    yield "", name
    for position, character in enumerate(name[:_MAX_NAME_LENGTH]):
        if character == ".":
            yield name[: position + 1], name[position + 1 :]


def _differences(
    expected: Mapping[str, Tensor], own: dict[str, Tensor], unknown: list[str], model: nn.Module
) -> list[str]:
    """The differences of tensors from the model's, in words; empty if there are none."""
    words = []
    for name, tensor in expected.items():
        if name not in own:
            continue
        value = own[name]
        if value.shape != tensor.shape and not _can_fit(name, value, tensor, model):
            words.append(f"{name} is {tuple(value.shape)} instead of {tuple(tensor.shape)}")
        elif value.is_meta or value.layout != torch.strided:
            words.append(f"{name} is {'without values' if value.is_meta else value.layout}")
        elif value.is_floating_point() != tensor.is_floating_point() or value.is_quantized:
            words.append(f"{name} is {value.dtype} instead of {tensor.dtype}")
    words += [f"{name} is missing" for name in expected if name not in own and name != "logit_bias"]
    return words + [f"{name} is not part of it" for name in unknown]


def _can_fit(name: str, value: Tensor, tensor: Tensor, model: nn.Module) -> bool:
    """Whether a tensor of another shape can be made to fit: a scalar, or positions of a grid."""
    if name in _SCALARS:
        return value.numel() == tensor.numel() == 1
    if value.dim() != 2 or tensor.dim() != 2 or value.shape[1] != tensor.shape[1]:
        return False
    if name == _IMAGE_POSITIONS:
        patches = value.shape[0] - 1
        is_square = patches > 0 and math.isqrt(patches) ** 2 == patches
        return is_square and hasattr(model.visual, "grid_size")
    return name in _TEXT_POSITIONS and value.shape[0] > 0


def _mismatch(
    readings: list[_Reading], found: list[StateDict], path: Path, architecture: str, limit: int = 3
) -> str:
    start = f"the weights {path} are not of {architecture}: "
    names = [name for state in found for name in state.tensors]
    if not readings:
        more = ", …" if len(names) > limit else ""
        return start + (
            f"they hold other tensors ({', '.join(names[:limit])}{more}); "
            "pass the architecture they were made for"
        )
    nearest = max(readings, key=lambda reading: (reading.num_known, -len(reading.differences)))
    words = nearest.differences
    more = f" and {len(words) - limit} more" if len(words) > limit else ""
    return start + (f"{', '.join(words[:limit])}{more}; pass the architecture they were made for")


def _same_values(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        value.dtype == other[name].dtype and torch.equal(value, other[name])
        for name, value in one.items()
    )


def _notes(taken: _Reading, path: Path) -> list[str]:
    notes = []
    if taken.place or taken.prefix:
        others = taken.others
        rest = f"; {others} other tensor{'s' * (others > 1)} left out" if others else ""
        notes.append(f"{path}: {taken.label} taken as the model's weights{rest}")
    if taken.left_out:
        few = ", ".join(taken.left_out[:3]) + (", …" if len(taken.left_out) > 3 else "")
        notes.append(f"{path}: left out what every model makes anew ({few})")
    return notes


def _check_finite(state: dict[str, Tensor], path: Path) -> None:
    bad = [
        name
        for name, value in state.items()
        if not bool(torch.isfinite(value.to(torch.float32)).all())
    ]
    if bad:
        more = f" and {len(bad) - 1} more tensors" if len(bad) > 1 else ""
        raise FewShotError(
            f"the weights {path} hold NaN or infinite values in {bad[0]}{more}: the training that "
            "wrote them diverged, or the file is damaged; pass an earlier checkpoint"
        )


def _fit_positions(state: dict[str, Tensor], model: nn.Module, path: Path) -> list[str]:
    """Resize position embeddings to the model's image size and context length, with notes."""
    before = {
        name: len(state[name]) for name in (_IMAGE_POSITIONS, *_TEXT_POSITIONS) if name in state
    }
    for name in before:
        # In half precision the interpolation loses digits, or can't be had at all.
        state[name] = state[name].to(torch.float32)
    resize_pos_embed(state, model)
    resize_text_pos_embed(state, model)
    notes = []
    for name, length in before.items():
        if len(state[name]) == length:
            continue
        if name == _IMAGE_POSITIONS:
            side = math.isqrt(length - 1)
            visual: Any = model.visual
            height, width = visual.grid_size
            change = f"from {side} x {side} to {height} x {width} patches"
        else:
            change = f"from {length} to {len(state[name])} positions of a text"
        notes.append(f"the position embedding of {path} was resized {change}")
    return notes
