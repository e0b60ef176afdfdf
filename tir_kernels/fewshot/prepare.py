"""The way from options to a run: its data and model are found, and its plan is checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch

import tir_kernels
from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.data.cache import open_cache
from tir_kernels.fewshot.data.dataset import ImageData, load_data
from tir_kernels.fewshot.data.decoding import Decoding
from tir_kernels.fewshot.data.reader import ImageReader
from tir_kernels.fewshot.devices import is_slow_at, resolve_device
from tir_kernels.fewshot.episode import Episode
from tir_kernels.fewshot.run.folder import (
    SUMMARY_NAME,
    RunFolder,
    finished_records,
    read_run,
    write_json,
)
from tir_kernels.fewshot.run.progress import Messages, RunDisplay
from tir_kernels.fewshot.run.records import Record
from tir_kernels.fewshot.run.runner import (
    Arm,
    RunPlan,
    StepFunction,
    require_distinct_prompts,
    run_episodes,
)
from tir_kernels.fewshot.run.workers import Place
from tir_kernels.fewshot.run_options import Inputs, Reading, RunOptions, settings_named
from tir_kernels.fewshot.settings import FewShotConfig
from tir_kernels.fewshot.train import loop
from tir_kernels.operators.choose import refusal
from tir_kernels.text import setting
from tir_kernels.towers.loading import models
from tir_kernels.towers.loading.models import LoadedModel

if TYPE_CHECKING:
    from tir_kernels.fewshot.run.summary import Summary


class ModelTrainer:
    """Trains episodes on a model; see ``run.runner.Trainer``.

    Args:
        model: The model.
        checkpoint: Whether activations are computed again in the backward pass.
    """

    def __init__(self, model: LoadedModel, *, checkpoint: bool = False) -> None:
        self._model = model
        self._checkpoint = checkpoint

    def train(
        self, episodes: list[Episode], config: FewShotConfig, on_step: StepFunction
    ) -> list[Any]:
        """The results of episodes that are trained at once."""
        return loop.finetune_episodes(
            self._model.model,
            self._model.tokenizer,
            episodes,
            config,
            on_step=on_step,
            checkpoint=self._checkpoint,
        )

    def fitting(self, episode: Episode, config: FewShotConfig) -> int | None:
        """The number of such episodes that memory has room for; ``None`` without training."""
        if config.method == "zero-shot":
            return None
        return loop.episodes_that_fit(
            self._model.model,
            self._model.tokenizer,
            episode,
            config,
            checkpoint=self._checkpoint,
        )


class PreparedRun:
    """A run whose settings are checked and whose images are listed.

    Args:
        options: Options of the run.
        inputs: Its data and model.
        reading: The way in which images are read.
        config: All other settings; ``options.methods`` take the place of its ``method``.
        place: This process among those that share the run.
        messages: Voice that tells the user things.

    Raises:
        FewShotError: A setting can't be used, or the data can't.
    """

    def __init__(
        self,
        options: RunOptions,
        inputs: Inputs,
        reading: Reading,
        config: FewShotConfig,
        place: Place,
        messages: Messages,
    ) -> None:
        self._options, self._inputs, self._reading = options, inputs, reading
        self._place, self._messages = place, messages
        # A method named twice is still one method.
        methods = tuple(dict.fromkeys(options.methods))
        _require_parallel(options, [replace(config, method=method) for method in methods])
        device, note = resolve_device(config.device)
        if note:
            messages.tell(note)
        self._config = replace(config, device=device)
        with settings_named():
            self._decoding = Decoding(reading.max_pixels, reading.white_value)
        _require_backend(self._config)
        own = replace(self._config, device=place.own_device(device))
        arms = tuple(Arm(method, replace(own, method=method)) for method in methods)
        self.plan = RunPlan(
            ways=options.ways,
            shots=config.shots,
            queries=options.queries,
            episodes=options.episodes,
            arms=arms,
            seed=config.seed,
            device=own.device,
            parallel=options.parallel_episodes,
            augment=options.augment,
        )
        with messages.status("listing the images"):
            self._data = load_data(
                inputs.data, class_names=inputs.class_names, images=inputs.images
            )
        for note in self._data.notes:
            messages.tell(note)
        self._data.require(ways=options.ways, shots=config.shots, queries=options.queries)

    @property
    def methods(self) -> tuple[str, ...]:
        """The names of the run's arms."""
        return tuple(arm.name for arm in self.plan.arms)

    @cached_property
    def _model(self) -> LoadedModel:
        with self._messages.status("loading the model"):
            loaded = models.load_model(
                self._inputs.model, self._inputs.pretrained, device=self.plan.device
            )
        for note in loaded.notes:
            self._messages.tell(note)
        require_distinct_prompts(self._data, loaded.tokenizer)
        return loaded

    def finished(self) -> Summary | None:
        """The summary of a run of which nothing is left to do, as of ``run``; writes nothing.

        Raises:
            FewShotError: As ``finished_records``.
        """
        options = self._options
        return self._summary(finished_records(options.out, self._settings(), options.episodes))

    def run(self) -> Summary | None:
        """Run the episodes that are left, and keep the summary of all beside the journals.

        Returns:
            The summary, for the first of the processes that share the run.

        Raises:
            FewShotError: The folder belongs to another run, can't be written or locked, or what
                ``run_episodes`` raises.
        """
        with RunFolder(self._options.out, self._place) as folder:
            settings = self._settings()
            self._note_slowness()
            if self.plan.device != self._config.device:
                # For what takes the current device unasked, as the capture of CUDA graphs does.
                torch.cuda.set_device(self.plan.device)
            about = {
                "data": self._data.name,
                "model": self._model.description,
                **_versions(),
            }
            folder.claim(settings, self.plan.episodes, about)
            self._run_episodes(folder)
            summary = self._summary(read_run(folder.path))
            if summary is not None:
                write_json(folder.path / SUMMARY_NAME, summary.to_json())
            return summary

    def _summary(self, records: list[Record]) -> Summary | None:
        if not self._place.is_first:
            return None
        # Here, since it brings SciPy, which no training needs to wait for.
        from tir_kernels.fewshot.run.summary import summarise

        return summarise(records, self.methods)

    def _run_episodes(self, folder: RunFolder) -> None:
        with folder.journal() as journal:
            if journal.note:
                self._messages.tell(journal.note)
            display = RunDisplay(
                self._messages.console,
                episodes=self.plan.episodes,
                methods=self.methods,
                steps=self._config.steps,
                finished=journal.records,
            )
            trainer = ModelTrainer(self._model, checkpoint=self._options.checkpoint)
            images = self._images()
            with display:
                for record in run_episodes(
                    self.plan, self._data, images, trainer, folder, journal, on_step=display.step
                ):
                    display.finished(record)
        if journal.repeats:
            self._messages.tell(
                f"{journal.repeats} results were in the journals more than once and count once: "
                f"locks in {folder.path} may not reach all machines"
            )

    def _images(self) -> ImageReader:
        cache = None
        if not self._reading.no_cache:
            shape = self._model.preprocess.shape
            cache = open_cache(self._reading.cache, shape, notify=self._messages.tell)
        return ImageReader(
            self._data,
            self._model.preprocess,
            cache=cache,
            skip_unreadable=self._reading.skip_unreadable,
            decoding=self._decoding,
            notify=self._messages.tell,
        )

    def _settings(self) -> dict[str, Any]:
        """All that decides an episode's numbers, as JSON values."""
        # The device as it was given: another number of processes, on other devices, may continue.
        return run_settings(
            self._config, self._options, self._data, self._model, self._reading.white_value
        )

    def _note_slowness(self) -> None:
        precision = self._config.precision
        if is_slow_at(precision, self.plan.device):
            self._messages.tell(
                f"this processor has no instructions for products of {precision} numbers: "
                f"{setting('precision', 'float32')} would be faster"
            )


