"""Training and classifying several episodes as one batch.

The frozen weights serve all; what a method trains has a leading dimension G, one entry an episode.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tir_kernels import towers
from tir_kernels.fewshot.episode import Episode, Images, episode_seed
from tir_kernels.fewshot.methods import Kit, Learner, Method, Observer
from tir_kernels.fewshot.settings import Runtime
from tir_kernels.fewshot.train.graph import LossLog, RepeatedStep
from tir_kernels.fewshot.train.memory import count_saved_bytes
from tir_kernels.fewshot.train.resume import Batches, SavedTraining, TrainingState, batch_order

CLASSIFIED_AT_ONCE = 64  # images
EMBEDDED_AT_ONCE = 1024


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite.

    Attributes:
        step: The step, counted from 0, whose loss it was.
        losses: The losses of all steps up to and with that one.
    """

    def __init__(self, step: int, losses: list[float]) -> None:
        super().__init__(
            f"the loss became {losses[-1]} at step {step + 1}: lower the learning rates, or use "
            "precision='float32'"
        )
        self.step = step
        self.losses = losses


@dataclass(frozen=True)
class EpisodeResult:
    """The result of fine-tuning on an episode; all tensors are float32 on the CPU.

    Attributes:
        losses: One per step, each before that step's update; empty for a method without steps.
        query_logits: (Q, C) in evaluation mode.
        support_accuracy: Share of the support images classified rightly at the end, in [0, 1].
        trained: Name -> tensor of all that was learned, by the names of the method.
    """

    losses: list[float]
    query_logits: Tensor
    support_accuracy: float
    trained: dict[str, Tensor] = field(default_factory=dict)


StepListener = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Job:
    """Everything that decides a training but its episodes.

    Args:
        saved: Keeper of an unfinished training's state, from which it goes on.
        batch_size: Support images of each step, drawn in turn; ``None``: all of them.
        class_weights: (C,) weights of the classes' images in the loss; ``None``: all are 1.
        is_balanced: Whether the images of a step are of all classes alike; needs ``batch_size``.
    """

    model: nn.Module
    tokenizer: Callable[[list[str]], Tensor]
    method: Method
    seed: int
    runtime: Runtime
    observers: Sequence[Observer] = ()
    saved: SavedTraining | None = None
    batch_size: int | None = None
    class_weights: Tensor | None = None
    is_balanced: bool = False

    @property
    def device(self) -> torch.device:
        return torch.device(self.runtime.device)

    @contextmanager
    def learner(self, episodes: Sequence[Episode]) -> Iterator[Learner]:
        """The method's learner for episodes of one shape, on the model prepared for it."""
        with ExitStack() as stack:
            _prepare(stack, self.model, self.runtime)
            kit = Kit(
                model=self.model,
                tokenizer=self.tokenizer,
                encoder=towers.ImageEncoder(self.model, checkpoint=self.runtime.checkpoint),
                class_names=[episode.class_names for episode in episodes],
                seeds=[episode_seed(self.seed, episode.index) for episode in episodes],
                shots=episodes[0].images_per_class,
                views=episodes[0].views,
                backend=self.runtime.backend,
            )
            yield stack.enter_context(self.method.start(kit))

    def stacked(self, episodes: Sequence[Episode], name: str) -> Tensor:
        """(G, ...) of the tensors of that name, on the device."""
        return torch.stack([getattr(episode, name) for episode in episodes]).to(self.device)


