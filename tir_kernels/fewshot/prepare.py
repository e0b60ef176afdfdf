"""The way from options to a run: its data and model are found, and its plan is checked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch

import tir_kernels
from tir_kernels.fewshot.data.cache import open_cache
from tir_kernels.fewshot.data.dataset import ImageData, load_data
from tir_kernels.fewshot.data.decoding import Decoding
from tir_kernels.fewshot.data.draw import require_groups, with_ways
from tir_kernels.fewshot.data.queries import all_queries_note
from tir_kernels.fewshot.data.reader import ImageReader, Preprocess
from tir_kernels.fewshot.data.split import load_split
from tir_kernels.fewshot.data.words import RAW
from tir_kernels.fewshot.devices import is_slow_at, resolve_device
from tir_kernels.fewshot.fields import as_settings
from tir_kernels.fewshot.known_template import with_known_template
from tir_kernels.fewshot.method_check import check_methods
from tir_kernels.fewshot.prompt_check import check_prompts, cut_names_are_known
from tir_kernels.fewshot.resizing import with_resize
from tir_kernels.fewshot.run.folder import (
    SUMMARY_NAME,
    RunFolder,
    finished_records,
    read_run,
    write_json,
)
from tir_kernels.fewshot.run.journal import Journal
from tir_kernels.fewshot.run.progress import Messages, RunDisplay
from tir_kernels.fewshot.run.records import Record
from tir_kernels.fewshot.run.runner import (
    RunPlan,
    run_episodes,
)
from tir_kernels.fewshot.run.shown_arms import shown_arms
from tir_kernels.fewshot.run.workers import Place
from tir_kernels.fewshot.run_options import Inputs, Reading, RunOptions, settings_named
from tir_kernels.fewshot.settings import ALL, AUTO, Protocol, Runtime
from tir_kernels.fewshot.track.watcher import RunWatcher
from tir_kernels.fewshot.train import loop
from tir_kernels.fewshot.train.batch import CLASSIFIED_AT_ONCE
from tir_kernels.fewshot.trainer import Trainer
from tir_kernels.operators.choose import refusal
from tir_kernels.text import setting
from tir_kernels.towers.loading import models
from tir_kernels.towers.loading.loaded import LoadedModel

if TYPE_CHECKING:
    from tir_kernels.fewshot.run.summary import Summary


class PreparedRun:
    """A run whose settings are checked and whose images are listed.

    Args:
        options: Folder, episodes and arms.
        inputs: Data and model.
        reading: The way in which images are read.
        protocol: Sizes and seed of the episodes.
        runtime: Device and types, and how many episodes at once.
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
        protocol: Protocol,
        runtime: Runtime,
        place: Place,
        messages: Messages,
    ) -> None:
        self._options, self._inputs, self._reading = options, inputs, reading
        self._place, self._messages = place, messages
        with settings_named():
            loop.require_parallel(runtime, [arm.method for arm in options.arms])
        device = self._given_device = usable_device(runtime, reading, messages)
        self._runtime = replace(runtime, device=place.own_device(device))
        with messages.status("listing the images"):
            self._data = _listed(inputs)
        parallel = 1 if runtime.parallel is None else runtime.parallel
        self._protocol = protocol = with_ways(protocol, self._data)
        arms = with_known_template(options.arms, self._data)
        self.plan = RunPlan(protocol, options.episodes, arms, self._runtime.device, parallel)
        for note in self._data.notes:
            messages.tell(note)
        classes = self._data.classes
        self._ways = protocol.ways if isinstance(protocol.ways, int) else len(classes)
        self._data.require(
            ways=self._ways,
            shots=protocol.shots,
            queries=protocol.queries_per_class,
        )
        with messages.status("drawing the episodes"):
            require_groups(self._data, protocol, options.episodes)

    @property
    def arms(self) -> tuple[str, ...]:
        """The names of the run's arms."""
        return tuple(arm.name for arm in self.plan.arms)

    @cached_property
    def _model(self) -> LoadedModel:
        with self._messages.status("loading the model"):
            loaded = models.load_model(
                self._inputs.model, self._inputs.pretrained, device=self.plan.device
            )
        loaded = with_resize(loaded, self._protocol.resize)
        methods = [arm.method for arm in self.plan.arms]
        for note in (*loaded.notes, *check_prompts(self._data, loaded.tokenizer, methods)):
            self._messages.tell(note)
        words = [entry.words for entry in self._data.classes[: self._ways]]
        own = {arm.name: arm.method for arm in self.plan.arms}
        check_methods(loaded, own, words, self._protocol.shots, self._runtime)
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
            note_slowness(self._runtime.precision, self.plan.device, self._messages)
            if self.plan.device != self._given_device:
                # For what takes the current device unasked, as the capture of CUDA graphs does.
                torch.cuda.set_device(self.plan.device)
            about = {
                "data": self._data.name,
                "model": self._model.description,
                **versions(),
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

        return summarise(records, shown_arms(self._settings(), self.arms))

    def _run_episodes(self, folder: RunFolder) -> None:
        with folder.journal() as journal:
            if journal.note:
                self._messages.tell(journal.note)
            display = RunDisplay(
                self._messages.console,
                episodes=self.plan.episodes,
                steps={arm.name: arm.method.steps for arm in self.plan.arms},
                finished=journal.records,
            )
            trainer = Trainer(self._model, self._protocol.seed, self._runtime)
            images = image_reader(self._data, self._model.preprocess, self._reading, self._messages)
            if self._protocol.queries == ALL:
                self._messages.tell(
                    all_queries_note(
                        self._data,
                        self._protocol,
                        self._model.preprocess.shape,
                        at_once=CLASSIFIED_AT_ONCE,
                        is_cached=not self._reading.no_cache,
                    )
                )
            with display, cut_names_are_known(), self._watcher(journal) as watcher:
                for record in run_episodes(
                    self.plan,
                    self._data,
                    images,
                    trainer,
                    folder,
                    journal,
                    on_step=display.step,
                    watcher=watcher,
                ):
                    display.finished(record)
        if journal.repeats:
            self._messages.tell(
                f"{journal.repeats} results were in the journals more than once and count once: "
                f"locks in {folder.path} may not reach all machines"
            )

    @contextmanager
    def _watcher(self, journal: Journal) -> Iterator[RunWatcher | None]:
        tracking = self._options.track
        if tracking is None:
            yield None
            return
        watcher = RunWatcher(tracking, self._model, self.arms, journal.path)
        try:
            yield watcher
        finally:
            watcher.close()

    def _settings(self) -> dict[str, Any]:
        """All that decides an episode's numbers, as JSON values by the names of the settings."""
        settings = as_settings(self._protocol) | {
            "precision": self._runtime.precision,
            # As it was given: another number of processes, on other devices, may continue.
            "device": self._given_device,
            "backend": self._runtime.backend,
            "data": f"content {self._data.fingerprint[:16]}",
            "model": f"content {self._model.fingerprint[:16]}",
            "arms": {
                arm.name: {"method": arm.method.name, **as_settings(arm.method)}
                for arm in self.plan.arms
            },
        }
        # Runs from before there were these have none, and no word on them.
        if self._inputs.class_names == RAW:
            settings["class_names"] = RAW
        if self._data.group_column:
            settings["group_column"] = self._data.group_column
        if self._options.track is not None:
            settings["track"] = str(self._options.track)
        if self._reading.white_value is not None:
            settings["white_value"] = self._reading.white_value
        return settings


def note_slowness(precision: str, device: str, messages: Messages) -> None:
    """Tell the user of a type that this processor multiplies slowly."""
    if is_slow_at(precision, device):
        messages.tell(
            f"this processor has no instructions for products of {precision} numbers: "
            f"{setting('precision', 'float32')} would be faster"
        )


def _listed(inputs: Inputs) -> ImageData:
    """The data of a run: of one place, or support of one and queries of another."""
    options: dict[str, Any] = {
        "class_names": inputs.class_names,
        "images": inputs.images,
        "group_column": inputs.group_column,
    }
    if inputs.train is None or inputs.test is None:
        return load_data(inputs.data, **options)
    return load_split(inputs.train, inputs.test, **options)


def image_reader(
    data: ImageData, preprocess: Preprocess, reading: Reading, messages: Messages
) -> ImageReader:
    """The reader of a data set's images for a model, with the cache on the disk."""
    cache = None
    if not reading.no_cache:
        cache = open_cache(reading.cache, preprocess.shape, notify=messages.tell)
    return ImageReader(
        data,
        preprocess,
        cache=cache,
        skip_unreadable=reading.skip_unreadable,
        decoding=decoding_of(reading),
        notify=messages.tell,
    )


def decoding_of(reading: Reading) -> Decoding:
    """The settings of the decoder.

    Raises:
        FewShotError: There are no such settings.
    """
    with settings_named():
        return Decoding(reading.max_pixels, reading.white_value)


def usable_device(runtime: Runtime, reading: Reading, messages: Messages) -> str:
    """The device that a training takes, with a word to the user where it was chosen here.

    Raises:
        FewShotError: The backend does not run on it, or images can't be read in this way.
    """
    device, note = resolve_device(runtime.device)
    if note:
        messages.tell(note)
    decoding_of(reading)
    require_backend_here(runtime.backend, device)
    return device


def require_backend_here(backend: str, device: str) -> None:
    """Check that a backend runs on a device of this machine.

    Raises:
        FewShotError: It does not, and why.
    """
    if backend == AUTO:
        return
    with settings_named():
        error = refusal(backend, torch.device(device))
        if error is not None:
            raise error


def versions() -> dict[str, str]:
    """The versions of the packages that results depend on."""
    return {
        "tir_kernels": tir_kernels.__version__,
        "torch": torch.__version__,
        "open_clip": metadata.version("open_clip_torch"),
    }
