"""Ranks of arms over data sets, and which of them Friedman's and Nemenyi's tests tell apart."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from scipy import stats

from tir_kernels.analysis.figures import Ranks
from tir_kernels.analysis.page.columns import Block, Row
from tir_kernels.analysis.page.tables import PValue
from tir_kernels.errors import first_line
from tir_kernels.fewshot.run.statistics import SIGNIFICANCE

FEWEST = 3  # data sets, and arms, for Friedman's test


class Ranking(NamedTuple):
    """Arms ranked over data sets.

    Attributes:
        panel: Their mean ranks, and the tests of each with each.
        caption: What was tested, and with what result.
    """

    panel: Ranks
    caption: str


def can_be_ranked(block: Block) -> bool:
    """Whether there are data sets enough, each of them once, and arms that have them all."""
    data = {column.data for column in block.columns}
    return FEWEST <= len(data) == len(block.columns) and len(_ranked(block)) >= FEWEST


def why_not_drawn() -> str:
    """What is wrong with the libraries of tests and picture, and what to do; empty if nothing."""
    try:
        import scikit_posthocs  # noqa: F401
    except ImportError as error:
        return (
            f"Not drawn, since scikit-posthocs can't be imported ({first_line(error)}): "
            'pip install "tir_kernels[comparison]" and write the page again.'
        )
    return ""


def ranking(block: Block, styles: Mapping[str, int]) -> Ranking:
    """Rank the arms that have all episodes of all data sets; to be called if they can be.

    Nemenyi's test follows Friedman's (Demšar, JMLR 7, 2006): where that one finds no difference,
    no two arms are told apart.

    Args:
        block: Columns of as many data sets.
        styles: Arm -> style of its name.
    """
    from scikit_posthocs import posthoc_nemenyi_friedman

    rows = _ranked(block)
    means = np.array([[column.accuracy(row).mean for row in rows] for column in block.columns])
    num_sets, num_arms = means.shape
    ranks = stats.rankdata(-means, axis=1).mean(0)
    p = _friedman(means)
    if p < SIGNIFICANCE:
        p_values = posthoc_nemenyi_friedman(means).to_numpy()
    else:
        p_values = np.ones((num_arms, num_arms))
    quantile = stats.studentized_range.ppf(1 - SIGNIFICANCE, num_arms, np.inf) / math.sqrt(2)
    distance = quantile * math.sqrt(num_arms * (num_arms + 1) / (6 * num_sets))
    panel = Ranks(
        f"Mean rank over {num_sets} data sets",
        tuple(
            (f"{row.label}: {block.name_of(row)}", styles[row.arm], float(rank))
            for row, rank in zip(rows, ranks, strict=True)
        ),
        tuple(map(tuple, p_values.tolist())),
        SIGNIFICANCE,
    )
    return Ranking(panel, _caption(len(block.rows) - num_arms, num_sets, p, distance))


def _ranked(block: Block) -> list[Row]:
    return [row for row in block.rows if all(column.is_whole(row) for column in block.columns)]


def _friedman(means: np.ndarray) -> float:
    """p of Friedman's test that all columns are alike; 1 where all values are."""
    if (means == means[:, :1]).all():
        return 1.0
    return float(stats.friedmanchisquare(*means.T).pvalue)


def _caption(num_left_out: int, num_sets: int, p: float, distance: float) -> str:
    sentences = [
        f"Mean ranks over {num_sets} data sets, by mean accuracy; 1 is best, and a bar joins arms "
        "that are not told apart."
    ]
    found = f"Friedman's test that all arms are alike: p {PValue(p).relation}"
    if p < SIGNIFICANCE:
        sentences.append(
            f"{found}; after it Nemenyi's test at {SIGNIFICANCE}, which takes a distance of "
            f"{distance:.2f} ranks."
        )
    else:
        sentences.append(f"{found}, so that no two arms are told apart.")
    if num_left_out:
        sentences.append(
            f"{num_left_out} arm{'s' * (num_left_out > 1)} without all episodes of all data sets "
            "left out."
        )
    return " ".join(sentences)
