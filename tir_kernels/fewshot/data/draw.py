"""Drawing an episode from data: which of its images are support, and which may be queries."""

from __future__ import annotations

from dataclasses import replace

from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.data.dataset import ImageData
from tir_kernels.fewshot.episode import EpisodePlan, plan_episode
from tir_kernels.fewshot.grouped import TooFewGroupsError, choose_support
from tir_kernels.fewshot.settings import Protocol
from tir_kernels.text import setting


def draw_episode(data: ImageData, protocol: Protocol, index: int) -> EpisodePlan:
    """Draw the classes and the order of their images, by the seed and the episode's number.

    Args:
        data: The data.
        protocol: Sizes and seed of the episodes.
        index: The episode's number.

    Raises:
        FewShotError: The data has groups, of which a class has too few.
    """
    sizes = [len(entry.files) for entry in data.classes]
    query_sizes = [len(entry.files) for entry in data.queries]
    plan = plan_episode(protocol.seed, index, sizes, protocol.ways, query_sizes)
    if not data.group_column:
        return plan
    classes = [data.classes[c] for c in plan.classes]
    groups = [entry.groups for entry in classes]
    pools = [(data.queries or data.classes)[c].groups for c in plan.classes]
    try:
        chosen = choose_support(plan.orders, groups, pools, protocol.shots, protocol.queries)
    except TooFewGroupsError as error:
        entry = classes[error.position]
        raise FewShotError(
            f"episode {index}: no way was found to take {protocol.shots} shots and "
            f"{protocol.queries} queries from class {entry.folder!r} in {data.name} so that no "
            f"subject is on both sides: its {len(entry.files)} images show "
            f"{len(set(entry.groups))} subjects by column {data.group_column}; lower "
            f"{setting('shots')}, {setting('queries')} or {setting('ways')}, or add images of "
            "other subjects"
        ) from error
    orders = []
    for own, order in zip(chosen, plan.orders, strict=True):
        is_chosen = set(own)
        orders.append((*own, *(each for each in order if each not in is_chosen)))
    return replace(plan, orders=tuple(orders))


def require_groups(data: ImageData, protocol: Protocol, episodes: int) -> None:
    """Check that all episodes of a run can be drawn, where that depends on the data's groups.

    Raises:
        FewShotError: As ``draw_episode``.
    """
    if data.group_column:
        for index in range(episodes):
            draw_episode(data, protocol, index)
