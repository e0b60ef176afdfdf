"""Support images of an episode so that no group, such as a patient, is also in its queries."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence


class TooFewGroupsError(ValueError):
    """A class's groups can't be divided into support and queries.

    Args:
        position: The class's position among those of the episode.
    """

    def __init__(self, position: int) -> None:
        super().__init__(f"class {position} has too few groups")
        self.position = position


def choose_support(
    orders: Sequence[Sequence[int]],
    groups: Sequence[Sequence[str]],
    query_groups: Sequence[Sequence[str]],
    shots: int,
    queries: int,
) -> list[list[int]]:
    """Choose the support images of each class of an episode.

    They are the first in drawing order of as many groups, except for groups that would leave too
    few images for the queries of a class. Where a class has too few groups for an image of each,
    several images of a group are taken.

    Args:
        orders: Per class, its images in drawing order.
        groups: Per class, the group of each of its images.
        query_groups: Per class, the group of each image that may be a query.
        shots, queries: Images per class.

    Returns:
        Per class, the positions of its support images.

    Raises:
        TooFewGroupsError: No way was found to keep support and queries of a class apart.
    """
    division = _Division([Counter(own) for own in query_groups], shots, queries)
    chosen = []
    for c, (order, own) in enumerate(zip(orders, groups, strict=True)):
        members: dict[str, list[int]] = {}
        for position in order:
            members.setdefault(own[position], []).append(position)
        turns = [
            (turn, place, position)
            for place, group in enumerate(division.take(c, members))
            for turn, position in enumerate(members[group])
        ]
        chosen.append([position for _, _, position in sorted(turns)[:shots]])
    return chosen


class _Division:
    """Groups of an episode that are in its support, and what they leave for its queries.

    Args:
        pools: Per class, images of each group that may be queries.
        shots, queries: Images per class.
    """

    def __init__(self, pools: Sequence[Counter[str]], shots: int, queries: int) -> None:
        self._pools, self._shots, self._queries = pools, shots, queries
        self._support: set[str] = set()
        self._left = [pool.total() for pool in pools]

    def take(self, c: int, members: Mapping[str, Sequence[int]]) -> list[str]:
        """Put groups of a class into the support; ``members`` are its images, in drawing order."""

        def cost(group: str) -> int:
            return self._cost(c, group)

        def images(groups: Sequence[str]) -> int:
            return sum(len(members[group]) for group in groups)

        groups = list(members)
        taken = self._one_of_each(c, groups)
        # Which groups come first decides how many go in, so several orders are tried.
        for order in (groups, sorted(groups, key=cost), sorted(groups, key=cost, reverse=True)):
            if images(taken) >= self._shots:
                break
            taken = self._as_many_as_go(order)
        if images(taken) < self._shots or self._left[c] < self._queries:
            raise TooFewGroupsError(c)
        for group in taken:
            self._left = self._left_without(group, self._left)
            self._support.add(group)
        return taken

    def _one_of_each(self, c: int, groups: Sequence[str]) -> list[str]:
        """The first groups that make up all shots with an image each; empty where none do."""
        taken: list[str] = []
        left = self._left
        spare = left[c] - self._queries
        costs = [self._cost(c, group) for group in groups]
        if len(groups) < self._shots or sum(heapq.nsmallest(self._shots, costs)) > spare:
            return []
        for at, group in enumerate(groups):
            # What must follow takes the smallest of the groups to come.
            following = heapq.nsmallest(self._shots - len(taken) - 1, costs[at + 1 :])
            after = self._left_without(group, left)
            if min(after) < self._queries or costs[at] + sum(following) > spare:
                continue
            taken.append(group)
            left, spare = after, spare - costs[at]
            if len(taken) == self._shots:
                return taken
        return []

    def _as_many_as_go(self, groups: Sequence[str]) -> list[str]:
        """The first groups, at most one a shot, that leave enough for the queries."""
        taken: list[str] = []
        left = self._left
        for group in groups:
            after = self._left_without(group, left)
            if len(taken) < self._shots and min(after) >= self._queries:
                taken.append(group)
                left = after
        return taken

    def _cost(self, c: int, group: str) -> int:
        """The queries that a class loses with a group."""
        return 0 if group in self._support else self._pools[c][group]

    def _left_without(self, group: str, left: list[int]) -> list[int]:
        return [count - self._cost(d, group) for d, count in enumerate(left)]
