"""A classifier in use: a base model, what was learned on top of it, and its classes."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tir_kernels import towers
from tir_kernels.adapters import loras_of
from tir_kernels.adapters.merging import merged_lora
from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.classifier.about import About
from tir_kernels.fewshot.data.decoding import Decoding
from tir_kernels.fewshot.data.rgb import UnreadableImageError
from tir_kernels.fewshot.episode import Episode
from tir_kernels.fewshot.methods import Learner
from tir_kernels.fewshot.methods.lora import factors_in
from tir_kernels.fewshot.settings import Runtime
from tir_kernels.fewshot.train.batch import Job
from tir_kernels.fewshot.train.memory import packed_matrices
from tir_kernels.towers.loading.loaded import LoadedModel


class Scorer:
    """A classifier whose parts are on the model, so that batch after batch costs no set-up.

    Args:
        learner: The learner of one episode, restored.
        device: Device of the model.
    """

    def __init__(self, learner: Learner, device: torch.device) -> None:
        self._learner = learner
        self._device = device
        self._classes = learner.classes()

    def logits(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) float32 input of the model -> (N, C) float32 logits on the CPU.

        Each image's are its own, up to rounding: no other image of the batch plays a part.
        """
        return self.begin(images)()

    def begin(self, images: Tensor) -> Callable[[], Tensor]:
        """As ``logits``, of which the call of what is returned waits for the numbers.

        A GPU works on them meanwhile; another batch may be begun before.
        """
        with torch.no_grad():
            inputs = self._learner.inputs(images.to(self._device, non_blocking=True)[None])
            logits = self._learner.logits(inputs, self._classes)[0].float()
        if not logits.is_cuda:
            found = logits.cpu()
            return lambda: found
        host = torch.empty(logits.shape, dtype=logits.dtype, device="cpu", pin_memory=True)
        host.copy_(logits, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()

        def wait() -> Tensor:
            copied.synchronize()
            return host

        return wait


class Classifier:
    """A base model with what a method learned from a few labelled images.

    Made by ``fewshot.fit`` and ``fewshot.load_classifier``. The model is left as it is but while
    the classifier is open.

    Args:
        about: Settings and findings.
        model: The base model, loaded.
        learned: Name -> tensor of all that was learned, float32 on the CPU.
        runtime: Device and types.

    Attributes:
        about, model, learned, runtime: As given.
    """

    def __init__(
        self,
        about: About,
        model: LoadedModel,
        learned: Mapping[str, Tensor],
        runtime: Runtime,
    ) -> None:
        self.about = about
        self.model = model
        self.learned = dict(learned)
        self.runtime = runtime

    @property
    def labels(self) -> tuple[str, ...]:
        """The C classes by their names in the data, in the order of the logits."""
        return self.about.labels

    @contextmanager
    def learner(self) -> Iterator[Learner]:
        """The method's learner with what it has learned, on the model until the context ends."""
        about, device = self.about, torch.device(self.runtime.device)
        none = torch.empty(0, *self.model.preprocess.shape, device="cpu")
        shape = Episode(
            list(about.words),
            none,
            torch.empty(0, dtype=torch.int64, device="cpu"),
            none,
            shots=about.shots,
            views_per_image=about.views,
        )
        job = Job(self.model.model, self.model.tokenizer, about.method, about.seed, self.runtime)
        with job.learner([shape]) as learner, torch.no_grad():
            learner.restore({name: each[None].to(device) for name, each in self.learned.items()})
            learner.train(False)
            yield learner

    @contextmanager
    def open(self) -> Iterator[Scorer]:
        """The classifier ready for many batches, on the model until the context ends.

        LoRA's change is in the weights themselves, which costs nothing in each batch, and these
        are packed once on a CPU.
        """
        model = self.model.model
        with self.merged_lora(), self.learner() as learner:
            for lora in loras_of(model):
                lora.remove()
            scorer = Scorer(learner, torch.device(self.runtime.device))
            with towers.packing(packed_matrices(model, forms=1)):
                yield scorer

    def merged_lora(self) -> AbstractContextManager[object]:
        """The changes that LoRA has learned, if any, in the base model's weights for a while."""
        a, b = factors_in(self.learned)
        if not a:
            return nullcontext()
        method: Any = self.about.method
        return merged_lora(self.model.model, method.lora_rank, method.lora_alpha, a, b)

    def predict(
        self,
        images: Sequence[str | os.PathLike[str] | Image.Image] | Tensor,
        batch_size: int = 64,
    ) -> Tensor:
        """Probabilities of the classes for images.

        Args:
            images: Files' paths or Pillow's images; or a tensor (N, 3, H, W), float32 as the
                model's preprocessing gives it.
            batch_size: Images that are classified at once.

        Returns:
            (N, C) float32 on the CPU, C in the order of ``labels``.

        Raises:
            FewShotError: An image can't be read.
            ValueError, TypeError: ``images`` are something else, or ``batch_size`` is below 1.
        """
        if isinstance(images, (str, os.PathLike, Image.Image)):
            raise TypeError("images must be a sequence of images; pass [image] for a single one")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}")
        shape = self.model.preprocess.shape
        if isinstance(images, Tensor) and (images.dim() != 4 or images.shape[1:] != shape):
            raise ValueError(
                f"images must have shape (N, {', '.join(map(str, shape))}), as the model's "
                f"preprocessing gives them; got {tuple(images.shape)}"
            )
        parts = []
        with self.open() as scorer:
            for first in range(0, len(images), batch_size):
                some = images[first : first + batch_size]
                batch = some if isinstance(some, Tensor) else self._inputs(some)
                parts.append(self.probabilities(scorer.logits(batch)))
        empty = torch.empty(0, len(self.labels), dtype=torch.float32, device="cpu")
        return torch.cat([empty, *parts])

    def probabilities(self, logits: Tensor) -> Tensor:
        """(N, C) probabilities of logits, by the softmax at the classifier's temperature."""
        return (logits / self.about.temperature).softmax(-1)

    def with_precision(self, precision: str) -> Classifier:
        """The same classifier with products of another type."""
        runtime = replace(self.runtime, precision=precision)
        return Classifier(self.about, self.model, self.learned, runtime)

    def save(self, path: str | os.PathLike[str], include_base: bool = False) -> None:
        """Write the classifier into a folder; see ``folder.save_classifier``."""
        from tir_kernels.fewshot.classifier.folder import save_classifier

        save_classifier(self, path, include_base)

    def _inputs(self, images: Sequence[str | os.PathLike[str] | Image.Image]) -> Tensor:
        preprocess = self.model.preprocess
        decoding = Decoding(white_value=self.about.white_value)
        pixels = torch.stack([preprocess.to_pixels(_rgb(image, decoding)) for image in images])
        return preprocess.normalise(pixels)


def _rgb(image: str | os.PathLike[str] | Image.Image, decoding: Decoding) -> Image.Image:
    if isinstance(image, Image.Image):
        if image.mode == "RGB":
            return image
        # As the same image in a file is read: TIFF holds all of Pillow's modes without loss.
        file = io.BytesIO()
        image.save(file, "TIFF")
        return decoding.decode(file)[0]
    if not isinstance(image, (str, os.PathLike)):
        raise TypeError(
            "images must hold paths or Pillow's images, or be one tensor; got "
            f"{type(image).__name__}"
        )
    try:
        return decoding.decode(Path(image))[0]
    except (UnreadableImageError, OSError) as error:
        raise FewShotError(f"can't read the image {Path(image)}: {error}") from error
