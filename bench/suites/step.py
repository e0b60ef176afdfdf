"""A whole fine-tuning step of a CLIP model with random weights: both towers, LoRA, prompt context.

To add an implementation, write a function ``(problem, training, steps) -> StepRun`` and name it in
:func:`implementations`.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bench.cases import Case, Implementation, SuiteUnavailableError, WrongResultError
from bench.clip_model import DEFAULT_MODEL, ClipSizes, load_sizes, make_model, make_tokenizer
from bench.counting import Cost, step_cost
from bench.peers.common import EAGER
from bench.settings import OURS, PUBLISHED, Settings
from bench.shapes import Point, points
from bench.timing import Call

from .common import SECOND, THIRD
from .step_timing import StepRun, measure_for

if TYPE_CHECKING:
    from bench.training import Training

STEP = "fine-tuning step"
UNWEIGHTED = "sdpa unweighted"
CLASS_NAMES = ("annual crop", "forest", "highway", "river", "sea or lake")

# A share, of a loss at _CHECKED_SCALE; rounding turns selections, and with them the loss a little.
_ALLOWED_LOSS_ERROR = {"float32": 0.01, "bfloat16": 0.04, "float16": 0.04}
_CHECKED_SCALE = 100.0  # of the cosines; at the method's own all losses are near log(C)
_AT_ONCE = (1, 2, 4)  # episodes
# What optimisers keep is there from the second step on; a CUDA graph is made after the third.
STEPS_OF_PEAK = {"cpu": 2, "cuda": 5}


@dataclass(frozen=True)
class StepProblem:
    """The tensors that all implementations train on.

    Attributes:
        model: open_clip's, frozen, in evaluation mode.
        tokenizer: Its tokenizer.
        class_names: C names.
        images: (S, 3, H, W).
        labels: (S,).
        exact_losses: (method, placement) -> first loss in float64, as far as computed.
    """

    model: nn.Module
    tokenizer: Callable[[list[str]], Tensor]
    class_names: Sequence[str]
    images: Tensor
    labels: Tensor
    exact_losses: dict[tuple[str, str], float] = field(default_factory=dict)


RunSteps = Callable[[StepProblem, "Training", int], StepRun]


@dataclass(frozen=True)
class StepImplementation:
    """Name, settings, how it runs, and why it cannot if it cannot."""

    name: str
    training: Training
    run: RunSteps
    unavailable: str = ""

    def prepare(self, problem: StepProblem) -> Call:
        """A call that takes a number of steps, once its first loss is found right."""
        training = checked(self.training)
        for loss in self.run(problem, training, 1).first_losses:
            verify_first_loss(loss, problem, training)
        return functools.partial(self.run, problem, self.training)

    def competing(self) -> Implementation:
        """The implementation in the form that the runner wants."""
        return Implementation(self.name, self.prepare, self.unavailable)


def step_cases(settings: Settings) -> list[Case]:
    if not settings.wants("forward+backward"):
        return []
    require_open_clip()
    sizes = load_sizes(settings.model or DEFAULT_MODEL)
    found = step_points(settings)
    placements = ("tokens",) if settings.quick else ("tokens", "attention")
    cases = [
        _case(point, placement, sizes, settings) for point in found for placement in placements
    ]
    if settings.quick and settings.parallel_episodes is None:
        return cases
    return cases + [_case_at_once(point, sizes, settings) for point in found]


def step_points(settings: Settings) -> list[Point]:
    """Batches and types that the step is measured with."""
    return points("step", settings, varies=("heads", "dtypes"))


def smallest_step_points(settings: Settings) -> list[Point]:
    """The points of the smallest batch, for what grows with it as the step does."""
    found = step_points(settings)
    smallest = min(point.images for point in found)
    return [point for point in found if point.images == smallest]


def has_open_clip() -> bool:
    return importlib.util.find_spec("open_clip") is not None


def require_open_clip() -> None:
    """Raise SuiteUnavailableError where it is missing."""
    if not has_open_clip():
        raise SuiteUnavailableError("it needs open_clip: pip install open_clip_torch")


def published_precisions(device: str, dtype: str) -> list[str]:
    """Precisions of the published program: on a CPU it runs in float32, whatever ours does."""
    return list(dict.fromkeys(["float32", dtype])) if device == "cpu" else [dtype]


def implementations(
    point: Point, placement: str, settings: Settings, *, only_targeted: bool = False
) -> list[StepImplementation]:
    """Every implementation that takes a step.

    Args:
        point: The shape.
        placement: Of the weights.
        settings: Of the run.
        only_targeted: Ours, without the readable backend, and what targets compare them with.
    """
    from bench.plain_clip import PlainStep, fused_attention, materialised_attention
    from bench.published import PublishedStep
    from bench.training import without_reweighting

    training = step_training(point, settings, placement)

    def plain(attend: Callable[..., Tensor]) -> RunSteps:
        return functools.partial(_run_plain, functools.partial(PlainStep, attend=attend))

    found = [
        StepImplementation(OURS + name, training.running(backend=name), train, reason)
        for name, reason in settings.our_backends()
        if not (only_targeted and name == "reference")
    ]
    if placement == "tokens":
        found += [
            StepImplementation(
                PUBLISHED + dtype,
                training.running(precision=dtype),
                functools.partial(_run_plain, PublishedStep),
            )
            for dtype in published_precisions(settings.device, point.dtype)
        ]
    if not only_targeted:
        unweighted = without_reweighting(training)
        found += [
            StepImplementation(EAGER, training, plain(materialised_attention)),
            StepImplementation(UNWEIGHTED, unweighted, plain(fused_attention)),
        ]
    return found


def _case(point: Point, placement: str, sizes: ClipSizes, settings: Settings) -> Case:
    competing = [each.competing() for each in implementations(point, placement, settings)]
    operator = f"{STEP}, placement {placement}"
    priority = SECOND if placement == "tokens" else THIRD
    return step_case(operator, point, sizes, settings, competing, priority=priority)


def _case_at_once(point: Point, sizes: ClipSizes, settings: Settings) -> Case:
    """The time of a step per episode, where some are trained at once."""
    numbers = settings.parallel_episodes or _AT_ONCE
    training, reason = own_training(point, settings)
    competing = [
        StepImplementation(
            f"{OURS}{training.runtime.backend}, {number} at once",
            training,
            functools.partial(train_at_once, number),
            reason,
        ).competing()
        for number in numbers
    ]
    case = step_case(f"{STEP} per episode", point, sizes, settings, competing)
    return replace(case, slowdown=case.slowdown * max(numbers))


def own_training(point: Point, settings: Settings) -> tuple[Training, str]:
    """Settings of the engine with the first of our backends, and why that does not run here."""
    backend, reason = settings.our_backends()[0]
    return step_training(point, settings).running(backend=backend), reason


def step_training(point: Point, settings: Settings, placement: str = "tokens") -> Training:
    """The method as published for five shots, whatever the number of images."""
    from bench.training import Training
    from tir_kernels.fewshot import Runtime
    from tir_kernels.fewshot.methods.tir import TIR

    method = TIR(placement=placement, logit_scale=4.0)
    return Training(method, Runtime(precision=point.dtype, device=settings.device))


def step_case(
    operator: str,
    point: Point,
    sizes: ClipSizes,
    settings: Settings,
    competing: list[Implementation],
    *,
    priority: int = THIRD,
) -> Case:
    """The case of implementations of a step, or of what goes with one."""
    return Case(
        suite="step",
        operator=operator,
        device=settings.device,
        dtype=point.dtype,
        shape=step_shape(point, sizes),
        direction="forward+backward",
        make_inputs=functools.partial(make_problem, point, sizes, settings.device),
        implementations=competing,
        measure=measure_for(settings),
        cost=cost_of_step(point.images, CLASS_NAMES, sizes),
        slowdown=1.5,  # nearly all of it are matrix products
        priority=priority,
    )


def step_shape(point: Point, sizes: ClipSizes) -> dict[str, int]:
    return {"B": point.images, **sizes.shape(), "C": len(CLASS_NAMES)}


def cost_of_step(images: int, class_names: Sequence[str], sizes: ClipSizes) -> Cost:
    token_ids = make_tokenizer(sizes)([f"a photo of a {name}." for name in class_names])
    text_length = int(token_ids.argmax(-1).max()) + 1
    return step_cost(sizes.image_tower(images), sizes.text_tower(len(class_names), text_length))


def make_problem(point: Point, sizes: ClipSizes, device: str) -> StepProblem:
    side = sizes.vision["image_size"]
    labels = torch.arange(point.images, device=device) % len(CLASS_NAMES)
    images = torch.randn(point.images, 3, side, side, device=device)
    model, tokenizer = make_model(sizes, device), make_tokenizer(sizes)
    return StepProblem(model, tokenizer, CLASS_NAMES, images, labels)


def train(
    problem: StepProblem, training: Training, steps: int, query_images: Tensor | None = None
) -> StepRun:
    """Steps of the few-shot engine, after which it classifies images if there are any."""
    return train_at_once(1, problem, training, steps, query_images)


def without_saving(saving: str, run: RunSteps) -> RunSteps:
    """The run of an engine without one of its savings; all of them stay for the name ""."""
    from bench.without import without

    def changed(problem: StepProblem, training: Training, steps: int) -> StepRun:
        with without(training.method, *filter(None, [saving])) as method:
            return run(problem, replace(training, method=method), steps)

    return changed


def train_at_once(
    number: int,
    problem: StepProblem,
    training: Training,
    steps: int,
    query_images: Tensor | None = None,
) -> StepRun:
    """Steps of that many episodes at once; the ends are those of the last one's steps."""
    from bench.without import with_steps
    from tir_kernels.fewshot import Episode, finetune_episodes

    queries = problem.images[:0] if query_images is None else query_images
    names = list(problem.class_names)
    episodes = [
        Episode(names, problem.images, problem.labels, queries, index) for index in range(number)
    ]
    ends: list[float] = []

    def note(position: int, step: int, loss: float) -> None:
        if position == number - 1:
            ends.append(time.perf_counter())

    results = finetune_episodes(
        problem.model,
        problem.tokenizer,
        episodes,
        with_steps(training.method, steps),
        runtime=training.runtime,
        on_step=note,
    )
    first_losses = [result.losses[0] for result in results]  # an error has them too
    return StepRun(first_losses, ends)


