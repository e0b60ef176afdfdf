"""What the name of a model stands for: an architecture with weights, or a folder."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import open_clip
import timm

from tir_kernels.errors import FewShotError, first_line
from tir_kernels.files import MIB, expand_user, read_text
from tir_kernels.text import setting
from tir_kernels.towers.loading.checkpoints import INDEX_ENDING, checkpoint_files
from tir_kernels.towers.loading.hub import (
    cached_folder,
    download_weights,
    has_transformers,
    offline,
    tokenizer_files,
)
from tir_kernels.towers.loading.model_config import CONFIG_NAME, read_config, refuse_other_towers
from tir_kernels.towers.loading.timm_names import refusal_of_timm

_MODEL = setting("model")
_PRETRAINED = setting("pretrained")

SAFETENSORS = (".safetensors",)
PICKLES = (".pt", ".pth", ".bin", ".ckpt")
TRANSFORMERS_KINDS = ("clip", "siglip")  # of config.json's "model_type"
NO_TRANSFORMERS = "needs the transformers library: pip install 'transformers>=5,<6'"
_HUB = "hf-hub:"
_REPOSITORY = re.compile(rf"({_HUB})?[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Source:
    """The parts that a model is made of, before it is built.

    Args:
        config: open_clip's "model_cfg".
        weights: The weights file, or the index of several.
        open_clip_name: Name by which open_clip knows the model.
        description: The model in words.
        folder: Folder of a local model.
        options: Further arguments for open_clip's ``create_model``.
    """

    config: dict[str, Any]
    weights: Path
    open_clip_name: str
    description: str
    folder: Path | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        """The model in words, without its weights."""
        return self.open_clip_name if self.folder is None else str(self.folder)


def folder_of(name: str) -> Path | None:
    """The folder that a name stands for: on the disk, or a repository's in Hugging Face's cache.

    Raises:
        FewShotError: It can't be looked at.
    """
    try:
        folder = expand_user(name)
        if name.strip() and os.path.isdir(folder):
            return folder
    except OSError as error:
        raise unreadable(name, error) from error
    if _architecture(name) is None and _REPOSITORY.fullmatch(name):
        return cached_folder(name.removeprefix(_HUB))
    return None


def is_of_transformers(folder: Path) -> bool:
    """Whether a folder is a model of transformers, and not also one of open_clip."""
    return os.path.isfile(folder / "config.json") and not os.path.exists(folder / CONFIG_NAME)


def transformers_kind(folder: Path) -> str:
    """The "model_type" of a folder of transformers; "" where it can't be read."""
    try:
        return str(json.loads(read_text(folder / "config.json", at_most=MIB))["model_type"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""


def find_source(name: str, pretrained: str | None) -> Source:
    """The parts of an open_clip model.

    Raises:
        FewShotError: The name stands for nothing, or a part is missing.
    """
    if not name.strip() or (pretrained is not None and not pretrained.strip()):
        argument = _MODEL if not name.strip() else _PRETRAINED
        raise FewShotError(f"{argument} is empty; pass a name or a path")
    try:
        folder = folder_of(name)
        if folder is not None:
            return _from_folder(folder, pretrained, name)
        architecture = _architecture(name)
        if architecture is not None:
            return _from_architecture(architecture, pretrained)
    except OSError as error:
        raise unreadable(name, error) from error
    raise FewShotError(_unknown_model(name))


def unreadable(name: str | Path, error: OSError) -> FewShotError:
    """The error to raise where a model can't be read."""
    return FewShotError(
        f"{_MODEL}: can't read {error.filename or name}: {error.strerror or first_line(error)}; "
        "pass a path that can be read"
    )


def problem_of(name: str, pretrained: str | None = None) -> str:
    """Why a model can't be loaded without a network; "" if it can, but for its weights' content."""
    try:
        with offline():
            folder = folder_of(name)
            if folder is not None and is_of_transformers(folder):
                if (kind := transformers_kind(folder)) not in TRANSFORMERS_KINDS:
                    return f"its model_type is {kind!r}"
                weights_in(folder, pretrained)
                if not has_transformers():
                    return f"it {NO_TRANSFORMERS}"
                return "" if tokenizer_files(folder) else "its tokenizer is not there"
            source = find_source(name, pretrained)
    except FewShotError as error:
        return str(error)
    tokenizer = source.config["text_cfg"].get("hf_tokenizer_name")
    if not tokenizer:
        return ""
    if source.folder is None:
        is_there = cached_folder(tokenizer) is not None
    else:
        is_there = bool(tokenizer_files(source.folder))
    return "" if is_there else f"its tokenizer, {tokenizer}, is not there"


def _architecture(name: str) -> str | None:
    # As open_clip does for the names that OpenAI gave its models, such as ViT-B/32.
    architecture = name.strip().replace("/", "-")
    return architecture if architecture in open_clip.list_models() else None


def _from_folder(folder: Path, pretrained: str | None, name: str) -> Source:
    config = read_config(folder)["model_cfg"]
    refuse_other_towers(config, str(folder))
    weights = weights_in(folder, pretrained)
    # A path as it was understood, a repository by its name.
    description = name if _REPOSITORY.fullmatch(name) and not os.path.isdir(name) else str(folder)
    return Source(config, weights, f"local-dir:{folder}", description, folder)


def weights_in(folder: Path, pretrained: str | None) -> Path:
    """The weights file of a folder.

    Raises:
        FewShotError: There is none, or there are several.
    """
    if pretrained is not None:
        for path in (expand_user(pretrained), folder / pretrained):
            if os.path.isfile(path):
                return path
        raise FewShotError(f"{_PRETRAINED}: no file {pretrained} here or in {folder}")
    for found in _weights_files(folder):
        if len(found) == 1:
            return found[0]
        # Repositories have the same weights for other libraries beside open_clip's.
        own = [path for path in found if path.name.startswith("open_clip_")]
        if len(own) == 1:
            return own[0]
        if found:
            names = ", ".join(path.name for path in found)
            raise FewShotError(
                f"{_MODEL}: {folder} has several weights files ({names}); "
                f"say which with {setting('pretrained', 'FILE')}"
            )
    raise FewShotError(
        f"{_MODEL}: {folder} has no weights; put a {' or '.join(SAFETENSORS + PICKLES)} file in it"
    )


def _weights_files(folder: Path) -> Iterator[list[Path]]:
    """A folder's weights files, the preferred kinds first."""
    files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    for endings in (SAFETENSORS, PICKLES):
        of_kind = [path for path in files if path.suffix in endings]
        indices = [
            path
            for path in files
            if path.name.endswith(tuple(f"{ending}{INDEX_ENDING}" for ending in endings))
        ]
        parts = {part for index in indices for part in checkpoint_files(index)}
        yield indices + [path for path in of_kind if path not in parts]


def _from_architecture(name: str, pretrained: str | None) -> Source:
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained is None:
        known = f"a tag ({', '.join(tags)}) or " if tags else ""
        raise FewShotError(
            f"{setting('model', name)} needs weights: pass {known}a checkpoint file with "
            f"{_PRETRAINED}"
        )
    description = f"{name} with {pretrained}"
    config = open_clip.get_model_config(name)
    refuse_other_towers(config, name)
    tag = open_clip.get_pretrained_cfg(name, pretrained)
    if not tag:
        return Source(config, _weights_file(name, pretrained, tags), name, description)
    # The tag knows what its weights were trained with, down to the activation function.
    preprocess = {key: value for key, value in tag.items() if key in ("mean", "std")}
    for key in ("interpolation", "resize_mode"):
        if tag.get(key):
            preprocess[key] = tag[key]
    quick_gelu = bool(tag.get("quick_gelu"))
    options = {"force_quick_gelu": quick_gelu, "force_preprocess_cfg": preprocess}
    with quiet():
        weights = download_weights(tag, f"{name} {pretrained}")
    config = {**config, "quick_gelu": quick_gelu or config.get("quick_gelu", False)}
    return Source(config, weights, name, description, options=options)


def _weights_file(name: str, pretrained: str, tags: list[str]) -> Path:
    path = expand_user(pretrained)
    if os.path.isfile(path):
        return path
    if os.path.isdir(path):
        found = [file.name for files in _weights_files(path) for file in files]
        files = f"one of its files ({', '.join(found)})" if found else "a file; it has no weights"
        raise FewShotError(f"{_PRETRAINED}: {pretrained} is a folder; pass {files}")
    if os.path.exists(path):
        raise FewShotError(
            f"{_PRETRAINED}: {pretrained} is not a regular file; pass a weights file"
        )
    known = f"a tag of {name} ({', '.join(tags)})" if tags else f"a tag ({name} has none)"
    raise FewShotError(f"{_PRETRAINED}: {pretrained} is neither a file nor {known}")


def _unknown_model(name: str) -> str:
    if name.startswith(_HUB):
        return (
            f"{_MODEL}: {name.removeprefix(_HUB)} is not in Hugging Face's cache; fetch it with "
            f"hf download {name.removeprefix(_HUB)}, or pass its folder"
        )
    if name.startswith("local-dir:"):
        return f"{_MODEL}: pass the folder {name.removeprefix('local-dir:')} without local-dir:"
    if os.path.isfile(name):
        return (
            f"{_MODEL}: {name} is a file; pass its architecture and {setting('pretrained', name)}"
        )
    if timm.is_model(name.removeprefix("timm/")):
        return f"{_MODEL}: {refusal_of_timm(name)}"
    # Case, separators and OpenAI's "@336px" are the usual slips, and would spoil the likeness.
    names = {_plain(known): known for known in open_clip.list_models()}
    close = get_close_matches(_plain(name), names, n=3, cutoff=0.5)
    likely = names.get(_plain(name)) or names.get(_plain(name.split(":")[0]))
    if len(Path(name).parts) > 1 and not likely:
        hint = ", and no such repository in Hugging Face's cache" * bool(
            _REPOSITORY.fullmatch(name)
        )
        return f"{_MODEL}: there is no folder {name}{hint}"
    hint = f"; the nearest are {', '.join(names[key] for key in close)}" if close else ""
    return f"{_MODEL}: {name} is neither a folder nor an open_clip architecture{hint}"


def _plain(name: str) -> str:
    """A name without what people write in different ways."""
    return re.sub(r"[^a-z0-9+]+", "-", name.lower().strip()).replace("336px", "336")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without log messages inside of the context."""
    # open_clip logs a warning about missing weights before they are loaded, and each failure twice.
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)
