"""LoRA weights in PEFT's file format, to be loaded by PEFT, or by us after training with PEFT.

PEFT adapts an ``nn.MultiheadAttention`` by one pair of factors for its packed query, key and value
projection, and one for its output projection. Three pairs of rank r are one packed pair of rank
3 r, with the A stacked and the B on the diagonal. The output projection is not adapted here, so its
pair is zero; as both its factors are, neither gets a gradient, and it stays so if PEFT trains on.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from tir_kernels.adapters.lora import PROJECTIONS, TOWERS, LoRA, add_lora
from tir_kernels.towers import open_tower

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_MAX_CONFIG_BYTES = 16 * 2**20

_PREFIX = "base_model.model."
_ONE_FORMAT = (
    "PEFT's format is known for models with nn.MultiheadAttention alone; keep lora.factors() of "
    "this one with torch.save, and give them to set_factors()"
)
# Modules that torch.compile and data parallelism put around another.
_WRAPPERS = frozenset({"_orig_mod", "module", "_fsdp_wrapped_module"})
_PARTS = {
    "a": "lora_A.weight",
    "b": "lora_B.weight",
    "out_a": "base_layer.out_proj.lora_A.weight",
    "out_b": "base_layer.out_proj.lora_B.weight",
}
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

    ``peft.PeftModel.from_pretrained(model, directory)`` on the same, unadapted open_clip model
    computes the same in evaluation mode.

    Args:
        lora: Handle of :func:`add_lora` or :func:`load_lora`.
        directory: Created if missing; an adapter in it is replaced. While the files are written it
            has no configuration, so an interrupted call leaves nothing that loads.

    Raises:
        RuntimeError: The handle was removed from its model.
        TypeError: The model's attention is no ``nn.MultiheadAttention``.
        OSError: The directory cannot be written.
    """
    factors = lora.factors()
    if not factors:
        raise RuntimeError("LoRA is removed from its model already: save it before remove()")
    if not all(isinstance(owner, nn.MultiheadAttention) for owner in lora.owners()):
        raise TypeError(_ONE_FORMAT)
    tensors: dict[str, Tensor] = {}
    for place, path in lora.module_paths.items():
        pairs = [factors[f"{place}.{projection}"] for projection in PROJECTIONS]
        a = torch.cat([a.detach() for a, _ in pairs])
        parts = {
            "a": a,
            "b": torch.block_diag(*(b.detach() for _, b in pairs)),
            "out_a": torch.zeros_like(a),
            "out_b": torch.zeros_like(a.T),
        }
        for part, tensor in parts.items():
            tensors[_key(path, part)] = tensor.cpu().contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "target_modules": _target_pattern(list(lora.module_paths.values())),
        "r": 3 * lora.rank,
        "lora_alpha": _peft_alpha(lora),
        "use_rslora": False,
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

    Factors written by :func:`save_lora` come back bit for bit. An adapter that PEFT trained, whose
    one pair of rank R mixes queries, keys and values, becomes LoRA of rank R with the same A in all
    three. The towers that the adapter does not cover get no LoRA.

    Args:
        model: An open_clip model without LoRA, of the architecture that the adapter is for.
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
    places = _attention_places(model)
    _check_keys(directory, tensors, places)
    adapted = {path: place for path, place in places.items() if _key(path, "a") in tensors}
    packed_rank: int = config["r"]
    _check_tensors(directory, tensors, {p: w for p, (_, w) in adapted.items()}, packed_rank)

    is_diagonal = packed_rank % 3 == 0 and all(
        _is_block_diagonal(tensors[_key(path, "b")]) for path in adapted
    )
    rank = packed_rank // 3 if is_diagonal else packed_rank
    factors_a: dict[str, Tensor] = {}
    factors_b: dict[str, Tensor] = {}
    for path, (place, _) in adapted.items():
        a, b = tensors[_key(path, "a")], tensors[_key(path, "b")].chunk(3)
        for index, projection in enumerate(PROJECTIONS):
            own = slice(index * rank, (index + 1) * rank) if is_diagonal else slice(None)
            factors_a[f"{place}.{projection}"] = a[own]
            factors_b[f"{place}.{projection}"] = b[index][:, own]

    lora = add_lora(
        model,
        rank,
        _alpha(config, rank),
        config["lora_dropout"] if dropout is None else dropout,
        towers=tuple(dict.fromkeys(place.split(".")[0] for place, _ in adapted.values())),
        passes_input_gradient=passes_input_gradient,
    )
    lora.set_factors(factors_a, factors_b)
    return lora


