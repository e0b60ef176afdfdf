"""The material of whole runs: a data set, episodes drawn from it, and a model in a folder."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import IO, NamedTuple

import click
import torch
from torch import Tensor

from tir_kernels.demo import model_directory, write_image_folder
from tir_kernels.errors import FewShotError
from tir_kernels.fewshot import Episode
from tir_kernels.fewshot.data.dataset import ImageData, load_data
from tir_kernels.fewshot.data.load import load_episode
from tir_kernels.fewshot.data.reader import ImageReader
from tir_kernels.fewshot.episode import EpisodePlan, plan_episode
from tir_kernels.towers.loading.loaded import LoadedModel
from tir_kernels.towers.loading.models import load_model
from tir_kernels.towers.loading.new_models import write_model

from .clip_model import ClipSizes, load_sizes, make_model
from .settings import Settings

_CLASS_NAMES = "class_names.json"
_SEED = 0


class EpisodeFiles(NamedTuple):
    """An episode as files that are not read yet, grouped by class, for the published program.

    Attributes:
        index: Its number, which is its seed too.
        class_names: C names, in words.
        support: Files to learn from.
        queries: Files to classify.
    """

    index: int
    class_names: list[str]
    support: list[Path | IO[bytes]]
    queries: list[Path | IO[bytes]]

    def labels(self, files: Sequence[Path | IO[bytes]]) -> Tensor:
        """The classes of its support or query images."""
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
        self._most_shots = max(shots)
        self._temporary = tempfile.TemporaryDirectory(prefix="tir-bench-")
        self._model = settings.model or str(model_directory())
        self.sizes: ClipSizes = load_sizes(self._model)
        if settings.data is not None:
            _ = self.data  # what is wrong with it shows before anything is measured

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
        folder, config = Path(self._temporary.name) / "model", {"model_cfg": self.sizes.model_cfg}
        write_model(make_model(self.sizes, "cpu"), config, folder)
        return folder

    @cached_property
    def model(self) -> LoadedModel:
        return load_model(str(self.model_folder), device=self._settings.device)

    @cached_property
    def data(self) -> ImageData:
        words = self.data_folder / _CLASS_NAMES
        settings = self._settings
        try:
            data = load_data(self.data_folder, class_names=words if words.exists() else None)
            if data.queries:
                raise FewShotError(f"{self.data_folder} is divided into parts; pass one of them")
            data.require(ways=settings.ways, shots=self._most_shots, queries=settings.queries)
        except FewShotError as error:
            raise click.ClickException(str(error)) from error
        return data

    @property
    def queries(self) -> int:
        """Query images of an episode."""
        return self._settings.ways * self._settings.queries

    def reader(self) -> ImageReader:
        """Reads images as a run does that finds none in a cache."""
        return ImageReader(self.data, self.model.preprocess)

    def load(self, reader: ImageReader, index: int, shots: int, device: str) -> Episode:
        """An episode, which depends on its number alone, with its images."""
        queries = self._settings.queries
        plan = self._plan(index)
        return load_episode(plan, self.data, reader, shots=shots, queries=queries, device=device)

    def files(self, index: int, shots: int) -> EpisodeFiles:
        """The files of the same episode."""
        plan = self._plan(index)
        classes = [self.data.classes[number] for number in plan.classes]

        def chosen(begin: int, end: int) -> list[Path | IO[bytes]]:
            return [
                self.data.source.file(entry.files[position])
                for entry, order in zip(classes, plan.orders, strict=True)
                for position in order[begin:end]
            ]

        support, queries = chosen(0, shots), chosen(shots, shots + self._settings.queries)
        return EpisodeFiles(index, [entry.words for entry in classes], support, queries)

    def _plan(self, index: int) -> EpisodePlan:
        sizes = [len(entry.files) for entry in self.data.classes]
        return plan_episode(_SEED, index, sizes, self._settings.ways)
