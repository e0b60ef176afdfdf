"""A whole fine-tuning step of a CLIP model with random weights: both towers, LoRA, prompt context.

To add an implementation, write a function ``(problem, training, steps) -> StepRun`` and name it in
:func:`implementations`.
"""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from bench.cases import Case, WrongResultError
from bench.clip_model import ClipSizes, load_sizes, make_model, make_tokenizer
from bench.counting import Cost, step_cost
from bench.formulas import fused_attention, materialised_attention
from bench.peers import EAGER
from bench.plain_clip import PlainStep, Training, precision
from bench.published import PublishedStep
from bench.settings import OURS, PUBLISHED, STEP, Settings
from bench.shapes import Point, points
from bench.timing import Call, Clock, Measure, timed
from tir_kernels.fewshot import Episode, Runtime, finetune_episodes
from tir_kernels.fewshot.methods.tir import TIR

from .operators import SECOND, THIRD

UNWEIGHTED = "sdpa unweighted"
CLASS_NAMES = ("annual crop", "forest", "highway", "river", "sea or lake")

# A share, of a loss at _CHECKED_SCALE; rounding turns selections, and with them the loss a little.
_ALLOWED_LOSS_ERROR = {"float32": 0.01, "bfloat16": 0.04, "float16": 0.04}
_CHECKED_SCALE = 100.0  # of the cosines; at the method's own all losses are near log(C)
_AT_ONCE = (1, 2, 4)  # episodes
# What optimisers keep is there from the second step on; a CUDA graph is made after the third.
STEPS_OF_PEAK = {"cpu": 2, "cuda": 5}
_TIMED_ON_GPU = (6, 26)  # steps; both longer than what goes before a graph


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


@dataclass(frozen=True)
class StepRun:
    """The first loss of each episode, and when each step was over, by ``time.perf_counter()``."""

    first_losses: list[float]
    ends: list[float]

    @property
    def seconds(self) -> list[float]:
        """Seconds of each step but the first, per episode."""
        episodes = len(self.first_losses)
        return [(end - start) / episodes for start, end in itertools.pairwise(self.ends)]


RunSteps = Callable[[StepProblem, Training, int], StepRun]


@dataclass(frozen=True)
class StepImplementation:
    """An :class:`Implementation`, from its settings and how it runs."""

    name: str
    training: Training
    run: RunSteps
    unavailable: str = ""
    scratch_bytes: int = 0

    def prepare(self, problem: StepProblem) -> Call:
        """A call that takes a number of steps, once its first loss is found right."""
        training = checked(self.training)
        for loss in self.run(problem, training, 1).first_losses:
            verify_first_loss(loss, problem, training)
        return functools.partial(self.run, problem, self.training)


def step_cases(settings: Settings) -> list[Case]:
    if not settings.wants("forward+backward"):
        return []
    found = points("step", settings)
    cases = []
    for point in found:
        for placement, priority in (("tokens", SECOND), ("attention", THIRD)):
            if placement == "tokens" or not settings.quick:
                name = f"{STEP}, placement {placement}"
                competing = implementations(point, placement, settings)
                case = step_case(name, point, settings, competing)
                cases.append(replace(case, priority=priority))
    if settings.quick and settings.parallel_episodes is None:
        return cases
    return cases + [_case_at_once(point, settings) for point in found]


def smallest_step_points(settings: Settings) -> list[Point]:
    """The points of the smallest batch, for what grows with it as the step does."""
    found = points("step", settings)
    smallest = min(point.images for point in found)
    return [point for point in found if point.images == smallest]


def published_precisions(device: str, dtype: str) -> list[str]:
    """Precisions of the published program: on a CPU it runs in float32, whatever ours does."""
    return list(dict.fromkeys(["float32", dtype])) if device == "cpu" else [dtype]


def implementations(point: Point, placement: str, settings: Settings) -> list[StepImplementation]:
    """Every implementation that takes a step with weights in a placement."""
    training = step_training(point, settings, placement)
    found = [
        StepImplementation(OURS + name, training.running(backend=name), train, reason)
        for name, reason in settings.our_backends()
    ]

    def add(name: str, build: Callable[..., PlainStep], training: Training) -> None:
        found.append(StepImplementation(name, training, functools.partial(_run_plain, build)))

    if placement == "tokens":
        for dtype in published_precisions(settings.device, point.dtype):
            add(PUBLISHED + dtype, PublishedStep, training.running(precision=dtype))
    add(EAGER, PlainStep, training)
    unweighted = functools.partial(PlainStep, attend=fused_attention)
    add(UNWEIGHTED, unweighted, training.of_method("lora"))
    return found


def _case_at_once(point: Point, settings: Settings) -> Case:
    """The time of a step per episode, where some are trained at once."""
    numbers = settings.parallel_episodes or _AT_ONCE
    training, reason = own_training(point, settings)
    competing = [
        StepImplementation(
            f"{OURS}{training.runtime.backend}, {number} at once",
            training,
            functools.partial(train, at_once=number),
            reason,
        )
        for number in numbers
    ]
    case = step_case(f"{STEP} per episode", point, settings, competing)
    return replace(case, slowdown=case.slowdown * max(numbers))


def own_training(point: Point, settings: Settings) -> tuple[Training, str]:
    """Settings of the engine with the first of our backends, and why that does not run here."""
    backend, reason = settings.our_backends()[0]
    return step_training(point, settings).running(backend=backend), reason


