"""What a classifier is made of besides tensors, as it stands in its folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tir_kernels.fewshot.fields import as_settings
from tir_kernels.fewshot.methods import Method, method_class
from tir_kernels.fewshot.settings import PRECISIONS, RESIZES
from tir_kernels.files import expand_user

if TYPE_CHECKING:
    from tir_kernels.towers.loading.loaded import LoadedModel

FORMAT = 1


def _whole_path(name: str) -> str:
    return os.path.abspath(expand_user(name))


@dataclass(frozen=True)
class BaseModel:
    """The model that a classifier was made with, and how to get it.

    Args:
        name, pretrained: As for ``load_model``; folders and files by their whole paths.
        description: The model in words.
        fingerprint: Digest of its configuration, preprocessing, weights and tokenizer.
    """

    name: str
    pretrained: str | None
    description: str
    fingerprint: str

    @classmethod
    def of(cls, name: str, pretrained: str | None, loaded: LoadedModel) -> BaseModel:
        """The model that ``load_model`` gave for these names, found from any current folder."""
        if os.path.isdir(expand_user(name)):
            name = _whole_path(name)
        # No tag of weights has an ending.
        has_ending = pretrained is not None and Path(pretrained).suffix
        if pretrained is not None and has_ending and os.path.isfile(expand_user(pretrained)):
            pretrained = _whole_path(pretrained)
        return cls(name, pretrained, loaded.description, loaded.fingerprint)


@dataclass(frozen=True)
class About:
    """A classifier's settings and findings.

    Args:
        labels: The C classes by their names in the data, in the order of the logits.
        words: The words for them in prompts.
        method: The method with its options.
        base: The base model.
        seed: Seed of the training.
        shots: Support images per class, without views; of unequal classes the mean, rounded.
        views: Support images in a row that were views of one, itself included.
        precision: Type of products in training, and by default in use.
        support: Support images of each class.
        support_digests: Digest of each of them, by which copies are known: see ``pixel_digest``.
        figures: What was measured, by names that say what it is.
        settings: The other settings of the fit.
        temperature: Divisor of the logits in front of the softmax.
        white_value: What is white in its images of more than 8 bits, see ``Decoding``.
        versions: Versions of the packages that it was made with.
    """

    labels: tuple[str, ...]
    words: tuple[str, ...]
    method: Method
    base: BaseModel
    seed: int
    shots: int
    views: int
    precision: str
    support: tuple[int, ...]
    support_digests: tuple[str, ...] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    temperature: float = 1.0
    white_value: float | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def resize(self) -> str | None:
        """How its images get the model's size; ``None``: as the model's preprocessing says."""
        return self.settings.get("resize")  # none of classifiers from before there was a choice

    def to_json(self) -> dict[str, Any]:
        """The content of ``classifier.json``."""
        return {
            "format": FORMAT,
            "classes": [
                {"label": label, "words": words, "support": support}
                for label, words, support in zip(self.labels, self.words, self.support, strict=True)
            ],
            "method": {"name": self.method.name, **as_settings(self.method)},
            "base": vars(self.base),
            "seed": self.seed,
            "shots": self.shots,
            "views": self.views,
            "precision": self.precision,
            "temperature": self.temperature,
            "white_value": self.white_value,
            "support_digests": list(self.support_digests),
            "figures": dict(self.figures),
            "settings": dict(self.settings),
            "versions": dict(self.versions),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> About:
        """Read what ``to_json`` gives.

        Raises:
            ValueError, TypeError, KeyError: It is of another format, or no such content.
        """
        if content["format"] != FORMAT:
            raise ValueError(
                f"it has format {content['format']!r}, and this version of tir_kernels reads "
                f"format {FORMAT}"
            )
        options = dict(content["method"])
        name = options.pop("name")
        classes = content["classes"]
        precision, temperature = content["precision"], float(content["temperature"])
        if precision not in PRECISIONS:
            raise ValueError(f"precision is {precision!r}")
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature is {temperature}")
        white_value = content.get("white_value")  # none of classifiers from before it was kept
        if white_value is not None and not 0 < white_value < float("inf"):
            raise ValueError(f"white_value is {white_value}")
        settings = content["settings"]
        if settings.get("resize") not in (None, *RESIZES):
            raise ValueError(f"resize is {settings['resize']!r}")
        return cls(
            labels=tuple(str(each["label"]) for each in classes),
            words=tuple(str(each["words"]) for each in classes),
            support=tuple(int(each["support"]) for each in classes),
            support_digests=tuple(map(str, content["support_digests"])),
            method=method_class(name)(**options),
            base=BaseModel(**content["base"]),
            seed=int(content["seed"]),
            shots=int(content["shots"]),
            views=int(content["views"]),
            precision=precision,
            temperature=temperature,
            white_value=white_value,
            figures=content["figures"],
            settings=settings,
            versions=content["versions"],
        )
