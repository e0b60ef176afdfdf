"""Training and classifying several episodes as one batch.

The frozen weights serve all; what a method trains has a leading dimension G, one entry an episode.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tir_kernels import towers
from tir_kernels.fewshot.episode import Episode, Images, episode_seed
from tir_kernels.fewshot.methods import Kit, Learner, Method, Observer, ParameterGroup
from tir_kernels.fewshot.settings import Runtime
from tir_kernels.fewshot.train.graph import LossLog, RepeatedStep
from tir_kernels.fewshot.train.inputs import SharedInputs
from tir_kernels.fewshot.train.memory import count_saved_bytes, packed_matrices
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
        shared: Inputs that earlier trainings on the same episodes made.
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
    shared: SharedInputs = field(default_factory=SharedInputs)

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
        support, queries = (
            _InputSet(job, learner, episodes, name) for name in ("support_images", "query_images")
        )
        support_labels = job.stacked(episodes, "support_labels").long()
        if job.class_weights is not None:
            learner.class_weights = job.class_weights.to(job.device)
        losses = _train(job, learner, support, support_labels, on_step)
        num_classes = len(episodes[0].class_names)
        support_logits, query_logits = _classify(learner, num_classes, support, queries)
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


class StepCost(NamedTuple):
    """What a training step takes.

    Args:
        kept_bytes: Bytes that its forward pass keeps, its inputs included.
        runs_image_tower: Whether the images go through the tower at every step.
    """

    kept_bytes: int
    runs_image_tower: bool


def cost_of_a_step(job: Job, episodes: Sequence[Episode]) -> StepCost:
    """The cost of a training step of a method that has some."""
    with job.learner(episodes) as learner:
        inputs = _InputSet(job, learner, episodes, "support_images").all()
        labels = job.stacked(episodes, "support_labels").long()
        with torch.no_grad():
            learner.fit(inputs, labels)
            inputs, labels = learner.training_set(inputs, labels)
        learner.train(True)
        with count_saved_bytes([*job.model.parameters(), inputs]) as count:
            learner.training_losses(inputs, labels)
        learner.train(False)
        return StepCost(count.total + inputs.nbytes, learner.inputs_kind is None)


def _train(
    job: Job, learner: Learner, images: _InputSet, labels: Tensor, on_step: StepListener | None
) -> list[list[float]]:
    """The losses of each episode; where one is not finite, those up to it."""
    learns = job.method.steps > 0 or type(learner).fit is not Learner.fit
    if not learns and not job.observers:
        return [[] for _ in labels]
    inputs = images.all()
    with torch.no_grad():
        learner.fit(inputs, labels)
    # float16 alone has too little range for gradients.
    is_scaled = job.runtime.precision == "float16"
    groups = learner.parameters()
    optimizers = [_optimizer(group, job.device, is_scaled) for group in groups]
    if not optimizers:
        _observe(job.observers, 0, learner, inputs, is_last=True)
        return [[] for _ in labels]
    scaler = torch.amp.GradScaler(job.device.type, enabled=is_scaled)

    with torch.no_grad():
        seen, seen_labels = learner.training_set(inputs, labels)
    order = batch_order(seen_labels[0], job.batch_size, job.seed, job.method.steps, job.is_balanced)
    batches = Batches(seen, seen_labels, order)

    def take_step() -> Tensor:
        losses = learner.training_losses(batches.inputs, batches.labels)
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
    with towers.packing(packed_matrices(job.model)):
        while taken < job.method.steps and not log.all_failed:
            _observe(job.observers, taken, learner, inputs)
            batches.show(taken)
            for optimizer, group in zip(optimizers, groups, strict=True):
                _set_rate(optimizer, group, taken)
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


class _InputSet:
    """The images of that name of G episodes, as a learner's inputs.

    Only those that are asked for are read, and brought to the device.
    """

    def __init__(self, job: Job, learner: Learner, episodes: Sequence[Episode], name: str) -> None:
        self._learner, self.device = learner, job.device
        self._images: list[Images] = [getattr(episode, name) for episode in episodes]
        self.counts = [len(own) for own in self._images]
        with torch.no_grad():
            shared = [job.shared.of(learner, episode, name, job.device) for episode in episodes]
        self._shared = [own for own in shared if own is not None]

    def all(self) -> Tensor:
        """(G, S, ...) of episodes that have as many images."""
        size = max(1, EMBEDDED_AT_ONCE // len(self.counts))
        return torch.cat([self.part(first, size) for first in range(0, max(self.counts), size)], 1)

    @torch.no_grad()
    def part(self, first: int, size: int) -> Tensor:
        """(G, n, ...) of up to so many images from the first one on, filled up with black ones."""
        rows = slice(first, first + size)
        if len(self._shared) == len(self.counts):
            return _one_length([own[rows] for own in self._shared])
        return self._learner.inputs(
            _one_length([own[rows] for own in self._images]).to(self.device)
        )


def _optimizer(
    group: ParameterGroup, device: torch.device, is_scaled: bool
) -> torch.optim.Optimizer:
    # PyTorch's fused SGD takes memory as it finds it for its momentum, and leaves it so if the
    # first gradients of a scaled loss overflow.
    is_fused = not (is_scaled and group.optimizer == "SGD")
    settings: dict[str, Any] = {"fused": is_fused, **group.settings}
    if group.optimizer != "SGD":  # which keeps no count of steps
        settings["capturable"] = device.type == "cuda"
    if group.schedule is not None and device.type == "cuda":  # to be changed from outside a graph
        settings["lr"] = torch.tensor(float(settings["lr"]), device=device)
    return getattr(torch.optim, group.optimizer)(group.parameters, **settings)


def _set_rate(optimizer: torch.optim.Optimizer, group: ParameterGroup, step: int) -> None:
    """Let an optimizer have the learning rate of a step, counted from 0."""
    if group.schedule is None:
        return
    rate = group.settings["lr"] * group.schedule(step)
    for own in optimizer.param_groups:
        if isinstance(own["lr"], Tensor):
            own["lr"].fill_(rate)
        else:
            own["lr"] = rate


@torch.no_grad()
def _classify(learner: Learner, num_classes: int, *sets: _InputSet) -> list[list[Tensor]]:
    """Of each set of images, for each of G episodes (Q, C) float32 logits on the CPU."""
    classes = learner.classes()

    def logits(images: _InputSet) -> list[Tensor]:
        counts = images.counts
        size = max(1, CLASSIFIED_AT_ONCE // len(counts))
        found = [
            torch.empty(len(counts), 0, num_classes, dtype=torch.float32, device=images.device)
        ]
        for first in range(0, max(counts), size):
            found.append(learner.logits(images.part(first, size), classes).float())
        together = torch.cat(found, 1).cpu()
        return [own[:count] for own, count in zip(together, counts, strict=True)]

    return [logits(images) for images in sets]


def _one_length(images: Sequence[Tensor]) -> Tensor:
    """(G, n, ...) of G times up to n images or their inputs, filled up with zeros."""
    longest = max(map(len, images))
    if all(len(own) == longest for own in images):
        return torch.stack(list(images))
    return torch.stack(
        [F.pad(own, (0, 0) * (own.dim() - 1) + (0, longest - len(own))) for own in images]
    )


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
    stack.enter_context(towers.frozen_norms(model, runtime.backend))
    stack.enter_context(towers.opened_attention(model))
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
