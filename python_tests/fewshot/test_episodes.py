"""The classes and images of an episode."""

import pytest
import torch
from fake_engine import small_preprocess
from hypothesis import given
from hypothesis import strategies as st

from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.data.dataset import load_data
from tir_kernels.fewshot.data.load import load_episode
from tir_kernels.fewshot.data.reader import ImageReader
from tir_kernels.fewshot.episode import episode_seed, plan_episode


def test_plans_never_change():
    # These numbers are a promise: a run made with an older version is continued with a newer one.
    plan = plan_episode(seed=0, index=3, class_sizes=[4, 3, 5, 4], ways=2)
    assert plan.classes == (1, 3)
    assert plan.orders == ((0, 1, 2), (2, 3, 1, 0))
    assert [episode_seed(0, index) for index in range(3)] == [1069874121, 1914160858, 96360516]


@given(st.integers(0, 2**40), st.integers(0, 10**6), st.lists(st.integers(1, 9), min_size=2))
def test_plans_draw_distinct_classes_and_images(seed, index, sizes):
    ways = min(5, len(sizes))
    plan = plan_episode(seed, index, sizes, ways)
    assert plan == plan_episode(seed, index, sizes, ways)
    assert len(set(plan.classes)) == ways
    for c, order in zip(plan.classes, plan.orders, strict=True):
        assert sorted(order) == list(range(sizes[c]))
    assert 0 <= episode_seed(seed, index) < 2**31


def test_episodes_differ_and_use_all_classes():
    plans = [plan_episode(0, index, [20] * 10, 5) for index in range(40)]
    assert len({plan.classes for plan in plans}) > 30
    assert {c for plan in plans for c in plan.classes} == set(range(10))
    assert len({episode_seed(0, index) for index in range(40)}) == 40
    assert plan_episode(1, 0, [20] * 10, 5) != plans[0]


def test_loaded_episode_is_grouped_by_class_and_disjoint(make_images):
    data = load_data(make_images())
    reader = ImageReader(data, small_preprocess)
    plan = plan_episode(0, 0, [8] * 6, 4)
    episode = load_episode(plan, data, reader, shots=3, queries=5)
    assert episode.index == 0
    assert episode.folders == tuple(data.classes[c].folder for c in plan.classes)
    assert episode.class_names == [data.classes[c].words for c in plan.classes]
    assert episode.support_images.shape == (12, 3, 8, 8)
    assert episode.query_images.shape == (20, 3, 8, 8)
    assert episode.support_labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert episode.query_labels.tolist() == [label for label in range(4) for _ in range(5)]
    everything = torch.cat([episode.support_images, episode.query_images]).flatten(1)
    assert len(torch.unique(everything, dim=0)) == 32
    first = reader.read(data.classes[plan.classes[0]], plan.orders[0][0])
    assert torch.equal(episode.support_images[0], small_preprocess.normalise(first))


def test_unreadable_image_is_replaced_by_the_next_of_its_class(make_images):
    root = make_images()
    data = load_data(root)
    plan = plan_episode(0, 0, [8] * 6, 2)
    whole = load_episode(plan, data, ImageReader(data, small_preprocess), shots=2, queries=5)
    entry = data.classes[plan.classes[0]]
    files = entry.files
    bad = files[plan.orders[0][1]]
    (root / bad).write_bytes(b"damaged")
    with pytest.raises(FewShotError, match=bad):
        load_episode(plan, data, ImageReader(data, small_preprocess), shots=2, queries=5)
    lenient = ImageReader(data, small_preprocess, skip_unreadable=True)
    episode = load_episode(plan, data, lenient, shots=2, queries=5)
    assert episode.skipped == (bad,)
    # The other class is as before; in this one everything after the bad image moves up by one.
    assert torch.equal(episode.support_images[2:], whole.support_images[2:])
    assert torch.equal(episode.support_images[0], whole.support_images[0])
    assert torch.equal(episode.support_images[1], whole.query_images[0])
    last = small_preprocess.normalise(lenient.read(entry, plan.orders[0][7]))
    assert torch.equal(episode.query_images[4], last)
    (root / files[plan.orders[0][0]]).write_bytes(b"damaged")
    lenient = ImageReader(data, small_preprocess, skip_unreadable=True)
    with pytest.raises(FewShotError, match="has 6 readable images but 7 are needed"):
        load_episode(plan, data, lenient, shots=2, queries=5)
