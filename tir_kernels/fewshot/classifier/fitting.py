"""Make a classifier from labelled images."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.classifier.about import About, BaseModel
from tir_kernels.fewshot.classifier.classifier import Classifier
from tir_kernels.fewshot.data.dataset import ImageClass, ImageData
from tir_kernels.fewshot.data.reader import ImageReader
from tir_kernels.fewshot.data.views import views_per_image, with_views
from tir_kernels.fewshot.episode import Episode, random_state
from tir_kernels.fewshot.fields import as_settings
from tir_kernels.fewshot.methods import Method, Observer
from tir_kernels.fewshot.prepare import versions
from tir_kernels.fewshot.settings import FitSettings, Runtime
from tir_kernels.fewshot.train.batch import EpisodeResult, Job, finetune_batch
from tir_kernels.fewshot.train.memory import with_one_memory_error
from tir_kernels.fewshot.train.resume import SavedTraining
from tir_kernels.text import setting
from tir_kernels.towers.loading.loaded import LoadedModel


class Keeper(Protocol):
    """Keeps what a fit has done, so that another process can go on with it."""

    def training(self, part: str) -> SavedTraining:
        """The keeper of one of its trainings."""

    def known(self, part: str) -> dict[str, Any] | None:
        """What was found by a part that is finished."""

    def finish(self, part: str, found: dict[str, Any]) -> None:
        """Keep what a part found, in place of the state of its training."""


class Support(NamedTuple):
    """The labelled images of a fit, sorted by class.

    Args:
        pixels: (S, 3, H, W) uint8 on the CPU.
        labels: (S,) int64.
        classes: Their classes, in the order of the labels.
        skipped: Images that could not be read.
        groups: The subject that each image shows, such as a patient; empty where none is known.
    """

    pixels: Tensor
    labels: Tensor
    classes: Sequence[ImageClass]
    skipped: tuple[str, ...]
    groups: tuple[str, ...] = ()

    @property
    def counts(self) -> list[int]:
        """Images of each class."""
        return torch.bincount(self.labels, minlength=len(self.classes)).tolist()

    @property
    def digests(self) -> list[str]:
        """The digests of the images, sorted."""
        return sorted(map(pixel_digest, self.pixels))

    @property
    def fingerprint(self) -> str:
        """Digest of the pixels and labels."""
        digest = hashlib.sha256(self.pixels.numpy().data)
        digest.update(self.labels.numpy().data)
        return digest.hexdigest()

    def part(self, rows: Tensor) -> Support:
        """Some of the images."""
        groups = tuple(self.groups[row] for row in rows.tolist()) if self.groups else ()
        return self._replace(pixels=self.pixels[rows], labels=self.labels[rows], groups=groups)


def pixel_digest(pixels: Tensor) -> str:
    """Digest of an image's (3, H, W) uint8 pixels: the same for its copies in any place."""
    return hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest()[:32]


def read_support(data: ImageData, images: ImageReader, shots: int | None, seed: int) -> Support:
    """Read the images that a classifier is made from.

    Args:
        data: Data, of two classes or more.
        images: Reader of its images.
        shots: Images per class, drawn by the seed; ``None``: all.
        seed: Seed of the fit.

    Raises:
        FewShotError: A class has fewer images that can be read than ``shots``, or none.
    """
    if len(data.classes) < 2:
        raise FewShotError(
            f"a classifier needs 2 classes or more, and {data.name} has {len(data.classes)}"
        )
    random = random_state(seed, 0, stream=0)
    pixels, labels, skipped = [], [], []
    groups: list[str] = []
    for label, entry in enumerate(data.classes):
        order = random.permutation(len(entry.files)).tolist()
        wanted = len(order) if shots is None else shots
        rows: list[int] = []
        while order and len(rows) < wanted:
            some, order = order[: wanted - len(rows)], order[wanted - len(rows) :]
            found = images.read_many([(entry, position) for position in some])
            for position, image in zip(some, found, strict=True):
                if image is None:
                    skipped.append(entry.files[position])
                else:
                    rows.append(position)
                    pixels.append(image)
        if len(rows) < (wanted if shots is not None else 1):
            raise FewShotError(
                f"class {entry.folder!r} in {data.name} has {len(rows)} readable images but "
                f"{wanted} are needed; add images, or lower {setting('shots')} or leave it out to "
                "take all"
            )
        labels += [label] * len(rows)
        groups += [entry.groups[row] for row in rows] if entry.groups else []
    return Support(
        torch.stack(pixels),
        torch.tensor(labels, device="cpu"),
        data.classes,
        tuple(skipped),
        tuple(groups),
    )


def require_fitting(method: Method, settings: FitSettings) -> None:
    """Check that a method can be trained with the batches and the balance of the settings.

    Raises:
        FewShotError: It can't, or sampling has no batch size.
    """
    balance = setting("balance", settings.balance)
    if settings.batch_size is not None and method.needs_all_images:
        raise FewShotError(
            f"method {method.name} compares all images with one another at every step; leave "
            f"{setting('batch_size')} out"
        )
    if settings.balance == "sampling" and not method.steps:
        raise FewShotError(
            f"{balance} draws the images of training steps, and method {method.name} has none; "
            "leave it out"
        )
    if settings.balance == "sampling" and settings.batch_size is None:
        raise FewShotError(
            f"{balance} draws the images of each step, so it needs {setting('batch_size')}"
        )
    if settings.balance == "loss" and not takes_class_weights(method):
        raise FewShotError(
            f"{balance} weights a loss, and method {method.name} has none; leave it out, or take "
            f"as many images of each class with {setting('shots')}"
        )


