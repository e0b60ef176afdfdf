"""A classifier's folder: what is in it, written as a whole, and read without running code of it.

``classifier.json`` describes the classifier and names every other file with its digest; it is
written last, so that an unfinished folder is never taken for a classifier. LoRA lies in PEFT's
format where that is known for the tower, all else that was learned in ``learned.safetensors``.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from tir_kernels.adapters import add_lora, load_lora, save_lora
from tir_kernels.adapters.lora_file import CONFIG_FILE, WEIGHTS_FILE
from tir_kernels.errors import FewShotError, first_line
from tir_kernels.fewshot.classifier.about import About
from tir_kernels.fewshot.classifier.card import model_card
from tir_kernels.fewshot.classifier.classifier import Classifier
from tir_kernels.fewshot.methods.lora import FACTOR_PREFIX, TOWERS, factors_in, named_factors
from tir_kernels.fewshot.resizing import with_resize
from tir_kernels.fewshot.run.folder import SETTINGS_NAME, expanded_out, write_json, write_whole
from tir_kernels.fewshot.settings import Runtime
from tir_kernels.fewshot.strict_json import decode_json
from tir_kernels.files import MIB, open_regular, read_bytes
from tir_kernels.text import setting
from tir_kernels.towers.loading.loaded import LoadedModel
from tir_kernels.towers.loading.models import load_model
from tir_kernels.towers.loading.saving import save_model

ABOUT_FILE = "classifier.json"
LEARNED_FILE = "learned.safetensors"
CARD_FILE = "README.md"
BASE_FOLDER = "base"
FIT_FOLDER = ".fit"  # what a fit keeps

_MOST_ABOUT_BYTES = 64 * MIB
_DEFAULT_RUNTIME = Runtime()


def save_classifier(
    classifier: Classifier, path: str | os.PathLike[str], include_base: bool = False
) -> None:
    """Write a classifier into a folder.

    Args:
        classifier: The classifier.
        path: Folder; it is made if it is missing, and a classifier in it is replaced. While the
            files are written it holds no ``classifier.json``, so an interrupted call leaves nothing
            that loads.
        include_base: Whether to write the base model too, into the folder ``base``; otherwise the
            folder says where to get it.

    Raises:
        FewShotError: The folder can't be written, or holds other things than a classifier.
    """
    folder = expanded_out(os.fspath(path))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        require_own(folder)
        (folder / ABOUT_FILE).unlink(missing_ok=True)
        for name in (CONFIG_FILE, WEIGHTS_FILE, LEARNED_FILE, CARD_FILE):
            (folder / name).unlink(missing_ok=True)
        learned = _save_lora(classifier, folder)
        write_whole(folder / LEARNED_FILE, safetensors.torch.save(learned, {"format": "pt"}))
        write_whole(folder / CARD_FILE, model_card(classifier).encode())
        names = (CONFIG_FILE, WEIGHTS_FILE, LEARNED_FILE)
        files = [folder / name for name in names if (folder / name).exists()]
        if include_base:
            files += save_model(classifier.model, folder / BASE_FOLDER)
        digests = {each.relative_to(folder).as_posix(): _digest(each) for each in files}
    except OSError as error:
        raise FewShotError(f"can't write the classifier {folder}: {first_line(error)}") from error
    write_json(folder / ABOUT_FILE, classifier.about.to_json() | {"files": digests})


def load_classifier(
    path: str | os.PathLike[str],
    *,
    model: str | None = None,
    pretrained: str | None = None,
    runtime: Runtime = _DEFAULT_RUNTIME,
    loaded: LoadedModel | None = None,
) -> Classifier:
    """Read a classifier from its folder; nothing in it is run as code.

    Args:
        path: Folder of ``Classifier.save`` or ``tir-finetune fit``.
        model, pretrained: Base model, as for ``load_model``, where it has moved; by default the
            folder's own copy, or what the folder names.
        runtime: Device and types; its precision is used as it is.
        loaded: Base model that is loaded already, on ``runtime.device``.

    Raises:
        FewShotError: The folder holds no classifier, a file is missing or damaged, or the base
            model can't be had or is another one.
    """
    folder = expanded_out(os.fspath(path))
    about, digests = read_about(folder)
    _check_files(folder, digests)
    has_base = any(Path(name).parts[0] == BASE_FOLDER for name in digests)
    if loaded is None and model is None and has_base:
        # Checked by its digests: the same model, in other files than it was loaded from.
        copy = load_model(str(folder / BASE_FOLDER), device=runtime.device)
        loaded = replace(copy, fingerprint=about.base.fingerprint)
    if loaded is None:
        name, weights = (model, pretrained) if model else (about.base.name, about.base.pretrained)
        loaded = load_model(name, weights, device=runtime.device)
    if loaded.fingerprint != about.base.fingerprint:
        raise FewShotError(
            f"the classifier {folder} was made with {about.base.description} (content "
            f"{about.base.fingerprint[:16]}), and {loaded.description} has content "
            f"{loaded.fingerprint[:16]}: pass {setting('model')} and {setting('pretrained')} of "
            "the one it was made with"
        )
    loaded = with_resize(loaded, about.resize)
    try:
        learned: dict[str, Tensor] = safetensors.torch.load_file(folder / LEARNED_FILE)
        if WEIGHTS_FILE in digests:
            with load_lora(loaded.model, folder, 0.0) as lora:
                factors = named_factors(lora.factors())
                learned |= {name: each.detach().cpu().clone() for name, each in factors.items()}
        classifier = Classifier(about, loaded, learned, runtime)
        with classifier.learner():
            pass  # what it holds fits the model and the method
    except FewShotError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise _damaged(folder, f"{first_line(error)}") from error
    return classifier


def _save_lora(classifier: Classifier, folder: Path) -> dict[str, Tensor]:
    """Write LoRA in PEFT's format if there is any; gives what is left to be written."""
    learned = {name: each.contiguous() for name, each in classifier.learned.items()}
    a, b = factors_in(learned)
    if not a:
        return learned
    method: Any = classifier.about.method
    with add_lora(
        classifier.model.model,
        method.lora_rank,
        method.lora_alpha,
        method.lora_dropout,
        towers=TOWERS[method.lora_towers],
    ) as lora:
        lora.set_factors(a, b)
        try:
            save_lora(lora, folder)
        except TypeError:  # PEFT has no format for this tower's attention
            return learned
    return {name: each for name, each in learned.items() if not name.startswith(FACTOR_PREFIX)}


