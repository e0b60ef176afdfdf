"""Downloads through open_clip: from the caches first, and none at all for local models."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import open_clip
from torch import Tensor

from tir_kernels.errors import FewShotError, first_line
from tir_kernels.text import setting

_MODEL = setting("model")
_PRETRAINED = setting("pretrained")

# Any of these is enough for the transformers library to make a tokenizer.
TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)
_COMPANIONS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
)
_LOCAL_MODEL = "a folder with open_clip_config.json, weights and tokenizer.json"


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Make Hugging Face's libraries look into their cache only, whatever the environment says."""
    places: list[tuple[Any, str]] = [(huggingface_hub.constants, "HF_HUB_OFFLINE")]
    hub = sys.modules.get("transformers.utils.hub")
    if hasattr(hub, "_is_offline_mode"):  # older versions keep a copy of it
        places.append((hub, "_is_offline_mode"))
    before = [getattr(owner, name) for owner, name in places]
    for owner, name in places:
        setattr(owner, name, True)
    try:
        yield
    finally:
        for (owner, name), value in zip(places, before, strict=True):
            setattr(owner, name, value)


def cached_folder(repository: str) -> Path | None:
    """The folder of a repository's newest files in Hugging Face's cache, if it is there."""
    errors = huggingface_hub.errors
    try:
        return Path(huggingface_hub.snapshot_download(repository, local_files_only=True))
    except (errors.LocalEntryNotFoundError, errors.HFValidationError):
        return None


def cached_weights(tag: dict[str, Any]) -> Path | None:
    """The weights file of one of open_clip's tags, if it is in a cache."""
    if not tag.get("hf_hub"):
        path = Path(os.path.expanduser("~/.cache/clip"), os.path.basename(tag["url"]))
        return path if path.is_file() else None
    with contextlib.suppress(Exception), offline():
        return Path(open_clip.download_pretrained(tag))
    return None


def download_weights(tag: dict[str, Any], name: str) -> Path:
    """The weights file of one of open_clip's tags, from the cache if it is there.

    Args:
        tag: open_clip's settings of the tag.
        name: The model in words.

    Raises:
        FewShotError: It is not in the cache and can't be downloaded.
    """
    # Asking the network whether a cached file is still the newest takes long without one; but a
    # file from an address is compared with its digest, and loaded anew where it differs.
    if tag.get("hf_hub") and (path := cached_weights(tag)) is not None:
        return path
    _require_cache(bool(tag.get("hf_hub")), name)
    if tag.get("hf_hub"):
        _require_network(f"{_PRETRAINED}: the weights of {name}", "a checkpoint file")
    try:
        return Path(open_clip.download_pretrained(tag))
    except Exception as error:
        raise FewShotError(
            f"{_PRETRAINED}: can't download the weights of {name}: "
            f"{first_line(error)}; check the network, or pass a checkpoint file instead"
        ) from error


def load_tokenizer(
    open_clip_name: str, text_config: dict[str, Any], folder: Path | None
) -> Callable[..., Tensor]:
    """A model's tokenizer.

    Args:
        open_clip_name: Name by which open_clip knows the model.
        text_config: Its "text_cfg".
        folder: Folder of a local model, whose tokenizer must lie in it.

    Raises:
        FewShotError: It is not there, or can't be used.
    """
    options = text_config.get("tokenizer_kwargs") or {}
    if not isinstance(options, dict) or "bpe_path" in options:
        raise FewShotError(
            f"{_MODEL}: {folder or open_clip_name}: tokenizer_kwargs must be an object without "
            "bpe_path; remove it from text_cfg"
        )
    source = text_config.get("hf_tokenizer_name")
    if not source:
        return open_clip.get_tokenizer(open_clip_name)
    if folder is not None and not tokenizer_files(folder):
        raise FewShotError(
            f"{_MODEL}: {folder} has no tokenizer; put tokenizer.json and tokenizer_config.json of "
            f"{source!r} into it"
        )

    if not has_transformers():
        raise FewShotError(
            f"{_MODEL}: the tokenizer {source!r} of {folder or open_clip_name} needs the "
            "transformers library: pip install transformers"
        )

    def load() -> Callable[..., Tensor]:
        # Code in a folder or repository is not run, whatever its configuration asks for.
        return open_clip.get_tokenizer(open_clip_name, trust_remote_code=False)

    if folder is not None:
        with offline():
            return load()
    with contextlib.suppress(Exception), offline():
        return load()
    _require_cache(True, f"the tokenizer {source}")
    _require_network(f"{_MODEL}: the tokenizer {source!r} of {open_clip_name}", _LOCAL_MODEL)
    try:
        return load()
    except Exception as error:
        raise FewShotError(
            f"{_MODEL}: the tokenizer {source!r} of {open_clip_name} is not in the cache and can't "
            f"be downloaded ({first_line(error)}); check the network, or pass {_LOCAL_MODEL}"
        ) from error


def tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizer's files in a local model's folder; empty if there is no tokenizer."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return []
    names = TOKENIZER_FILES + _COMPANIONS
    return [path for name in names if (path := folder / name).is_file()]


def has_transformers() -> bool:
    """Whether the transformers library is installed."""
    return importlib.util.find_spec("transformers") is not None


def _require_cache(is_hub: bool, name: str) -> None:
    """Refuse to download into a folder named "~", as it would be where there is no home."""
    cache = huggingface_hub.constants.HF_HUB_CACHE if is_hub else os.path.expanduser("~/.cache")
    if str(cache).startswith("~"):
        raise FewShotError(
            f"there is no home directory to keep {name} in; set HOME{' or HF_HOME' * is_hub}, "
            "or pass local files"
        )


def _require_network(what: str, instead: str) -> None:
    """Ask the hub once before a download, which without a network tries for most of a minute."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise FewShotError(f"{what}: not in the cache; unset HF_HUB_OFFLINE, or pass {instead}")
    hub = huggingface_hub.constants.ENDPOINT
    try:
        huggingface_hub.utils.get_session().head(
            hub, timeout=huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT
        )
    except Exception as error:
        raise FewShotError(
            f"{what}: not in the cache, and {hub} can't be reached ({first_line(error)}); "
            f"check the network, or pass {instead}"
        ) from error
