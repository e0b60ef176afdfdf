"""LoRA weights in PEFT's file format, to be loaded by PEFT, or by us after training with PEFT."""

from __future__ import annotations

import json
import math
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from tir_kernels.adapters import lora_layout
from tir_kernels.adapters.lora import TOWERS, LoRA, add_lora, packed
from tir_kernels.adapters.lora_layout import Owner
from tir_kernels.towers import open_tower

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_MAX_CONFIG_BYTES = 16 * 2**20

_NO_FORMAT = (
    "PEFT's format is known for attention by nn.MultiheadAttention, or with nn.Linear projections "
    "that it calls; keep lora.factors() of this model with torch.save, and give them to "
    "set_factors()"
)
# Modules that torch.compile and data parallelism put around another.
_WRAPPERS = frozenset({"_orig_mod", "module", "_fsdp_wrapped_module"})
# Read below, or without effect on the adapted function. PEFT has many variants of LoRA, each with a
# setting that is off by default: whatever is not listed here must be off.
_UNDERSTOOD = {
    *("peft_type", "r", "lora_alpha", "use_rslora", "lora_dropout", "bias", "init_lora_weights"),
    *("auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode"),
    *("layers_pattern", "layers_to_transform", "megatron_core", "peft_version"),
    *("qalora_group_size", "revision", "target_modules", "task_type"),
}


def save_lora(lora: LoRA, directory: str | os.PathLike[str]) -> None:
    """Write LoRA's factors as a PEFT adapter.

    ``peft.PeftModel.from_pretrained(model, directory)`` on the same, unadapted model computes the
    same in evaluation mode.

    Args:
        lora: Handle of :func:`add_lora` or :func:`load_lora`.
        directory: Created if missing; an adapter in it is replaced. While the files are written it
            has no configuration, so an interrupted call leaves nothing that loads.

    Raises:
        RuntimeError: The handle was removed from its model.
        TypeError: Queries, keys and values come neither from an ``nn.MultiheadAttention`` nor from
            ``nn.Linear`` modules that the model calls, one for each or one for all three.
        ValueError: The handle holds the factors of several episodes.
        OSError: The directory cannot be written.
    """
    pairs = {name: (a.detach(), b.detach()) for name, (a, b) in lora.factors().items()}
    if not pairs:
        raise RuntimeError("LoRA is removed from its model already: save it before remove()")
    if any(a.dim() == 3 for a, _ in pairs.values()):
        raise ValueError(
            "LoRA of num_episodes has several adapters in one: give one episode's factors to "
            "set_factors() of LoRA without num_episodes, and save that"
        )
    places = [(name, place) for name, places in lora.places.items() for place in places]
    owners = [owner for name, place in places if (owner := Owner.of(name, place)) is not None]
    if len(owners) < len(places):
        raise TypeError(_NO_FORMAT)
    settings = lora_layout.settings(owners, lora)
    tensors = lora_layout.write(owners, pairs, settings["r"])
    tensors = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "target_modules": lora_layout.pattern(owners),
        **settings,
        "lora_dropout": lora.dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    # New weights beside an old configuration would look finished, so that goes first.
    (directory / CONFIG_FILE).unlink(missing_ok=True)
    _replace_file(directory / WEIGHTS_FILE, safetensors.torch.save(tensors, {"format": "pt"}))
    _replace_file(directory / CONFIG_FILE, (json.dumps(config, indent=2) + "\n").encode())


def load_lora(
    model: nn.Module,
    directory: str | os.PathLike[str],
    dropout: float | None = None,
    *,
    passes_input_gradient: bool = True,
) -> LoRA:
    """Add LoRA to a model, with the factors of a PEFT adapter.

    Factors written by :func:`save_lora` come back bit for bit. An adapter that PEFT trained on an
    ``nn.MultiheadAttention``, or on one ``nn.Linear`` for all three, whose one pair of rank R mixes
    queries, keys and values, becomes LoRA of rank R with the same A in all three: exact, but with
    dropout of its own for each. The towers that the adapter does not cover get no LoRA;
    separate projections that it does not cover get one whose B is zero.

    Args:
        model: A model without LoRA, of the architecture that the adapter is for.
        directory: Holds adapter_config.json and adapter_model.safetensors.
        dropout: For further training, in [0, 1); ``None``: what the configuration says.
        passes_input_gradient: As for :func:`add_lora`.

    Returns:
        The handle, as of :func:`add_lora`. Its alpha is such that ``alpha / sqrt(rank)`` is the
        adapter's scaling.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged, does not fit the model, or says what LoRA on queries, keys
            and values alone cannot express.
        TypeError, RuntimeError: As for :func:`add_lora`.
    """
    directory = Path(directory)
    config = _read_config(directory / CONFIG_FILE)
    tensors = _read_tensors(directory / WEIGHTS_FILE)
    adapted = _adapted(directory, tensors, _owners(model))
    _check_tensors(directory, tensors, adapted, config["r"])
    rank, pairs = lora_layout.read(adapted, tensors)
    lora = add_lora(
        model,
        rank,
        _alpha(config, rank),
        config["lora_dropout"] if dropout is None else dropout,
        towers=tuple(dict.fromkeys(_tower(owner) for owner in adapted)),
        passes_input_gradient=passes_input_gradient,
    )
    lora.set_factors(*({name: pair[i] for name, pair in pairs.items()} for i in range(2)))
    return lora


