"""The material of whole runs: image files, episodes drawn from them, and a model in a folder."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import ImageFolder

from tir_kernels.demo import model_directory, write_image_folder
from tir_kernels.towers.loading.models import LoadedModel, load_model

from .clip_model import ClipSizes, load_sizes, write_model
from .settings import Settings

_CLASS_NAMES = "class_names.json"
_SEED = 0


@dataclass(frozen=True)
class EpisodeFiles:
    """An episode before its images are read.

    Attributes:
        index: Its number, which is its seed too.
        class_names: C names, in words.
        support: Files, grouped by class.
        queries: Likewise.
    """

    index: int
    class_names: list[str]
    support: list[Path]
    queries: list[Path]

    @property
    def support_labels(self) -> Tensor:
        return self._labels(self.support)

    @property
    def query_labels(self) -> Tensor:
        return self._labels(self.queries)

    def _labels(self, files: Sequence[Path]) -> Tensor:
        num_classes = len(self.class_names)
        return torch.arange(num_classes).repeat_interleave(len(files) // num_classes)


class Workload:
    """Images and a model; what is not given is made when it is first asked for.

    Args:
        settings: Without ``data`` images are drawn; without ``model`` the embedded model of the
            demonstration serves. An architecture gets random weights: its accuracy means nothing,
            its time does.
        shots: Numbers of support images per class that are wanted.

    Raises:
        click.ClickException: There are no such images or model, or too few.
    """

    def __init__(self, settings: Settings, shots: Sequence[int]) -> None:
        self._settings = settings
        self._needed = max(shots) + settings.queries
        self._temporary = tempfile.TemporaryDirectory(prefix="tir-bench-")
        self._model = settings.model or str(model_directory())
        self.sizes: ClipSizes = load_sizes(self._model)
        if settings.data is not None:
            _ = self._files  # what is wrong with them shows before anything is measured

    @property
    def name(self) -> str:
        """The names of the images and the model."""
        data, model = self._settings.data, self._settings.model
        return f"{Path(data).resolve().name if data else 'drawings'}, {Path(model or 'demo').stem}"

    @cached_property
    def data_folder(self) -> Path:
        if self._settings.data is not None:
            return Path(self._settings.data).resolve()
        return write_image_folder(Path(self._temporary.name) / "drawings")

    @cached_property
    def model_folder(self) -> Path:
        given = Path(self._model)
        if given.is_dir():
            return given.resolve()
        folder = Path(self._temporary.name) / "model"
        folder.mkdir()
        write_model(self.sizes, folder)
        return folder

    @cached_property
    def model(self) -> LoadedModel:
        return load_model(str(self.model_folder), device=self._settings.device)

    @cached_property
    def _files(self) -> dict[str, list[Path]]:
        """The image files by the words of each class."""
        root, ways = self.data_folder, self._settings.ways
        try:
            folder = ImageFolder(str(root))
        except OSError as error:
            raise click.ClickException(f"--data: {error}") from error
        given = root / _CLASS_NAMES
        words = json.loads(given.read_text(encoding="utf-8")) if given.exists() else {}
        found: dict[str, list[Path]] = {}
        for path, number in sorted(folder.samples):
            name = folder.classes[number]
            found.setdefault(words.get(name, _in_words(name)), []).append(Path(path))
        if len(found) < ways:
            raise click.ClickException(f"--data: {root} has {len(found)} classes; lower --ways")
        few = [name for name, files in found.items() if len(files) < self._needed]
        if few:
            raise click.ClickException(
                f"--data: {root} has fewer than {self._needed} images of {few[0]!r}; lower --shots "
                "or --queries"
            )
        return found

    def draw(self, index: int, shots: int) -> EpisodeFiles:
        """An episode, which depends on its number alone."""
        random = np.random.default_rng([_SEED, index])
        names = [str(name) for name in random.permutation(list(self._files))]
        names = names[: self._settings.ways]
        orders = [random.permutation(len(self._files[name])) for name in names]
        support, queries = (
            [
                self._files[name][position]
                for name, order in zip(names, orders, strict=True)
                for position in order[begin:end]
            ]
            for begin, end in ((0, shots), (shots, shots + self._settings.queries))
        )
        return EpisodeFiles(index, names, support, queries)


def read_images(
    files: Sequence[Path], preprocess: Callable[[Image.Image], Tensor], device: str
) -> Tensor:
    """(images, 3, H, W) float32."""
    images = []
    for file in files:
        with Image.open(file) as image:
            images.append(preprocess(image.convert("RGB")))
    return torch.stack(images).to(device)


def _in_words(folder: str) -> str:
    """``AnnualCrop`` -> annual crop."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|[_\W]+", " ", folder).strip().lower()
