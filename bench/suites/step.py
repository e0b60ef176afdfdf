"""A whole fine-tuning step of a CLIP model with random weights: both towers, LoRA, prompt context.

To add an implementation, write a function ``(episode, config, steps) -> StepRun`` and name it in
:func:`_implementations`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bench.cases import Case, Implementation, Measurement, SuiteUnavailableError, WrongResultError
from bench.clip_model import ClipSizes, load_sizes, make_model, make_tokenizer
from bench.counting import step_cost
from bench.peers.common import EAGER
from bench.settings import OURS, Settings
from bench.shapes import Point, points
from bench.timing import Call

from .common import THIRD

if TYPE_CHECKING:
    from tir_kernels.fewshot import FewShotConfig

UNWEIGHTED = "sdpa unweighted"
CLASS_NAMES = ("annual crop", "forest", "highway", "river", "sea or lake")

_ALLOWED_LOSS_ERROR = 0.02  # a share; rounding turns selections, and with them the loss a little


@dataclass(frozen=True)
class StepRun:
    """What some steps gave: a loss for each, and the seconds of each but the first."""

    losses: list[float]
    seconds: list[float]


@dataclass(frozen=True)
class Episode:
    """What all implementations train on.

    Attributes:
        model: open_clip's, with random weights, frozen, in evaluation mode.
        tokenizer: Its tokenizer.
        images: (S, 3, H, W).
        labels: (S,).
        exact_losses: (method, placement) -> first loss in float64, as far as computed.
    """

    model: nn.Module
    tokenizer: Callable[[list[str]], Tensor]
    images: Tensor
    labels: Tensor
    exact_losses: dict[tuple[str, str], float] = field(default_factory=dict)


RunSteps = Callable[[Episode, "FewShotConfig", int], StepRun]


def step_cases(settings: Settings) -> list[Case]:
    if not settings.wants("forward+backward"):
        return []
    if importlib.util.find_spec("open_clip") is None:
        raise SuiteUnavailableError("it needs open_clip: pip install open_clip_torch")
    sizes = load_sizes(settings.model)
    placements = ("tokens",) if settings.quick else ("tokens", "attention")
    return [
        _case(point, placement, sizes, settings)
        for point in points("step", settings, varies=("heads", "dtypes"))
        for placement in placements
    ]


def _implementations(
    config: FewShotConfig, settings: Settings
) -> list[tuple[str, FewShotConfig, RunSteps, str]]:
    """Name, settings, how it runs, and why it cannot."""
    from bench.plain_clip import fused_attention, materialised_attention

    ours = [
        (OURS + name, replace(config, backend=name), _run_engine, reason)
        for name, reason in settings.our_backends()
    ]
    eager = functools.partial(_run_plain, materialised_attention)
    unweighted = functools.partial(_run_plain, fused_attention)
    return [
        *ours,
        (EAGER, config, eager, ""),
        (UNWEIGHTED, replace(config, method="lora"), unweighted, ""),
    ]


def _case(point: Point, placement: str, sizes: ClipSizes, settings: Settings) -> Case:
    from tir_kernels.fewshot import FewShotConfig

    config = FewShotConfig(placement=placement, precision=point.dtype, device=settings.device)

    def implementation(name: str, config: FewShotConfig, run: RunSteps, reason: str):
        def prepare(episode: Episode) -> Call:
            _verify(run(episode, config, 1).losses[0], episode, config)
            return functools.partial(run, episode, config)

        return Implementation(name, prepare, reason)

    text_length = int(make_tokenizer(sizes)(prompts()).argmax(-1).max()) + 1
    return Case(
        suite="step",
        operator=f"fine-tuning step, placement {placement}",
        device=settings.device,
        dtype=point.dtype,
        shape={"B": point.images, "L": sizes.length, "C": len(CLASS_NAMES)},
        direction="forward+backward",
        make_inputs=functools.partial(_make_episode, point, sizes, settings.device),
        implementations=[implementation(*parts) for parts in _implementations(config, settings)],
        measure=_measure_quickly if settings.quick else _measure,
        cost=step_cost(
            point.images,
            sizes.length,
            sizes.width,
            sizes.layers,
            len(CLASS_NAMES),
            text_length,
            sizes.text_width,
            sizes.text_layers,
        ),
        slowdown=1.5,  # nearly all of it are matrix products
        priority=THIRD,
    )


def prompts() -> list[str]:
    return [f"a photo of a {name}." for name in CLASS_NAMES]


def _make_episode(point: Point, sizes: ClipSizes, device: str) -> Episode:
    side = sizes.image_size
    labels = torch.arange(point.images, device=device) % len(CLASS_NAMES)
    images = torch.randn(point.images, 3, side, side, device=device)
    return Episode(make_model(sizes, device), make_tokenizer(sizes), images, labels)


def _run_engine(episode: Episode, config: FewShotConfig, steps: int) -> StepRun:
    from tir_kernels.fewshot import finetune_episode

    ends: list[float] = []
    result = finetune_episode(
        episode.model,
        episode.tokenizer,
        CLASS_NAMES,
        episode.images,
        episode.labels,
        episode.images[:0],
        replace(config, steps=steps),
        on_step=lambda step, loss: ends.append(time.perf_counter()),
    )
    return StepRun(result.losses, _intervals(ends))


def _run_plain(
    attend: Callable[..., Tensor], episode: Episode, config: FewShotConfig, steps: int
) -> StepRun:
    from bench.plain_clip import PlainStep

    ends: list[float] = []
    with _precision(config):
        plain = PlainStep(episode.model, episode.tokenizer, CLASS_NAMES, config, attend)
        losses = plain.train(
            episode.images, episode.labels, steps, lambda: ends.append(time.perf_counter())
        )
    return StepRun(losses, _intervals(ends))


def _precision(config: FewShotConfig) -> contextlib.AbstractContextManager:
    if config.precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(config.device, dtype=getattr(torch, config.precision))


def _intervals(ends: Sequence[float]) -> list[float]:
    return [end - start for start, end in itertools.pairwise(ends)]


def _verify(loss: float, episode: Episode, config: FewShotConfig) -> None:
    """Compare the first loss, which LoRA does not change yet, with float64."""
    key = (config.method, config.placement)
    if key not in episode.exact_losses:
        episode.exact_losses[key] = _exact_loss(episode, config)
    exact = episode.exact_losses[key]
    if not abs(loss - exact) <= _ALLOWED_LOSS_ERROR * abs(exact):
        raise WrongResultError(f"the first loss is {loss:.5f}, in float64 it is {exact:.5f}")


@torch.no_grad()
def _exact_loss(episode: Episode, config: FewShotConfig) -> float:
    from bench.plain_clip import PlainStep, materialised_attention

    model = copy.deepcopy(episode.model).double()
    plain = PlainStep(
        model, episode.tokenizer, CLASS_NAMES, config, materialised_attention, trains=False
    )
    return plain.loss(episode.images.double(), episode.labels).item()


def _measure(
    runs: Sequence[Callable[[int], StepRun]], seconds: float, *, steps: int = 4, min_rounds: int = 2
) -> list[Measurement]:
    """Median time of a step, of runs of a few steps that take turns."""
    times: list[list[float]] = [[] for _ in runs]
    start = time.perf_counter()
    rounds = 0
    while rounds < min_rounds or time.perf_counter() - start < seconds * len(runs):
        for run, found in zip(runs, times, strict=True):
            found += run(steps).seconds
        rounds += 1
    return [{"ms": statistics.median(found) * 1e3} for found in times]


_measure_quickly = functools.partial(_measure, steps=2, min_rounds=1)
