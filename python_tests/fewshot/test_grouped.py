"""Support images whose groups are kept out of the queries."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tir_kernels.fewshot.grouped import TooFewGroupsError, choose_support


def choose(groups, shots, queries):
    orders = [range(len(own)) for own in groups]
    return choose_support(orders, groups, groups, shots, queries)


def groups_of(groups, chosen):
    return [
        [own[position] for position in positions]
        for own, positions in zip(groups, chosen, strict=True)
    ]


def left_for_queries(groups, chosen):
    support = {group for own in groups_of(groups, chosen) for group in own}
    return [sum(group not in support for group in own) for own in groups]


@given(
    st.lists(
        st.lists(st.integers(0, 12).map(str), min_size=4, max_size=40), min_size=1, max_size=4
    ),
    st.integers(1, 4),
    st.integers(1, 6),
)
def test_no_group_of_the_support_is_needed_for_queries(groups, shots, queries):
    assume(all(len(own) >= shots + queries for own in groups))
    try:
        chosen = choose(groups, shots, queries)
    except TooFewGroupsError:
        return
    for positions in chosen:
        assert len(set(positions)) == len(positions) == shots
    assert min(left_for_queries(groups, chosen)) >= queries


@given(st.lists(st.integers(1, 6), min_size=1, max_size=9), st.integers(1, 4), st.integers(1, 6))
def test_one_image_a_group_wherever_that_is_possible(sizes, shots, queries):
    own = [str(group) for group, size in enumerate(sizes) for _ in range(size)]
    smallest = sorted(sizes)[:shots]
    assume(len(smallest) == shots and sum(sizes) - sum(smallest) >= queries)
    (found,) = groups_of([own], choose([own], shots, queries))
    assert len(set(found)) == shots


def test_the_first_in_drawing_order_are_taken():
    own = list("aabbcd")
    assert choose_support([[3, 2, 5, 0, 1, 4]], [own], [own], 2, 2) == [[3, 5]]


def test_a_large_group_is_passed_over_where_queries_need_it():
    own = list("aaaaaabcd")
    assert groups_of([own], choose([own], 3, 6)) == [["b", "c", "d"]]


def test_few_groups_give_several_images_each():
    own = list("aaabbbcccc")
    assert groups_of([own], choose([own], 4, 4)) == [["a", "b", "a", "b"]]
    # Only the group that comes last leaves enough.
    assert groups_of([["a"] * 9 + ["b"] * 3], choose([["a"] * 9 + ["b"] * 3], 2, 9)) == [["b"] * 2]
    # Small groups don't hold the shots, a large one does.
    assert groups_of([list("abbbb")], choose([list("abbbb")], 3, 1)) == [["b"] * 3]


def test_groups_in_several_classes():
    # Taking patient "p" of the first class would leave the second without queries.
    groups = [list("pqrs"), list("pppt")]
    chosen = choose(groups, 1, 3)
    assert groups_of(groups, chosen) == [["q"], ["t"]]
    # What the first class put into the support costs the second one nothing more.
    groups = [list("pqqq"), list("ptttt")]
    assert groups_of(groups, choose(groups, 1, 3)) == [["p"], ["p"]]


@pytest.mark.parametrize(
    ("groups", "shots", "queries", "position"),
    [
        ([list("aaaaaa")], 1, 1, 0),
        ([list("abcdef"), list("aaabbb")], 2, 4, 1),
        ([list("abcdef"), list("xxxxxx")], 1, 3, 1),
    ],
)
def test_what_can_not_be_divided(groups, shots, queries, position):
    with pytest.raises(TooFewGroupsError) as caught:
        choose(groups, shots, queries)
    assert caught.value.position == position