def step_training(point: Point, settings: Settings, placement: str = "tokens") -> Training:
    """The method as published for five shots, whatever the number of images."""
    method = TIR(placement=placement, logit_scale=4.0)
    return Training(method, Runtime(precision=point.dtype, device=settings.device))


def step_case(
    operator: str,
    point: Point,
    settings: Settings,
    competing: Sequence[StepImplementation],
) -> Case:
    """The case of implementations of a step, or of what goes with one."""
    sizes = load_sizes(settings.model)
    return Case(
        suite="step",
        operator=operator,
        device=settings.device,
        dtype=point.dtype,
        shape={"B": point.images, **sizes.shape(), "C": len(CLASS_NAMES)},
        direction="forward+backward",
        make_inputs=functools.partial(make_problem, point, sizes, settings.device),
        implementations=competing,
        measure=measure_for(settings),
        cost=cost_of_step(point.images, CLASS_NAMES, sizes),
        slowdown=1.5,  # nearly all of it are matrix products
        priority=THIRD,
    )


def cost_of_step(images: int, class_names: Sequence[str], sizes: ClipSizes) -> Cost:
    token_ids = make_tokenizer(sizes)([f"a photo of a {name}." for name in class_names])
    text_length = int(token_ids.argmax(-1).max()) + 1
    return step_cost(sizes.image_tower(images), sizes.text_tower(len(class_names), text_length))


def make_problem(point: Point, sizes: ClipSizes, device: str) -> StepProblem:
    side = sizes.vision["image_size"]
    labels = torch.arange(point.images, device=device) % len(CLASS_NAMES)
    images = torch.randn(point.images, 3, side, side, device=device)
    return StepProblem(
        make_model(sizes, device), make_tokenizer(sizes), CLASS_NAMES, images, labels
    )


def train(
    problem: StepProblem,
    training: Training,
    steps: int,
    query_images: Tensor | None = None,
    at_once: int = 1,
) -> StepRun:
    """Steps of the few-shot engine, after which it classifies images if there are any.

    Args:
        problem: What each episode trains on.
        training: The settings.
        steps: Their number.
        query_images: (Q, 3, H, W).
        at_once: Episodes; the ends are those of the last one's steps.
    """
    queries = problem.images[:0] if query_images is None else query_images
    names, ends = list(problem.class_names), []

    def note(position: int, step: int, loss: float) -> None:
        if position == at_once - 1:
            ends.append(time.perf_counter())

    results = finetune_episodes(
        problem.model,
        problem.tokenizer,
        [Episode(names, problem.images, problem.labels, queries, n) for n in range(at_once)],
        training.having(steps=steps).method,
        runtime=training.runtime,
        on_step=note,
    )
    return StepRun([result.losses[0] for result in results], ends)  # an error has them too


def _run_plain(
    build: Callable[..., PlainStep], problem: StepProblem, training: Training, steps: int
) -> StepRun:
    ends: list[float] = []
    with precision(training):
        plain = build(problem.model, problem.tokenizer, problem.class_names, training)
        losses = plain.train(
            problem.images, problem.labels, steps, lambda: ends.append(time.perf_counter())
        )
    return StepRun(losses[:1], ends)


def rebuild_step(point: Point, settings: Settings, name: str, is_small: bool) -> Call:
    """A few steps of an implementation of placement "tokens", built anew in another process."""
    sizes = load_sizes(settings.model)
    (chosen,) = (each for each in implementations(point, "tokens", settings) if each.name == name)
    problem = make_problem(point, sizes.shrunk() if is_small else sizes, settings.device)
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
    model = copy.deepcopy(problem.model).double()
    arguments = (model, problem.tokenizer, problem.class_names, training, materialised_attention)
    return PlainStep(*arguments, trains=False).loss(problem.images.double(), problem.labels).item()


def measure_for(settings: Settings) -> Measure:
    if settings.device == "cuda":
        return timed(functools.partial(_step_clock, _seconds_on_gpu), min_rounds=3)
    return measure_on_cpu(2, 1) if settings.quick else measure_on_cpu()


def measure_on_cpu(steps: int = 4, min_rounds: int = 2) -> Measure:
    """Median time of a step, of runs of a few steps that take turns."""

    def seconds(run: Callable[[int], StepRun]) -> float:
        return statistics.median(run(steps).seconds)

    return timed(functools.partial(_step_clock, seconds), min_rounds)


def _step_clock(seconds: Callable[[Call], float], runs: Sequence[Call]) -> Clock:
    """Time of a step, in runs of a few steps; none of them is there to warm up."""

    def times() -> list[float]:
        gc.collect()  # a run leaves cycles behind, and nobody else collects them meanwhile
        return [1e3 * seconds(run) for run in runs]

    return times


def _seconds_on_gpu(run: Callable[[int], StepRun]) -> float:
    """Seconds per episode that each further step adds to a run.

    On a GPU losses come when they come and the first steps prepare a graph for the others, so that
    single steps cannot be told apart.
    """

    def seconds(steps: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        episodes = len(run(steps).first_losses)
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / episodes

    few, many = _TIMED_ON_GPU
    short = seconds(few)
    return (seconds(many) - short) / (many - few)
