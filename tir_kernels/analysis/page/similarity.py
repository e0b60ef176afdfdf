"""Similarity of representations: an arm before and after training, and arms with each other."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from tir_kernels.analysis.figures import Line, Lines, Point
from tir_kernels.analysis.similarity import linear_cka
from tir_kernels.fewshot.run.maps import Maps
from tir_kernels.fewshot.run.summary import Estimate

Found = dict[str, dict[int, list[float]]]  # arm -> block -> value of each episode


def similarity_panels(
    maps: Mapping[tuple[int, str], Maps], styles: Mapping[str, int], baseline: str
) -> tuple[Lines, ...]:
    """Linear CKA from block to block, as a mean over episodes.

    Args:
        maps: Maps of a run by (episode, arm); no more than two are in memory at a time.
        styles: Arm -> style of its line.
        baseline: The arm that the others are compared with.

    Returns:
        Each arm after training with itself before; and with the baseline after training, if there
        are others. No panels without maps.
    """
    if not maps:
        return ()
    others = {arm: style for arm, style in styles.items() if arm != baseline}
    itself: Found = {arm: {} for arm in styles}
    with_baseline: Found = {arm: {} for arm in others}
    for episode in sorted({episode for episode, _ in maps}):
        other = maps.get((episode, baseline))
        for arm in styles:
            own = other if arm == baseline else maps.get((episode, arm))
            if own is None:
                continue
            _compare(itself[arm], own.tokens_before, own.tokens_after)
            if other is not None and arm != baseline:
                _compare(with_baseline[arm], own.tokens_after, other.tokens_after)
    panels = [_panel("after training with before", itself, styles)]
    if others:
        panels.append(_panel(f"with {baseline}, after training", with_baseline, others))
    return tuple(panels)


def _compare(found: dict[int, list[float]], one: np.ndarray, other: np.ndarray) -> None:
    """Add the similarity in each block of (blocks, n, D) tokens of the same images."""
    for block, tokens in enumerate(zip(one, other, strict=True)):
        value = linear_cka(*tokens)
        found.setdefault(block, []).extend([] if math.isnan(value) else [value])


def _panel(title: str, found: Found, styles: Mapping[str, int]) -> Lines:
    lines = []
    for arm, style in styles.items():
        points = tuple(Point(block, Estimate.of(values)) for block, values in found[arm].items())
        lines.append(Line(arm, style, points))
    last = max((point.x for line in lines for point in line.points), default=0)
    return Lines(title, "block", tuple(lines), ((0, 0.0), (last, 0.0)))