def _alpha(config: dict[str, Any], rank: int) -> float:
    divisor = math.sqrt(config["r"]) if config["use_rslora"] else config["r"]
    scaling = config["lora_alpha"] / divisor
    alpha = scaling * math.sqrt(rank)
    # Roots leave 7.999999999999999 of an 8; take the short number where it means the same.
    short = float(f"{alpha:.12g}")
    return short if math.isclose(short / math.sqrt(rank), scaling, rel_tol=1e-15) else alpha


def _replace_file(path: Path, content: bytes) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_bytes(content)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():  # a pipe or a device neither
        raise FileNotFoundError(f"{path.parent} holds no PEFT adapter: {path.name} is missing")
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise ValueError(f"{path} is too large for a configuration; save the adapter anew")
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not readable as JSON ({error}); save the adapter anew"
        ) from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{path} must describe an adapter of peft_type 'LORA'; it says {kind!r}")
    config = {"use_rslora": False, "lora_dropout": 0.0, **config}
    rank = config.get("r")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"{path}: r must be a whole number of at least 1; it is {rank!r}")
    for name in ("lora_alpha", "lora_dropout"):
        value = config.get(name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is None or not is_number or not abs(value) < sys.float_info.max:
            raise ValueError(f"{path}: {name} must be a finite number; it is {value!r}")
    active = {name: value for name, value in config.items() if name not in _UNDERSTOOD and value}
    if config.get("bias", "none") != "none":
        active["bias"] = config["bias"]
    # Other initialisations change the model's own weights, which the adapter does not hold.
    if config.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal"):
        active["init_lora_weights"] = config["init_lora_weights"]
    if active:
        settings = ", ".join(f"{name}={value!r}" for name, value in active.items())
        raise ValueError(
            f"{path}: plain LoRA cannot express {settings}; train the adapter with PEFT's default "
            "for it"
        )
    return config


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing; save the adapter with save_lora(), or with PEFT's "
            "save_pretrained(safe_serialization=True)"
        )
    with path.open("rb") as file:
        if file.read(23) == b"version https://git-lfs":
            raise ValueError(
                f"{path} is a Git LFS pointer, not the weights; run 'git lfs pull' in its folder"
            )
    try:
        tensors = safetensors.torch.load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); save the adapter anew") from None
    renamed = {_without_wrappers(key): tensor for key, tensor in tensors.items()}
    return renamed if len(renamed) == len(tensors) else tensors


def _without_wrappers(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def _owners(model: nn.Module) -> list[Owner]:
    """The modules that can take LoRA of PEFT's format."""
    owners: list[Owner] = []
    for tower in TOWERS:
        with suppress(TypeError, ValueError):  # an adapter need not cover a tower of another kind
            for layer, block in enumerate(open_tower(model, tower).blocks):
                found = [Owner.of(f"{tower}.{layer}", place) for place in packed(block)]
                owners += [owner for owner in found if owner is not None]
    if not owners:
        open_tower(model, TOWERS[0])  # says why not
        raise TypeError(_NO_FORMAT)
    return owners


def _tower(owner: Owner) -> str:
    return owner.place.split(".")[0]


def _adapted(directory: Path, tensors: dict[str, Tensor], owners: list[Owner]) -> list[Owner]:
    """What of a model is adapted: a tower in all its blocks or none, and nothing else."""
    keys = {owner: list(owner.shapes(1)) for owner in owners}
    known = {key for each in keys.values() for key in each}
    if unknown := [key for key in tensors if key not in known]:
        pattern = lora_layout.pattern(owners)
        raise ValueError(
            f"{directory} adapts what cannot take LoRA in this model ({unknown[0]!r}); use the "
            f"model it was made for, and target_modules={pattern!r} in PEFT"
        )
    towers = {_tower(owner) for owner in owners if any(key in tensors for key in keys[owner])}
    if not towers:
        raise ValueError(f"{directory} holds no tensors; save the adapter anew")
    adapted = []
    for tower in towers:
        of_tower = [owner for owner in owners if _tower(owner) == tower]
        adapted += [o for o in of_tower if not lora_layout.may_lack(o, of_tower, set(tensors))]
    for owner in adapted:
        if missing := [key for key in keys[owner] if key not in tensors]:
            raise ValueError(
                f"{directory} lacks {missing[0]!r}; adapt every block of a tower, and load into a "
                "model of the same depth"
            )
    return [owner for owner in owners if owner in adapted]


def _check_tensors(
    directory: Path, tensors: dict[str, Tensor], owners: list[Owner], rank: int
) -> None:
    for owner in owners:
        for key, shape in owner.shapes(rank).items():
            tensor = tensors[key]
            if tensor.shape != shape or not tensor.is_floating_point():
                raise ValueError(
                    f"{directory}: {key!r} must be floating point of shape {shape} "
                    f"for this model and r={rank}; it is {tensor.dtype} of {tuple(tensor.shape)}"
                )
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(
                    f"{directory}: {key!r} holds NaN or infinite values; the training "
                    "that wrote them diverged, so train the adapter anew"
                )
        lora_layout.refuse_output(directory, owner, tensors)
