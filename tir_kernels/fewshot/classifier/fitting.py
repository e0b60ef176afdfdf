"""Make a classifier from labelled images."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

import tir_kernels
from tir_kernels.errors import FewShotError
from tir_kernels.fewshot import fields
from tir_kernels.fewshot.classifier.about import About, BaseModel
from tir_kernels.fewshot.classifier.classifier import Classifier
from tir_kernels.fewshot.data.dataset import ImageClass, ImageData
from tir_kernels.fewshot.data.reader import ImageReader
from tir_kernels.fewshot.data.views import with_views
from tir_kernels.fewshot.episode import Episode, random_state
from tir_kernels.fewshot.methods import Method, Observer
from tir_kernels.fewshot.settings import Checked, Runtime
from tir_kernels.fewshot.train.batch import EpisodeResult, Job, finetune_batch
from tir_kernels.fewshot.train.memory import with_one_memory_error
from tir_kernels.fewshot.train.resume import SavedTraining
from tir_kernels.text import setting
from tir_kernels.towers.loading.models import LoadedModel


@dataclass(frozen=True)
class FitSettings(Checked):
    """All that decides a fit besides its data, model, method and types."""

    shots: int | None = fields.whole(
        None,
        "Labelled images per class, drawn by the seed; unset: all.",
        least=1,
        most=10**6,
        reason="no class has as many images",
    )
    seed: int = fields.whole(
        0,
        "Seed of the choice of images, and of the method's initialisation and dropout.",
        least=0,
        most=2**63 - 1,
        reason="generators take 63 bits",
    )
    augment: int = fields.whole(
        0,
        "Train on this many views of each image beside the image itself; 0 for none.",
        least=0,
        most=1000,
        reason="so many views of one image are the same views again",
    )
    batch_size: int | None = fields.whole(
        None,
        "Images of each training step, every image once before any comes again; unset: all images "
        "at every step, as the methods were published.",
        least=1,
        most=10**6,
        reason="no step takes as many",
    )
    folds: int = fields.whole(
        5,
        "Parts of the labelled images that are held out in turn, each in a training without it, "
        "to estimate the accuracy on images that were not trained on; 0 for no estimate.",
        least=0,
        most=1000,
        reason="each is a training of its own",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.folds == 1:
            raise ValueError("folds must be 0, or at least 2; got 1")


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
    """

    pixels: Tensor
    labels: Tensor
    classes: Sequence[ImageClass]
    skipped: tuple[str, ...]

    def part(self, rows: Tensor) -> Support:
        """Some of the images."""
        return self._replace(pixels=self.pixels[rows], labels=self.labels[rows])


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
    return Support(
        torch.stack(pixels), torch.tensor(labels, device="cpu"), data.classes, tuple(skipped)
    )


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
    """

    model: LoadedModel
    base: BaseModel
    method: Method
    settings: FitSettings
    runtime: Runtime
    keeper: Keeper | None = None

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
        begun = time.monotonic()
        episode = self.episode(support)
        result = self.train("whole", episode, on_step, observers)
        own = {
            "support_accuracy": result.support_accuracy,
            "final_loss": result.losses[-1] if result.losses else None,
            "training_seconds": round(time.monotonic() - begun, 1),
        }
        known = {name: each for name, each in own.items() if each is not None}
        counts = torch.bincount(support.labels, minlength=len(support.classes)).tolist()
        about = About(
            labels=tuple(entry.folder for entry in support.classes),
            words=tuple(entry.words for entry in support.classes),
            method=self.method,
            base=self.base,
            seed=self.settings.seed,
            shots=episode.images_per_class,
            views=episode.views,
            precision=self.runtime.precision,
            support=tuple(counts),
            figures={**(figures or {}), **known},
            versions={
                "tir_kernels": tir_kernels.__version__,
                "torch": torch.__version__,
                "open_clip": metadata.version("open_clip_torch"),
            },
        )
        return Classifier(about, self.model, result.trained, self.runtime)

    def episode(self, support: Support, query: Support | None = None) -> Episode:
        """Support images with their views, and images to classify, as the engine takes them."""
        preprocess, device = self.model.preprocess, self.runtime.device
        pixels, views = support.pixels.to(device), 1 + self.settings.augment
        if views > 1:
            pixels = with_views(pixels, views - 1, random_state(self.settings.seed, 0, stream=2))
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
        job = Job(
            self.model.model,
            self.model.tokenizer,
            self.method,
            self.settings.seed,
            self.runtime,
            observers,
            None if self.keeper is None else self.keeper.training(part),
            self.settings.batch_size,
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
        return replace(self, method=method, keeper=None)