def finetune_batch(
    job: Job, episodes: Sequence[Episode], on_step: StepListener | None
) -> list[EpisodeResult | NonFiniteLossError]:
    """Results of episodes of one shape, trained at once."""
    for observer in job.observers:
        observer.start(episodes)
    with job.learner(episodes) as learner:
        support_images = job.stacked(episodes, "support_images")
        support_labels = job.stacked(episodes, "support_labels").long()
        if job.class_weights is not None:
            learner.class_weights = job.class_weights.to(job.device)
        losses = _train(job, learner, support_images, support_labels, on_step)
        num_classes = len(episodes[0].class_names)
        support_logits, query_logits = _classify(
            learner,
            num_classes,
            support_images,
            [episode.query_images for episode in episodes],
            device=job.device,
        )
        correct = torch.stack(support_logits).argmax(2) == support_labels.cpu()
        results: list[EpisodeResult | NonFiniteLossError] = []
        for index, own in enumerate(losses):
            if own and not math.isfinite(own[-1]):
                results.append(NonFiniteLossError(len(own) - 1, own))
                continue
            results.append(
                EpisodeResult(
                    losses=own,
                    query_logits=query_logits[index],
                    support_accuracy=correct[index].float().mean().item(),
                    trained={
                        name: tensor.detach()[index].float().cpu().clone()
                        for name, tensor in learner.trained().items()
                    },
                )
            )
        return results


def bytes_of_a_step(job: Job, episodes: Sequence[Episode]) -> int:
    """The bytes that the forward pass of a training step keeps; 0 for a method without steps."""
    with job.learner(episodes) as learner:
        if not learner.parameters():
            return 0
        inputs = _frozen_inputs(learner, job.stacked(episodes, "support_images"))
        labels = job.stacked(episodes, "support_labels").long()
        with torch.no_grad():
            learner.fit(inputs, labels)
        learner.train(True)
        with count_saved_bytes([*job.model.parameters(), inputs]) as count:
            _losses(learner, inputs, labels)
        learner.train(False)
        return count.total + inputs.nbytes


def _train(
    job: Job, learner: Learner, images: Tensor, labels: Tensor, on_step: StepListener | None
) -> list[list[float]]:
    """The losses of each episode; where one is not finite, those up to it."""
    optimizers = _optimizers(learner, job.device)
    learns = bool(optimizers) or type(learner).fit is not Learner.fit
    if not learns and not job.observers:
        return [[] for _ in labels]
    inputs = _frozen_inputs(learner, images)
    with torch.no_grad():
        learner.fit(inputs, labels)
    if not optimizers:
        _observe(job.observers, 0, learner, inputs, is_last=True)
        return [[] for _ in labels]
    # float16 alone has too little range for gradients.
    is_scaled = job.runtime.precision == "float16"
    scaler = torch.amp.GradScaler(job.device.type, enabled=is_scaled)

    order = batch_order(labels[0], job.batch_size, job.seed, job.method.steps, job.is_balanced)
    batches = Batches(inputs, labels, order)

    def take_step() -> Tensor:
        losses = _losses(learner, batches.inputs, batches.labels)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        # Each episode's gradients are those of its own loss: a sum keeps them apart.
        scaler.scale(losses.sum()).backward()
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        learner.next_step()
        return losses.detach()

    # A gradient scaler looks at the gradients' values, which a graph can't.
    step = RepeatedStep(take_step, job.device, as_graph=not is_scaled)
    log = LossLog(len(labels), on_step)
    taken = 0
    state = TrainingState(learner, optimizers, scaler, log)
    if job.saved is not None and (known := job.saved.load()) is not None:
        taken = state.restore(known)
    learner.train(True)
    while taken < job.method.steps and not log.all_failed:
        _observe(job.observers, taken, learner, inputs)
        batches.show(taken)
        log.add(step())
        taken += 1
        is_end = taken == job.method.steps
        if job.saved is not None and (is_end or job.saved.is_due()):
            job.saved.keep(state.take(taken))
    learner.train(False)
    _observe(job.observers, taken, learner, inputs, is_last=True)
    return log.finish()


def _observe(
    observers: Sequence[Observer],
    step: int,
    learner: Learner,
    inputs: Tensor,
    is_last: bool = False,
) -> None:
    due = [observer for observer in observers if is_last or step % observer.every == 0]
    if not due:
        return
    learner.train(False)
    with torch.no_grad():
        for observer in due:
            observer.observe(step, learner, inputs)
    learner.train(not is_last)