def takes_class_weights(method: Method) -> bool:
    """Whether a method heeds weights of the classes."""
    return method.steps > 0 or method.fit_takes_class_weights


def with_subjects(settings: FitSettings, data: ImageData) -> FitSettings:
    """Settings that name the column which the data's subjects come from, also where it is known
    by itself: who reads the data again finds the same subjects.
    """
    return replace(settings, group_column=data.group_column or settings.group_column)


def balanced_weights(labels: Tensor, num_classes: int) -> Tensor:
    """(C,) float32 weights n / (C n_c) of the classes of n labels, as "balanced" in scikit-learn.

    Every class must be there.
    """
    counts = torch.bincount(labels, minlength=num_classes)
    return len(labels) / (num_classes * counts.float())


@dataclass(frozen=True)
class Fitter:
    """All parts of a fit but its images.

    Args:
        model: The model, loaded.
        base: How to get it.
        method: The method with its options.
        settings: Settings of the fit.
        runtime: Device and types.
        keeper: Keeps what is done; ``None``: nothing is kept.
        white_value: As for the ``Decoding`` of the images.

    Raises:
        FewShotError: The method can't be trained with the balance of the settings.
    """

    model: LoadedModel
    base: BaseModel
    method: Method
    settings: FitSettings
    runtime: Runtime
    keeper: Keeper | None = None
    white_value: float | None = None

    def __post_init__(self) -> None:
        require_fitting(self.method, self.settings)

    def fit(
        self,
        support: Support,
        *,
        figures: dict[str, Any] | None = None,
        on_step: Callable[[int, float], None] | None = None,
        observers: Sequence[Observer] = (),
    ) -> Classifier:
        """Train on all of the images.

        Args:
            support: The images.
            figures: Findings of before, for the classifier's description.
            on_step: Called with the step, from 0, and its loss after each step.
            observers: Listeners between steps.

        Raises:
            FewShotError: The images, the model and the method do not go together.
            NonFiniteLossError: The loss became NaN or infinite.
            torch.OutOfMemoryError: Memory does not suffice, on a CPU too.
        """
        episode = self.episode(support)
        result = self.train("whole", episode, on_step, observers)
        own = {
            "support_accuracy": result.support_accuracy,
            "final_loss": result.losses[-1] if result.losses else None,
        }
        known = {name: each for name, each in own.items() if each is not None}
        about = About(
            labels=tuple(entry.folder for entry in support.classes),
            words=tuple(entry.words for entry in support.classes),
            method=self.method,
            base=self.base,
            seed=self.settings.seed,
            shots=episode.images_per_class,
            views=episode.views,
            precision=self.runtime.precision,
            white_value=self.white_value,
            support=tuple(support.counts),
            support_digests=tuple(support.digests),
            settings=as_settings(self.settings),
            figures={**(figures or {}), **known},
            versions=versions(),
        )
        return Classifier(about, self.model, result.trained, self.runtime)

    def episode(self, support: Support, query: Support | None = None) -> Episode:
        """Support images with their views, and images to classify, as the engine takes them."""
        preprocess, device = self.model.preprocess, self.runtime.device
        augment, pixels = self.settings.augment, support.pixels.to(device)
        views = views_per_image(augment)
        if views > 1:
            pixels = with_views(pixels, augment, random_state(self.settings.seed, 0, stream=2))
        asked = pixels[:0] if query is None else query.pixels.to(device)
        return Episode(
            class_names=[entry.words for entry in support.classes],
            support_images=preprocess.normalise(pixels),
            support_labels=support.labels.repeat_interleave(views),
            query_images=preprocess.normalise(asked),
            views_per_image=views,
        )

    def train(
        self,
        part: str,
        episode: Episode,
        on_step: Callable[[int, float], None] | None = None,
        observers: Sequence[Observer] = (),
    ) -> EpisodeResult:
        """Carry out one training, from where it was stopped if it was; raises as ``fit``."""
        episode.check()
        settings, labels = self.settings, episode.support_labels
        weights = None
        if settings.balance == "loss":
            weights = balanced_weights(labels, len(episode.class_names))
        job = Job(
            self.model.model,
            self.model.tokenizer,
            self.method,
            settings.seed,
            self.runtime,
            observers,
            saved=None if self.keeper is None else self.keeper.training(part),
            batch_size=settings.batch_size,
            class_weights=weights,
            is_balanced=settings.balance == "sampling",
        )

        def note_step(position: int, step: int, loss: float) -> None:
            if on_step is not None:
                on_step(step, loss)

        with with_one_memory_error():
            (result,) = finetune_batch(job, [episode], note_step)
        if not isinstance(result, EpisodeResult):
            raise result
        return result

    def of_method(self, method: Method) -> Fitter:
        """The same with another method, of which nothing is kept."""
        settings = replace(self.settings, balance="none")
        return replace(self, method=method, settings=settings, keeper=None)
