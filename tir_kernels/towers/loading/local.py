"""The models on this machine: in folders, and in the caches of Hugging Face and open_clip."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import open_clip

from tir_kernels.errors import FewShotError, first_line
from tir_kernels.files import expand_user
from tir_kernels.towers.loading.hub import cached_folder, cached_weights
from tir_kernels.towers.loading.model_config import CONFIG_NAME
from tir_kernels.towers.loading.sources import (
    PICKLES,
    SAFETENSORS,
    TRANSFORMERS_KINDS,
    is_of_transformers,
    problem_of,
    transformers_kind,
)


class LocalModel(NamedTuple):
    """A model on this machine.

    Args:
        model: The model as ``load_model`` takes it.
        pretrained: Its weights as ``load_model`` takes them; "" where the model says them.
        num_bytes: Size of its weights files.
        problem: Why it can't be loaded without a network; "" if it can.
    """

    model: str
    pretrained: str
    num_bytes: int
    problem: str


def local_models(folders: Sequence[str] = ()) -> Iterator[LocalModel]:
    """Models in folders and in the caches, those that can't be used included.

    Args:
        folders: Folders of models, or with such folders in them.

    Raises:
        FewShotError: A folder can't be read.
    """
    for folder in folders:
        yield from _in_folder(folder)
    for name, tag in open_clip.list_pretrained():
        path = cached_weights(open_clip.get_pretrained_cfg(name, tag))
        if path is not None:
            yield LocalModel(name, tag, path.stat().st_size, problem_of(name, tag))
    yield from _in_hub_cache()


def _in_folder(name: str) -> Iterator[LocalModel]:
    try:
        folder = expand_user(name)
        inside = sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError as error:
        raise FewShotError(f"can't read {name}: {first_line(error)}") from error
    for path in [folder, *inside]:
        if _is_model(path):
            yield LocalModel(str(path), "", _size(path), problem_of(str(path)))


def _in_hub_cache() -> Iterator[LocalModel]:
    try:
        repositories = huggingface_hub.scan_cache_dir().repos
    except huggingface_hub.errors.CacheNotFound:
        return
    for name in sorted(each.repo_id for each in repositories if each.repo_type == "model"):
        folder = cached_folder(name)
        if folder is not None and _is_model(folder):
            name = f"hf-hub:{name}"
            yield LocalModel(name, "", _size(folder), problem_of(name))


def _is_model(folder: Path) -> bool:
    if (folder / CONFIG_NAME).is_file():
        return True
    # Caches hold models of many kinds; those that are no CLIP are nobody's mistake.
    return is_of_transformers(folder) and transformers_kind(folder) in TRANSFORMERS_KINDS


def _size(folder: Path) -> int:
    files = [path for path in folder.iterdir() if path.suffix in SAFETENSORS + PICKLES]
    return sum(path.stat().st_size for path in files if path.is_file())