@torch.no_grad()
def _frozen_inputs(learner: Learner, images: Tensor) -> Tensor:
    size = max(1, EMBEDDED_AT_ONCE // len(images))
    if images.shape[1] <= size:
        return learner.inputs(images)
    return torch.cat([learner.inputs(each) for each in images.split(size, 1)], 1)


def _losses(learner: Learner, inputs: Tensor, labels: Tensor) -> Tensor:
    return learner.loss(learner.logits(inputs, learner.classes()), labels)


def _optimizers(learner: Learner, device: torch.device) -> list[torch.optim.Optimizer]:
    optimizers = []
    for group in learner.parameters():
        settings: dict[str, Any] = {"fused": True, **group.settings}
        if group.optimizer != "SGD":  # which keeps no count of steps
            settings["capturable"] = device.type == "cuda"
        optimizers.append(getattr(torch.optim, group.optimizer)(group.parameters, **settings))
    return optimizers


@torch.no_grad()
def _classify(
    learner: Learner,
    num_classes: int,
    *image_sets: Sequence[Images] | Tensor,
    device: torch.device,
) -> list[list[Tensor]]:
    """Of each set of images, for each of G episodes (Q, C) float32 logits on the CPU.

    Only the images of a batch are asked for at once, and brought to the device.
    """
    classes = learner.classes()

    def logits(images: Sequence[Images]) -> list[Tensor]:
        counts = [len(own) for own in images]
        size = max(1, CLASSIFIED_AT_ONCE // len(counts))
        found = [torch.empty(len(counts), 0, num_classes, dtype=torch.float32, device=device)]
        for first in range(0, max(counts), size):
            batch = _one_length([own[first : first + size] for own in images])
            inputs = learner.inputs(batch.to(device))
            found.append(learner.logits(inputs, classes).float())
        together = torch.cat(found, 1).cpu()
        return [own[:count] for own, count in zip(together, counts, strict=True)]

    return [logits(list(images)) for images in image_sets]


def _one_length(images: Sequence[Tensor]) -> Tensor:
    """(G, n, 3, H, W) of G times up to n images, filled up with black ones."""
    longest = max(map(len, images))
    if all(len(own) == longest for own in images):
        return torch.stack(list(images))
    return torch.stack([F.pad(own, (0, 0) * 3 + (0, longest - len(own))) for own in images])


def _prepare(stack: ExitStack, model: nn.Module, runtime: Runtime) -> None:
    """Bring the model into the state in which it is trained, until the stack unwinds."""
    device = torch.device(runtime.device)
    # Whatever the caller is in the midst of.
    stack.enter_context(torch.inference_mode(False))
    stack.enter_context(torch.enable_grad())
    stack.enter_context(torch.autocast(device.type, enabled=False))
    stack.enter_context(_in_evaluation_mode(model))
    stack.enter_context(frozen(model))
    cuda_devices = [device] if device.type == "cuda" else []
    stack.enter_context(torch.random.fork_rng(devices=cuda_devices))
    stack.enter_context(towers.frozen_mlps(model, runtime.backend))
    if runtime.precision != "float32":
        dtype = getattr(torch, runtime.precision)
        # What autocast remembered from the steps before would not be part of a step's graph.
        stack.enter_context(torch.autocast(device.type, dtype=dtype, cache_enabled=False))
        stack.enter_context(towers.cast_blocks(model, dtype))


@contextmanager
def _in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Let the model's own parameters have no gradients; in the end all is as it was."""
    before = [
        (parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()
    ]
    for parameter, _, _ in before:
        parameter.requires_grad_(False)
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, was_trainable, gradient in before:
            parameter.requires_grad_(was_trainable)
            parameter.grad = gradient
