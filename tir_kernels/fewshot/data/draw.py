"""Drawing an episode from data: which of its images are support, and which may be queries."""

from __future__ import annotations

from dataclasses import replace

from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.data.dataset import ImageData
from tir_kernels.fewshot.episode import EpisodePlan, plan_episode
from tir_kernels.fewshot.grouped import TooFewGroupsError, choose_support
from tir_kernels.fewshot.settings import ALL, Protocol
from tir_kernels.text import setting


def with_ways(protocol: Protocol, data: ImageData) -> Protocol:
    """A protocol with the number of classes in place of all ways.

    Raises:
        FewShotError: The data has a single class.
    """
    if protocol.ways != ALL:
        return protocol
    if len(data.classes) < 2:
        raise FewShotError(
            f"{setting('ways', ALL)}: {data.name} has one class; an episode needs 2 or more"
        )
    return replace(protocol, ways=len(data.classes))


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
    ways = protocol.ways if isinstance(protocol.ways, int) else len(sizes)
    plan = plan_episode(protocol.seed, index, sizes, ways, query_sizes)
    if not data.group_column:
        return plan
    classes = [data.classes[c] for c in plan.classes]
    groups = [entry.groups for entry in classes]
    pools = [(data.queries or data.classes)[c].groups for c in plan.classes]
    # Of all queries, each class must have one left.
    queries = protocol.queries_per_class or 1
    try:
        chosen = choose_support(plan.orders, groups, pools, protocol.shots, queries)
    except TooFewGroupsError as error:
        entry = classes[error.position]
        asked = "a query" if queries == 1 else f"{queries} queries"
        names = ("shots",) if protocol.queries == ALL else ("shots", "queries")
        raise FewShotError(
            f"episode {index}: no way was found to take {protocol.shots} shots and "
            f"{asked} from class {entry.folder!r} in {data.name} so that no "
            f"subject is on both sides: its {len(entry.files)} images show "
            f"{len(set(entry.groups))} subjects by column {data.group_column}; lower "
            f"{', '.join(map(setting, names))} or {setting('ways')}, or add images of "
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
