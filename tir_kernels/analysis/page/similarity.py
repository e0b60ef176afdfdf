"""Similarity of representations: an arm before and after training, and arms with each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from tir_kernels.analysis.figures import Line, Lines, Point
from tir_kernels.analysis.similarity import linear_cka
from tir_kernels.fewshot.run.maps import Maps
from tir_kernels.fewshot.run.summary import Estimate

Pair = tuple[np.ndarray, np.ndarray]  # (blocks, n, D) tokens of the same images, twice


def similarity_panels(
    maps: Iterable[Maps], styles: Mapping[str, int], baseline: str
) -> tuple[Lines, ...]:
    """Linear CKA from block to block, as a mean over episodes.

    Args:
        maps: Maps of a run.
        styles: Arm -> style of its line.
        baseline: The arm that the others are compared with.

    Returns:
        Each arm after training with itself before; and with the baseline after training, if there
        are others. No panels without maps.
    """
    tokens = {(each.episode, each.arm): (each.tokens_before, each.tokens_after) for each in maps}
    if not tokens:
        return ()
    episodes = sorted({episode for episode, _ in tokens})

    def itself(episode: int, arm: str) -> Pair | None:
        return tokens.get((episode, arm))

    def with_baseline(episode: int, arm: str) -> Pair | None:
        own, other = tokens.get((episode, arm)), tokens.get((episode, baseline))
        return None if own is None or other is None else (own[1], other[1])

    panels = [_panel("after training with before", itself, episodes, styles)]
    others = {arm: style for arm, style in styles.items() if arm != baseline}
    if others:
        panels.append(_panel(f"with {baseline}, after training", with_baseline, episodes, others))
    return tuple(panels)


def _panel(
    title: str,
    pair: Callable[[int, str], Pair | None],
    episodes: Sequence[int],
    styles: Mapping[str, int],
) -> Lines:
    lines = []
    for arm, style in styles.items():
        found: dict[int, list[float]] = {}
        for episode in episodes:
            both = pair(episode, arm)
            for block, (one, other) in enumerate(zip(*both, strict=True) if both else ()):
                value = linear_cka(one, other)
                found.setdefault(block, []).extend([] if math.isnan(value) else [value])
        points = tuple(Point(block, Estimate.of(values)) for block, values in found.items())
        lines.append(Line(arm, style, points))
    last = max((point.x for line in lines for point in line.points), default=0)
    return Lines(title, "block", tuple(lines), ((0, 0.0), (last, 0.0)))
