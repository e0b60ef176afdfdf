"""Classifiers in forms that other programs read: merged checkpoints, and adapters for PEFT."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import safetensors.torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import Tensor

from tir_kernels.adapters import reweighting_of
from tir_kernels.errors import FewShotError, first_line
from tir_kernels.fewshot.classifier.classifier import Classifier
from tir_kernels.fewshot.methods.lora import factors_in
from tir_kernels.fewshot.methods.prompts import default_logit_scale
from tir_kernels.fewshot.run.folder import expanded_out, write_json, write_whole
from tir_kernels.text import setting
from tir_kernels.towers import as_transformers_clip
from tir_kernels.towers.loading.saving import library_of, save_model

CLASSES_FILE = "classes.json"
EMBEDDINGS_FILE = "classes/embeddings.safetensors"  # not beside weights, to be none of them


def export_merged(classifier: Classifier, path: str | os.PathLike[str]) -> None:
    """Write the model with LoRA merged into its weights, and the classes' embeddings.

    The folder holds what the model's library reads, open_clip or transformers; the embeddings of
    the classes, which the learned context shaped, and those that decide the re-weighting; and a
    README.md that says, in code, how the three give the classifier's logits.

    Args:
        classifier: Of a method with LoRA.
        path: Folder; it must be empty or missing.

    Raises:
        FewShotError: The method has no LoRA, or is a control whose re-weighting takes another
            order than relevance; or the folder can't be written or holds other things.
    """
    about = classifier.about
    method: Any = about.method
    _factors(classifier, "merged")
    if getattr(method, "selection", "relevance") != "relevance":
        raise FewShotError(
            f"{setting('merged')}: a control with selection={method.selection} has no exported "
            "form; predict with the classifier itself"
        )
    folder = _empty(path, "merged")
    embeddings, reweighting = _classes(classifier)
    classes = {
        "labels": list(about.labels),
        "words": list(about.words),
        "logit_scale": default_logit_scale(method.logit_scale, about.shots),
        "temperature": about.temperature,
        "reweighting": reweighting,
    }
    environment = Environment(
        loader=PackageLoader("tir_kernels.fewshot.classifier"), undefined=StrictUndefined,
        autoescape=False, trim_blocks=True,
    )  # fmt: skip
    readme = environment.get_template("merged.md.jinja").render(
        is_reweighted=bool(reweighting),
        library=library_of(classifier.model),
        is_packed=classifier.model.config.get("model_type") == "siglip2",
    )
    try:
        with classifier.merged_lora():
            save_model(classifier.model, folder)
        (folder / EMBEDDINGS_FILE).parent.mkdir()
        write_whole(folder / EMBEDDINGS_FILE, safetensors.torch.save(embeddings))
        write_json(folder / CLASSES_FILE, classes)
        write_whole(folder / "README.md", readme.encode())
    except OSError as error:
        raise FewShotError(f"can't write {folder}: {first_line(error)}") from error


def export_transformers(classifier: Classifier, path: str | os.PathLike[str]) -> None:
    """Write LoRA in PEFT's format for the same base model as one of transformers.

    The context, the class embeddings and the re-weighting have no place in that format: with the
    adapter alone, transformers computes the adapted towers.

    Args:
        classifier: Of a method with LoRA, on a model of transformers or one that its CLIPModel can
            express.
        path: Folder; it must be empty or missing.

    Raises:
        FewShotError: The method has no LoRA, or the model is another; or the folder can't be
            written or holds other things.
    """
    method: Any = classifier.about.method
    factors = _factors(classifier, "transformers")
    try:
        modules = as_transformers_clip(classifier.model.model)
    except TypeError as error:
        raise FewShotError(f"{setting('transformers')}: {first_line(error)}") from error
    folder = _empty(path, "transformers")
    tensors = {}
    for letter, by_place in zip("AB", factors, strict=True):
        for place, each in by_place.items():
            block, _, projection = place.rpartition(".")
            module = f"base_model.model.{modules[block]}.{projection}_proj"
            tensors[f"{module}.lora_{letter}.weight"] = each.contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "target_modules": r"(text|vision)_model\.encoder\.layers\.\d+\.self_attn\.[qkv]_proj",
        "r": method.lora_rank,
        "lora_alpha": method.lora_alpha,
        "use_rslora": True,  # a scale of lora_alpha / sqrt(r)
        "lora_dropout": method.lora_dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
    }
    write_whole(folder / "adapter_model.safetensors", safetensors.torch.save(tensors))
    write_json(folder / "adapter_config.json", config)


def _factors(classifier: Classifier, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """LoRA's A and B, by the names of ``LoRA.factors``."""
    a, b = factors_in(classifier.learned)
    if not a:
        raise FewShotError(
            f"{setting(name)}: method {classifier.about.method.name} has no LoRA to write"
        )
    return a, b


def _classes(classifier: Classifier) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The embeddings of the classes, and the settings of the re-weighting if there is one."""
    method: Any = classifier.about.method
    with classifier.learner() as learner:
        final = learner.show_classes(learner.classes())
        assert final is not None  # methods with LoRA have text
        embeddings = {"final": final[0].float().cpu().clone()}
        handle = reweighting_of(classifier.model.model) if hasattr(method, "placement") else None
        if handle is None:
            return embeddings, None
        deciding = handle.class_embeddings[0].float().cpu().clone()
        settings = {
            "layers": list(handle.layers),
            "placement": handle.placement,
            "rule": {
                "kind": method.rule, "strength": method.strength, "top_ratio": method.top_ratio
            },
        }  # fmt: skip
    return embeddings | {"deciding": deciding}, settings


def _empty(path: str | os.PathLike[str], name: str) -> Path:
    folder = expanded_out(os.fspath(path))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = sorted(each.name for each in folder.iterdir())
    except OSError as error:
        raise FewShotError(f"{setting(name)}: can't write {folder}: {first_line(error)}") from error
    if held:
        raise FewShotError(
            f"{setting(name)}: {folder} holds other things ({', '.join(held[:3])}); choose an "
            "empty folder, or one that does not exist"
        )
    return folder
