"""Linear CKA against ckatorch, its invariances, its chance level, and the measure made of it."""

import numpy as np
import pytest
import torch
from analysis.views import found, make_view

from tir_kernels.analysis import linear_cka, permutation_null
from tir_kernels.analysis.measures.cka import Cka


def pair(count=24, seed=0):
    """Two related matrices of different widths, far from the origin."""
    random = np.random.default_rng(seed)
    first = random.standard_normal((count, 10))
    second = first @ random.standard_normal((10, 7)) + 2 * random.standard_normal((count, 7))
    return first + 3, second - 5


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("seed", range(3))
def test_against_ckatorch(parts, seed):
    ckatorch = pytest.importorskip("ckatorch", reason="needs ckatorch")
    batches = [torch.from_numpy(each).unflatten(0, (parts, -1)) for each in pair(seed=seed)]
    expected = ckatorch.cka_batch(*batches).item()
    found = linear_cka(*pair(seed=seed), batch_size=24 // parts)
    assert found == pytest.approx(expected, rel=1e-9)
    assert 0.1 < found < 0.9


def test_invariances():
    first, second = pair()
    random = np.random.default_rng(1)
    expected = linear_cka(first, second)
    turn, _ = np.linalg.qr(random.standard_normal((10, 10)))
    assert linear_cka(first @ turn, second) == pytest.approx(expected)
    assert linear_cka(3 * first, second / 7) == pytest.approx(expected)
    assert linear_cka(first + 1e4, second) == pytest.approx(expected)
    assert linear_cka(second, first) == pytest.approx(expected)
    order = random.permutation(24)
    assert linear_cka(first[order], second[order]) == pytest.approx(expected)
    assert linear_cka(first, first) == pytest.approx(1)
    stretched = first * np.arange(1, 11)
    assert linear_cka(first, stretched) < 0.95, "other linear maps count"


def test_unrelated_features_have_0_where_the_biased_estimate_has_not():
    ckatorch = pytest.importorskip("ckatorch", reason="needs ckatorch")
    random = np.random.default_rng(0)
    found, biased = [], []
    for _ in range(200):
        first, second = random.standard_normal((2, 12, 30))
        found.append(linear_cka(first, second))
        biased.append(ckatorch.cka_base(torch.from_numpy(first), torch.from_numpy(second)).item())
    assert abs(np.mean(found)) < 3 * np.std(found) / 200**0.5
    assert min(found) < 0, "it is not cut off"
    assert np.mean(biased) > 0.5


def test_permutation_null():
    first, second = pair()
    state = torch.get_rng_state()
    null = permutation_null(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(null, permutation_null(first, second))
    assert not torch.equal(null, permutation_null(first, second, seed=1))
    assert null.shape == (100,)
    assert abs(null.mean()) < 0.05
    assert linear_cka(first, second) > null.max()


@pytest.mark.parametrize("count", [0, 1, 3])
def test_too_few_images(count):
    assert np.isnan(linear_cka(np.ones((count, 2)), np.ones((count, 3))))


def test_constant_features():
    first, _ = pair()
    assert np.isnan(linear_cka(first, np.full((24, 5), 0.1)))


def test_a_last_batch_is_never_too_small():
    first, second = pair(26)
    assert np.isfinite(linear_cka(first, second, batch_size=24))
    assert linear_cka(first[:5], second[:5], batch_size=4) == linear_cka(first[:5], second[:5])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.ones((5, 2)), np.ones((6, 2))), "as many rows"),
        ((np.ones(5), np.ones((5, 2))), r"first must have shape \(n, D\)"),
        ((np.ones((5, 2)), np.ones((5, 2)), 3), "batch_size must be at least 4"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        linear_cka(*arguments)


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_the_measure(prefix):
    measure = Cka()
    passes = [
        [make_view(prefix, 10 * time + block, 6, block=block, num_blocks=3) for block in range(3)]
        for time in range(2)
    ]
    for views in passes:
        findings = {
            (each.name, each.block): each for view in views for each in measure.of_block(view)
        }
        assert len(findings) == 6
        tokens = [view.output.mean(1) if prefix == 0 else view.output[:, 0] for view in views]
        before = [view.output.mean(1) if prefix == 0 else view.output[:, 0] for view in passes[0]]
        for block in range(3):
            for name, other in (("first pass", before[block]), ("last block", tokens[-1])):
                finding = findings[f"CKA with the {name}", block]
                expected = linear_cka(tokens[block], other)
                torch.testing.assert_close(finding.values, torch.full((6,), expected))
                assert finding.chance == 0


def test_groups_are_as_alone():
    view = make_view(1, batch=10, class_embeddings=torch.randn(2, 3, 12))
    later = make_view(1, seed=1, batch=10, class_embeddings=view.class_embeddings)
    measure = Cka()
    found(measure, view)
    findings = found(measure, later)
    for own in (slice(0, 5), slice(5, 10)):
        expected = linear_cka(later.output[own, 0], view.output[own, 0])
        values = findings["CKA with the first pass"].values[own]
        torch.testing.assert_close(values, torch.full((5,), expected))


def test_three_images_have_none():
    for finding in found(Cka(), make_view(1, batch=3)).values():
        assert finding.averages() == [(None, 0.0)]