def _key(path: str, part: str) -> str:
    return f"{_PREFIX}{path}.{_PARTS[part]}"


def _target_pattern(paths: list[str]) -> str:
    """A regular expression for whole paths: PEFT takes plain names for endings of paths.

    The text tower's ``transformer.resblocks.0.attn`` is an ending of the image tower's.
    """
    owners = dict.fromkeys(path.rsplit(".", 2)[0] for path in paths)
    return f"({'|'.join(re.escape(owner) for owner in owners)})\\.\\d+\\.attn"


def _peft_alpha(lora: LoRA) -> float:
    """The lora_alpha for which PEFT's ``lora_alpha / (3 rank)`` is our ``alpha / sqrt(rank)``."""
    alpha = 3 * lora.alpha * math.sqrt(lora.rank)
    return int(alpha) if float(alpha).is_integer() else alpha


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


def _attention_places(model: nn.Module) -> dict[str, tuple[str, int]]:
    """Path of each attention that can take LoRA -> its place ("visual.3") and width."""
    places = {}
    for tower in TOWERS:
        with suppress(TypeError, ValueError):  # an adapter need not cover a tower of another kind
            for layer, block in enumerate(open_tower(model, tower).blocks):
                linear = block.linears["q"]
                if isinstance(linear.owner, nn.MultiheadAttention):
                    places[block.attention_path] = (f"{tower}.{layer}", linear.shape[2])
    if not places:
        open_tower(model, TOWERS[0])  # says why not
        raise TypeError(_ONE_FORMAT)
    return places


def _check_keys(
    directory: Path, tensors: dict[str, Tensor], places: dict[str, tuple[str, int]]
) -> None:
    """Each adapted tower must be adapted in all its blocks, and nothing else may be."""
    known = {_key(path, part) for path in places for part in _PARTS}
    if unknown := [key for key in tensors if key not in known]:
        raise ValueError(
            f"{directory} adapts what cannot take LoRA in this model ({unknown[0]!r}); use the "
            f"model it was made for, and target_modules={_target_pattern(list(places))!r} in PEFT"
        )
    towers = {place.split(".")[0] for path, (place, _) in places.items() if _any(tensors, path)}
    if not towers:
        raise ValueError(f"{directory} holds no tensors; save the adapter anew")
    for path, (place, _) in places.items():
        missing = [_key(path, part) for part in _PARTS if _key(path, part) not in tensors]
        if place.split(".")[0] in towers and missing:
            raise ValueError(
                f"{directory} lacks {missing[0]!r}; adapt every block of a tower, and load into a "
                "model of the same depth"
            )


def _any(tensors: dict[str, Tensor], path: str) -> bool:
    return any(_key(path, part) in tensors for part in _PARTS)


def _check_tensors(
    directory: Path, tensors: dict[str, Tensor], widths: dict[str, int], rank: int
) -> None:
    for path, width in widths.items():
        shapes = {
            "a": (rank, width),
            "b": (3 * width, rank),
            "out_a": (rank, width),
            "out_b": (width, rank),
        }
        for part, shape in shapes.items():
            tensor = tensors[_key(path, part)]
            if tensor.shape != shape or not tensor.is_floating_point():
                raise ValueError(
                    f"{directory}: {_key(path, part)!r} must be floating point of shape {shape} "
                    f"for this model and r={rank}; it is {tensor.dtype} of {tuple(tensor.shape)}"
                )
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(
                    f"{directory}: {_key(path, part)!r} holds NaN or infinite values; the training "
                    "that wrote them diverged, so train the adapter anew"
                )
        if tensors[_key(path, "out_a")].any() and tensors[_key(path, "out_b")].any():
            raise ValueError(
                f"{directory} adapts the output projection too ({_key(path, 'out_b')!r} is not "
                "zero); in PEFT, freeze the parameters with 'out_proj' in their names"
            )


def _is_block_diagonal(b: Tensor) -> bool:
    """Whether (3 W, 3 r) is zero outside its three (W, r) blocks."""
    blocks = b.unflatten(0, (3, -1)).unflatten(2, (3, -1)).transpose(1, 2)  # (3, 3, W, r)
    return not blocks[~torch.eye(3, dtype=torch.bool, device=b.device)].any()