def require_own(folder: Path) -> None:
    """Refuse to mix a classifier with what is in a folder of something else."""
    # A fit that makes its classifier anew may be stopped beside its page, and goes on.
    if (folder / ABOUT_FILE).exists() or (folder / FIT_FOLDER / SETTINGS_NAME).exists():
        return
    own = {CONFIG_FILE, WEIGHTS_FILE, LEARNED_FILE, CARD_FILE, BASE_FOLDER}
    others = sorted(
        each.name
        for each in folder.iterdir()
        if each.name not in own and not each.name.startswith(".")
    )
    if others:
        raise FewShotError(
            f"{setting('out')}: {folder} holds other things ({', '.join(others[:3])}); choose an "
            "empty folder, or one that does not exist"
        )


def _digest(path: Path) -> str:
    with open_regular(path) as file:
        digest = hashlib.sha256()
        while chunk := file.read(MIB):
            digest.update(chunk)
        return digest.hexdigest()


def read_about(folder: Path) -> tuple[About, dict[str, str]]:
    """A folder's description, and the digests of its files."""
    place = folder / ABOUT_FILE
    if not folder.is_dir():
        raise FewShotError(f"there is no classifier {folder}: the folder does not exist")
    if not place.exists():
        started = ", or its fit is not finished: give the same fit command again"
        raise FewShotError(f"{folder} holds no classifier: {ABOUT_FILE} is missing{started}")
    try:
        content = decode_json(read_bytes(place, at_most=_MOST_ABOUT_BYTES))
        digests = content.pop("files")
        for name in digests:
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise ValueError(f"it names {name!r}, which is no file of it")
        return About.from_json(content), digests
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(folder, f"{ABOUT_FILE} can't be used: {first_line(error)}") from error


def _check_files(folder: Path, digests: dict[str, str]) -> None:
    for name, digest in digests.items():
        try:
            found = _digest(folder / name)
        except FileNotFoundError:
            raise _damaged(folder, f"{name} is missing") from None
        except OSError as error:
            raise _damaged(folder, f"{name} can't be read: {first_line(error)}") from error
        if found != digest:
            raise _damaged(folder, f"{name} is not as it was written")


def _damaged(folder: Path, why: str) -> FewShotError:
    return FewShotError(
        f"the classifier {folder} is damaged: {why}; copy it again, or make it anew with fit"
    )
