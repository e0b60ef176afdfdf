"""Models that are folders of transformers: configuration, weights, image processor, tokenizer.

Nothing is downloaded, and no code in a folder is run, whatever its files ask for.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tir_kernels.errors import FewShotError, first_line
from tir_kernels.files import MIB, open_regular, read_text
from tir_kernels.text import Notice, setting
from tir_kernels.towers import text_tower, vision_tower
from tir_kernels.towers.loading.checkpoints import checkpoint_files, read_checkpoint
from tir_kernels.towers.loading.hub import offline, tokenizer_files
from tir_kernels.towers.loading.loaded import LoadedModel
from tir_kernels.towers.loading.model_config import (
    MAX_CONTEXT_LENGTH,
    MAX_LAYERS,
    MAX_PATCHES,
    SMALL_MODEL,
    check_size,
    num_bytes,
)
from tir_kernels.towers.loading.sources import TRANSFORMERS_KINDS
from tir_kernels.towers.loading.timm_names import refusal_of_timm
from tir_kernels.towers.loading.transformers_preprocess import TransformersPreprocess
from tir_kernels.towers.loading.weights import load_weights, state_dicts

_MODEL = setting("model")

CONFIG_NAME = "config.json"
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_REFUSED = {
    "siglip2": (
        "the processor of this kind gives every image a grid of patches of its own, but images are "
        "trained on in batches of one size; pass a SigLIP 2 checkpoint of fixed resolution, such "
        "as siglip2-base-patch16-224, whose model_type is 'siglip'"
    )
}
_MAX_SIZE = 2**24  # of a width or a vocabulary


class TransformersTokenizer:
    """A tokenizer of transformers that fills every text up to the model's context.

    Args:
        tokenizer: The library's.
        length: T, the context length.
    """

    def __init__(self, tokenizer: Any, length: int) -> None:
        self.tokenizer = tokenizer
        self._length = length

    def __call__(self, texts: list[str], context_length: int | None = None) -> Tensor:
        """C texts -> (C, T) int64 token ids; longer texts are cut, and end as others do.

        Args:
            texts: C texts.
            context_length: T; ``None``: the model's.
        """
        return self.tokenizer(
            list(texts), padding="max_length", truncation=True, return_tensors="pt",
            max_length=self._length if context_length is None else context_length,
        )["input_ids"]  # fmt: skip


def load_transformers_folder(folder: Path, weights: Path) -> LoadedModel:
    """Load a model on the CPU.

    Args:
        folder: Has config.json, an image processor and a tokenizer.
        weights: Its weights file, or the index of several.

    Raises:
        FewShotError: A part is missing, damaged, of another kind or does not fit the others.
    """
    raw = _read_config(folder)
    if not tokenizer_files(folder):  # the library would make one that knows no words
        raise FewShotError(
            f"{_MODEL}: {folder} has no tokenizer; put tokenizer.json and tokenizer_config.json of "
            "the model into it"
        )
    found = state_dicts(read_checkpoint(weights), weights, is_transformers=True)
    held = num_bytes([tensor for state in found for tensor in state.tensors.values()])
    model = _build(raw, held, folder)
    notes = load_weights(model, found, weights, str(folder))
    del found  # as large as the model
    model = model.eval().requires_grad_(False)
    config: Any = model.config
    with offline():
        processor = _part(folder, "image processor", transformers.AutoImageProcessor)
        own_tokenizer = _part(folder, "tokenizer", transformers.AutoTokenizer)
    preprocess = TransformersPreprocess(processor, config.vision_config.image_size, folder)
    tokenizer = TransformersTokenizer(own_tokenizer, config.text_config.max_position_embeddings)
    _check_tokenizer(tokenizer, model, folder)
    return LoadedModel(
        model,
        preprocess,
        tokenizer,
        str(folder),
        _fingerprint(raw, folder, weights),
        tuple(map(Notice, notes)),
        raw,
    )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    try:
        raw = json.loads(read_text(path, at_most=MIB))
    except (OSError, ValueError, RecursionError) as error:
        raise FewShotError(f"{_MODEL}: can't read {path}: {first_line(error)}") from error
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if kind is None and isinstance(raw, dict) and "architecture" in raw:  # as timm writes them
        raise FewShotError(f"{_MODEL}: {refusal_of_timm(str(folder))}")
    if kind not in TRANSFORMERS_KINDS:
        reason = _REFUSED.get(kind) if isinstance(kind, str) else None
        reason = (
            reason
            or f"models of transformers can be of {' or '.join(map(repr, TRANSFORMERS_KINDS))}"
        )
        raise FewShotError(f"{_MODEL}: {path} is of model_type {kind!r}: {reason}")
    if raw.get("quantization_config"):
        raise FewShotError(
            f"{_MODEL}: {folder} holds quantised weights; pass the model as it was before that"
        )
    for part in ("vision_config", "text_config"):
        if not isinstance(raw.setdefault(part, {}), dict):
            raise FewShotError(f"{_MODEL}: {path}: {part} must be an object of settings")
        # It may name a kernel to be downloaded.
        raw[part] = {k: v for k, v in raw[part].items() if "attn_implementation" not in k}
    return {key: value for key, value in raw.items() if "attn_implementation" not in key}


def _build(raw: dict[str, Any], held: int, folder: Path) -> nn.Module:
    """The model of a configuration, with random weights.

    Args:
        raw: The configuration.
        held: Bytes of the weights; a model of far more is not built.
        folder: For errors.
    """
    source = str(folder / CONFIG_NAME)
    try:
        kind = transformers.CLIPConfig if raw["model_type"] == "clip" else transformers.SiglipConfig
        config = kind.from_dict(raw)
        vision, text = config.vision_config, config.text_config
        for name, section in (("vision_config", vision), ("text_config", text)):
            check_size(section.num_hidden_layers, f"{name}.num_hidden_layers", MAX_LAYERS, source)
            for key in ("hidden_size", "intermediate_size", "num_attention_heads"):
                check_size(getattr(section, key), f"{name}.{key}", _MAX_SIZE, source)
        for key in ("image_size", "patch_size", "num_channels"):
            check_size(getattr(vision, key), f"vision_config.{key}", _MAX_SIZE, source)
        check_size(text.vocab_size, "text_config.vocab_size", _MAX_SIZE, source)
        length = text.max_position_embeddings
        check_size(length, "text_config.max_position_embeddings", MAX_CONTEXT_LENGTH, source)
        if (vision.image_size // vision.patch_size) ** 2 > MAX_PATCHES:
            raise FewShotError(
                f"{_MODEL}: {source}: images have more than {MAX_PATCHES:,} patches, the most that "
                "attention can take; choose a smaller vision_config.image_size"
            )
        options = {"attn_implementation": "sdpa", "dtype": torch.float32}
        with torch.device("meta"):
            outline = transformers.AutoModel.from_config(config, **options)
        wanted = sum(parameter.numel() for parameter in outline.parameters())
        if wanted > max(held, SMALL_MODEL):  # no weights take less than a byte for a parameter
            raise FewShotError(
                f"{_MODEL}: {source} describes a model of {wanted:.2g} parameters, but the weights "
                f"are {held:.2g} bytes; pass the configuration that belongs to them"
            )
        model = transformers.AutoModel.from_config(config, **options).float()
        vision_tower(model)
        text_tower(model)
    except FewShotError:
        raise
    except Exception as error:
        raise FewShotError(
            f"{_MODEL}: transformers can't build {source}: {type(error).__name__}: "
            f"{first_line(error)}"
        ) from error
    return model


def _part(folder: Path, name: str, kind: Any) -> Any:
    """The image processor or tokenizer of a folder."""
    try:
        return kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise FewShotError(
            f"{_MODEL}: {folder} has no usable {name}: {type(error).__name__}: "
            f"{first_line(error)}; put all files of the model's own into it"
        ) from error


def _check_tokenizer(tokenizer: TransformersTokenizer, model: Any, folder: Path) -> None:
    """Refuse a tokenizer that is another model's, where that shows."""
    own, text = tokenizer.tokenizer, model.config.text_config
    try:
        token_ids = tokenizer(["a photo"])
        highest = max(own.get_vocab().values())
    except Exception as error:
        raise FewShotError(
            f"{_MODEL}: the tokenizer of {folder} can't be used: {type(error).__name__}: "
            f"{first_line(error)}; put the model's own into the folder"
        ) from error
    if highest >= text.vocab_size:
        raise FewShotError(
            f"{_MODEL}: the tokenizer of {folder} has ids up to {highest:,}, but the model knows "
            f"{text.vocab_size:,} tokens; put the model's own into the folder"
        )
    tower = text_tower(model)
    if tower.is_causal and token_ids[0, tower.last_position(token_ids)[0]] != own.eos_token_id:
        raise FewShotError(
            f"{_MODEL}: the model of {folder} does not find the end of a text where its tokenizer "
            f"puts it: text_config.eos_token_id is {text.eos_token_id}, the tokenizer's is "
            f"{own.eos_token_id}; put the model's own tokenizer into the folder"
        )


def _fingerprint(raw: dict[str, Any], folder: Path, weights: Path) -> str:
    digest = hashlib.sha256(json.dumps(raw, sort_keys=True).encode())
    settings = [path for name in _PROCESSOR_FILES if (path := folder / name).is_file()]
    for path in [*settings, *tokenizer_files(folder), *checkpoint_files(weights)]:
        with open_regular(path) as file:
            while chunk := file.read(MIB):
                digest.update(chunk)
    return digest.hexdigest()
