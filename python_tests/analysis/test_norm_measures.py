"""Norm outliers and massive activations, against NumPy; what Gaussian tokens have is chance."""

import numpy as np
import pytest
import torch
from analysis.views import found, make_view

from tir_kernels.analysis.measures.massive_activations import MassiveActivations
from tir_kernels.analysis.measures.medians import median
from tir_kernels.analysis.measures.norm_outliers import NormOutliers

RATIO, SHARE = (
    "largest over median norm of patches",
    "share of patches with norm above median + 6 MAD",
)


@pytest.mark.parametrize("count", [1, 2, 7, 10])
def test_median_is_numpys(count):
    values = torch.randn(3, 2, count, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(median(values), np.median(values, axis=-1))


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_outliers_against_numpy(prefix, dtype):
    output = make_view(prefix, patches=49, dtype=dtype).output
    output[1, prefix + 3] *= 30
    output[2, prefix : prefix + 2] *= 20
    output[3, :prefix] *= 100  # no patches
    findings = found(NormOutliers(), make_view(prefix, patches=49, output=output))
    norms = np.linalg.norm(output.double().numpy()[:, prefix:], axis=2)
    middle = np.median(norms, axis=1, keepdims=True)
    spread = 1.4826 * np.median(np.abs(norms - middle), axis=1, keepdims=True)
    assert findings.keys() == {RATIO, SHARE}
    np.testing.assert_allclose(findings[RATIO].values, norms.max(1) / middle[:, 0], rtol=1e-5)
    expected = (norms > middle + 6 * spread).mean(1)
    np.testing.assert_allclose(findings[SHARE].values, expected)
    np.testing.assert_allclose(expected, [0, 1 / 49, 2 / 49, 0])
    assert 0 < findings[SHARE].chance < 1e-8


def test_gaussian_tokens_have_the_chance_levels():
    generator = torch.Generator().manual_seed(0)
    output = 5 * torch.randn(400, 50, 12, generator=generator)
    view = make_view(1, batch=400, patches=49, output=output, hidden=output)
    findings = found(NormOutliers(deviations=2.0), view)
    ratio, share = findings.values()
    above = (ratio.values > ratio.chance).float().mean()
    assert 0.4 < above < 0.6
    assert 0.5 < share.values.mean() / share.chance < 2
    largest, ratio, number = found(MassiveActivations(), view).values()
    for finding in (largest, ratio):
        assert 0.4 < (finding.values > finding.chance).float().mean() < 0.6
    assert number.values.eq(0).all()


def test_massive_activations_against_numpy():
    output = make_view(1).output
    output[0, 0, 3] = -2000
    output[1, 5, [1, 2]] = torch.tensor([150.0, 90.0])
    output[2] *= 1000  # large, but not beside the others
    findings = found(MassiveActivations(times_median=100.0), make_view(1, output=output))
    sizes = np.abs(output.double().numpy()).reshape(4, -1)
    middle = np.median(sizes, axis=1)
    largest, ratio, number = findings.values()
    np.testing.assert_allclose(largest.values, sizes.max(1), rtol=1e-6)
    np.testing.assert_allclose(ratio.values, sizes.max(1) / middle, rtol=1e-5)
    expected = ((sizes > 100) & (sizes > 100 * middle[:, None])).sum(1)
    assert number.values.tolist() == expected.tolist() == [1, 1, 0, 0]
    torch.testing.assert_close(largest.chance, torch.from_numpy(ratio.chance * middle).float())


@pytest.mark.parametrize("measure", [NormOutliers(), MassiveActivations()])
def test_scale_does_not_matter_to_ratios(measure):
    view = make_view(5)
    once = found(measure, view)
    thrice = found(measure, make_view(5, output=3 * view.output))
    for name in once:
        if name != "largest activation":
            torch.testing.assert_close(once[name].values, thrice[name].values)


def test_no_patches_no_outliers():
    assert not found(NormOutliers(), make_view(1, patches=0))
