"""A fit that survives being stopped: from checked options to a classifier in its folder."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.classifier.about import About, BaseModel
from tir_kernels.fewshot.classifier.expected import expected_accuracy, number_of_folds
from tir_kernels.fewshot.classifier.figures import imbalance_note
from tir_kernels.fewshot.classifier.fit_display import FitDisplay
from tir_kernels.fewshot.classifier.fit_folder import FitFolder, room_asked_for
from tir_kernels.fewshot.classifier.fitting import (
    Fitter,
    Support,
    read_support,
    require_fitting,
    takes_class_weights,
    with_subjects,
)
from tir_kernels.fewshot.classifier.folder import load_classifier, save_classifier
from tir_kernels.fewshot.data.dataset import load_data
from tir_kernels.fewshot.data.words import RAW
from tir_kernels.fewshot.fields import as_settings
from tir_kernels.fewshot.known_template import method_with_known_template
from tir_kernels.fewshot.method_check import check_methods
from tir_kernels.fewshot.methods import Method
from tir_kernels.fewshot.prepare import image_reader, note_slowness, usable_device, versions
from tir_kernels.fewshot.prompt_check import check_prompts, cut_names_are_known
from tir_kernels.fewshot.resizing import with_resize
from tir_kernels.fewshot.run.progress import Messages
from tir_kernels.fewshot.run.records import OK, Record
from tir_kernels.fewshot.run.tracked import Track, TrackFile
from tir_kernels.fewshot.run_options import Inputs, Reading
from tir_kernels.fewshot.settings import FitSettings, Runtime
from tir_kernels.fewshot.track.settings import Tracking
from tir_kernels.fewshot.track.tracker import Tracker
from tir_kernels.fewshot.train.batch import NonFiniteLossError
from tir_kernels.fewshot.train.memory import engine_errors_explained
from tir_kernels.text import setting
from tir_kernels.towers.loading import models
from tir_kernels.towers.loading.loaded import LoadedModel

NOT_HELD_OUT = "no held-out images"


@dataclass(frozen=True)
class FitOptions:
    """The options of a fit besides its data, model, settings and runtime.

    Args:
        out: Folder of the classifier.
        method: The method with its options.
        track: What is read of the training on all images; ``None``: nothing.
    """

    out: str
    method: Method
    track: Tracking | None = None


@dataclass(frozen=True)
class Fitted:
    """A classifier in its folder.

    Args:
        about: Its settings and findings.
        path: The folder.
        tracked: Folder with what was tracked, in the form of a run; ``None``: nothing was.
        was_finished: Whether it was there already.
    """

    about: About
    path: Path
    tracked: Path | None
    was_finished: bool


class PreparedFit:
    """A fit whose settings are checked and whose images are listed.

    Args:
        options: Folder, method and tracking.
        inputs: Data and model.
        reading: The way in which images are read.
        settings: Settings of the fit.
        runtime: Device and types.
        messages: Voice that tells the user things.

    Raises:
        FewShotError: A setting can't be used, or the data can't.
    """

    def __init__(
        self,
        options: FitOptions,
        inputs: Inputs,
        reading: Reading,
        settings: FitSettings,
        runtime: Runtime,
        messages: Messages,
    ) -> None:
        require_fitting(options.method, settings)
        self._inputs, self._reading, self._messages = inputs, reading, messages
        device = usable_device(runtime, reading, messages)
        self._runtime = replace(runtime, device=device)
        with messages.status("listing the images"):
            self._data = load_data(
                inputs.data,
                class_names=inputs.class_names,
                images=inputs.images,
                group_column=settings.group_column,
            )
        self._fit_settings = with_subjects(settings, self._data)
        method = method_with_known_template(options.method, self._data)
        self._options = replace(options, method=method)
        for note in self._data.notes:
            messages.tell(note)

    def run(self) -> Fitted:
        """Do what is left of the fit, and write the classifier.

        Raises:
            FewShotError: The folder belongs to another fit or is in use, something in it can't be
                written, an image can't be read, memory runs out, or the loss became NaN.
        """
        with FitFolder(self._options.out) as folder:
            loaded = self._load_model()
            about = {
                "data": self._data.name.rstrip("/").rsplit("/", 1)[-1],
                "model": loaded.description,
                **versions(),
            }
            folder.claim(self._settings(loaded), about)
            tracked = folder.kept if self._options.track is not None else None
            if folder.is_finished:
                try:
                    made = load_classifier(folder.path, runtime=self._runtime, loaded=loaded)
                    folder.finish()
                    return Fitted(made.about, folder.path, tracked, was_finished=True)
                except FewShotError as error:
                    self._messages.tell(f"{error.notice.marked}: it is made anew")
            note_slowness(self._runtime.precision, self._runtime.device, self._messages)
            with _explained(self._runtime.device, self._fit_settings):
                made_about = self._make(folder, loaded)
            return Fitted(made_about, folder.path, tracked, was_finished=False)

    def _load_model(self) -> LoadedModel:
        with self._messages.status("loading the model"):
            loaded = models.load_model(
                self._inputs.model, self._inputs.pretrained, device=self._runtime.device
            )
        loaded = with_resize(loaded, self._fit_settings.resize)
        method = self._options.method
        cut = check_prompts(self._data, loaded.tokenizer, [method])
        for note in (*loaded.notes, *cut):
            self._messages.tell(note)
        words = [entry.words for entry in self._data.classes]
        # Where all images are taken, their number is not known yet: more than one.
        shots = self._fit_settings.shots or 2
        check_methods(loaded, {method.name: method}, words, shots, self._runtime)
        return loaded

    def _read_support(self, loaded: LoadedModel) -> Support:
        settings = self._fit_settings
        images = image_reader(self._data, loaded.preprocess, self._reading, self._messages)
        with self._messages.status("reading the images"):
            support = read_support(self._data, images, settings.shots, settings.seed)
        if support.skipped:
            self._messages.tell(
                f"unreadable images that were skipped: {', '.join(support.skipped)}"
            )
        labels = [entry.folder for entry in support.classes]
        note = imbalance_note(labels, support.counts, takes_class_weights(self._options.method))
        if note is not None and settings.balance == "none":
            self._messages.tell(note)
        return support

    def _make(self, folder: FitFolder, loaded: LoadedModel) -> About:
        """Carry out the trainings that are left, and save what they give."""
        options = self._options
        support = self._read_support(loaded)
        tracker = _KeptTracker(options.track, loaded, options.method.name)
        keeper = folder.keeper(support.fingerprint, tracker.seen, tracker.see_again)
        base = BaseModel.of(self._inputs.model, self._inputs.pretrained, loaded)
        settings, white_value = self._fit_settings, self._reading.white_value
        fitter = Fitter(loaded, base, options.method, settings, self._runtime, keeper, white_value)
        folds = number_of_folds(fitter, support)
        display = FitDisplay(self._messages.console, folds, options.method.steps)
        with display, cut_names_are_known():
            figures = expected_accuracy(fitter, support, display)
            begun = time.monotonic()
            made = fitter.fit(
                support,
                figures=figures,
                on_step=display.step_of_all,
                observers=tracker.observers,
            )
            display.finished_all(len(support.labels))
        if tracker.observers:
            self._keep_tracked(folder, tracker.track(), made.about, time.monotonic() - begun)
        with room_asked_for():
            save_classifier(made, folder.path)
        folder.finish()
        return made.about

    def _keep_tracked(
        self, folder: FitFolder, track: Track | None, about: About, seconds: float
    ) -> None:
        """Have what was seen in the folder, as a run of one episode has it.

        Its accuracy is the held-out estimate, since no other images were classified.
        """
        figures = about.figures
        total = figures.get("held_out_images", 0)
        accuracy = figures.get("held_out_accuracy")
        with folder.as_run.journal() as journal:
            if (0, about.method.name) in journal:
                return
            if track is not None:
                file = TrackFile(journal.path)
                file.append(track)
                file.close()
            journal.append(
                Record(
                    episode=0,
                    arm=about.method.name,
                    classes=about.labels,
                    correct=None if accuracy is None else round(accuracy * total),
                    total=total,
                    accuracy=accuracy,
                    final_loss=figures.get("final_loss"),
                    seconds=seconds,
                    status=NOT_HELD_OUT if accuracy is None else OK,
                    support_accuracy=figures["support_accuracy"],
                )
            )

    def _settings(self, loaded: LoadedModel) -> dict[str, Any]:
        """All that decides the classifier's numbers, as JSON values by the settings' names."""
        method, track = self._options.method, self._options.track
        settings = as_settings(self._fit_settings) | {
            "precision": self._runtime.precision,
            "device": self._runtime.device,
            "backend": self._runtime.backend,
            "data": f"content {self._data.fingerprint[:16]}",
            "model": f"content {loaded.fingerprint[:16]}",
            "arms": {method.name: {"method": method.name, **as_settings(method)}},
            "track": None if track is None else str(track),
            "white_value": self._reading.white_value,
            "class_names": RAW if self._inputs.class_names == RAW else None,
        }
        return {name: value for name, value in settings.items() if value is not None}


class _KeptTracker:
    """A tracker of the training on all images, whose readings outlive the process."""

    def __init__(self, tracking: Tracking | None, loaded: LoadedModel, arm: str) -> None:
        self._arm = arm
        self.observers: tuple[Tracker, ...] = ()
        if tracking is not None:
            self.observers = (Tracker(loaded.model, tracking.every, tracking.measures),)

    def track(self) -> Track | None:
        """All that was read."""
        for tracker in self.observers:
            return tracker.track(0, self._arm)
        return None

    def seen(self) -> str | None:
        """What was read, to be kept."""
        track = self.track()
        return None if track is None else track.to_line().decode()

    def see_again(self, seen: str | None) -> None:
        """Go on behind what was kept."""
        for tracker in self.observers:
            if seen is not None:
                tracker.resume(Track.from_line(seen.encode()))


@contextmanager
def _explained(device: str, settings: FitSettings) -> Iterator[None]:
    try:
        with engine_errors_explained():
            yield
    except torch.OutOfMemoryError as error:
        step = "lower" if settings.batch_size else "set"
        raise FewShotError(
            f"out of memory on {device}; use {setting('checkpoint')} and give the same command "
            f"again, which goes on from what is finished; or with another {setting('out')}, {step} "
            f"{setting('batch_size')}, take fewer {setting('shots')}, or use "
            f"{setting('precision', 'bfloat16')}"
        ) from error
    except NonFiniteLossError as error:
        raise FewShotError(
            f"the loss became {error.losses[-1]} at step {error.step + 1}: lower "
            f"{setting('lora_lr')} or {setting('context_lr')}, or use "
            f"{setting('precision', 'float32')}, with another {setting('out')}"
        ) from error