def _run_plain(
    build: Callable[..., object], problem: StepProblem, training: Training, steps: int
) -> StepRun:
    from bench.plain_clip import precision

    ends: list[float] = []
    with precision(training):
        plain = build(problem.model, problem.tokenizer, problem.class_names, training)
        losses = plain.train(
            problem.images, problem.labels, steps, lambda: ends.append(time.perf_counter())
        )
    return StepRun(losses[:1], ends)


def rebuild_step(
    name: str, point: Point, sizes: ClipSizes, settings: Settings, is_small: bool
) -> Call:
    """A few steps of an implementation of placement "tokens", built anew in another process."""
    if is_small:
        sizes = sizes.shrunk()
    (chosen,) = (each for each in implementations(point, "tokens", settings) if each.name == name)
    problem = make_problem(point, sizes, settings.device)
    return functools.partial(chosen.run, problem, chosen.training, STEPS_OF_PEAK[settings.device])


def checked(training: Training) -> Training:
    """The settings with which an implementation is checked."""
    return training.having(steps=1, logit_scale=_CHECKED_SCALE)


def verify_first_loss(loss: float, problem: StepProblem, training: Training) -> None:
    """Compare the first loss, which LoRA does not change yet, with float64.

    Raises:
        WrongResultError: They differ by more than rounding explains.
    """
    key = (training.method.name, getattr(training.method, "placement", ""))
    if key not in problem.exact_losses:
        problem.exact_losses[key] = _exact_loss(problem, training)
    if wrong := wrong_first_loss(loss, problem.exact_losses[key], training.runtime.precision):
        raise WrongResultError(f"{wrong} in float64")


def wrong_first_loss(loss: float, expected: float, dtype: str) -> str:
    """The error of a first loss, in words; empty if rounding to the type explains it."""
    if abs(loss - expected) <= _ALLOWED_LOSS_ERROR[dtype] * abs(expected):
        return ""
    return f"the first loss is {loss:.5f}, but {expected:.5f}"


@torch.no_grad()
def _exact_loss(problem: StepProblem, training: Training) -> float:
    from bench.plain_clip import PlainStep, materialised_attention

    model = copy.deepcopy(problem.model).double()
    plain = PlainStep(
        model,
        problem.tokenizer,
        problem.class_names,
        training,
        materialised_attention,
        trains=False,
    )
    return plain.loss(problem.images.double(), problem.labels).item()