def run_settings(
    config: FewShotConfig,
    options: RunOptions,
    data: ImageData,
    model: LoadedModel,
    white_value: float | None = None,
) -> dict[str, Any]:
    """All that decides an episode's numbers, as JSON values by the names of the settings."""
    settings = asdict(config) | {
        "data": f"content {data.fingerprint[:16]}",
        "model": f"content {model.fingerprint[:16]}",
        "ways": options.ways,
        "queries": options.queries,
        "method": list(dict.fromkeys(options.methods)),
    }
    # Runs from before there were these have none, and no word on them.
    if options.augment:
        settings["augment"] = options.augment
    if white_value is not None:
        settings["white_value"] = white_value
    return settings


def _require_parallel(options: RunOptions, configs: Sequence[FewShotConfig]) -> None:
    if options.parallel_episodes not in ("auto", 1) and any(map(loop.trains_alone, configs)):
        raise FewShotError(
            f"{setting('parallel_episodes', options.parallel_episodes)} does not go with "
            f"{setting('precision', 'float16')}, whose loss scale episodes can't share; leave it "
            f"out, or use {setting('precision', 'bfloat16')}"
        )


def _require_backend(config: FewShotConfig) -> None:
    if config.backend == "auto":
        return
    with settings_named():
        error = refusal(config.backend, torch.device(config.device), False)
        if error is not None:
            raise error


def _versions() -> dict[str, str]:
    return {
        "tir_kernels": tir_kernels.__version__,
        "torch": torch.__version__,
        "open_clip": metadata.version("open_clip_torch"),
    }
