"""The published program's own weights, outputs and gradients of token re-weighting."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import tir_kernels
from tir_kernels import JointSpace, WeightRule

GOLDEN = Path(__file__).parent / "golden"
# The published program writes "all classes" as 5 whatever their number, so where there are ten
# classes and a count of 5 is not all of them, its rules agree with ours for "linear" only.


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("operator_*.npz")), ids=lambda p: p.stem)
def test_reweighting(path: Path, backend: str, device: str) -> None:
    golden = np.load(path)
    meta = json.loads(str(golden["meta"]))

    def load(name: str) -> torch.Tensor:
        return torch.from_numpy(golden[name]).to(device)

    tokens = load("tokens").requires_grad_()
    weights, counts = tir_kernels.token_weights(
        tokens,
        load("class_embeddings"),
        joint_space=JointSpace(
            load("norm_weight"), load("norm_bias"), meta["norm_eps"], load("proj")
        ),
        rule=WeightRule(
            meta["rule"], meta["strength"], meta["center"], top_ratio=meta["top_ratio"]
        ),
        num_prefix_tokens=meta["num_prefix_tokens"],
        backend=backend,
    )
    out = tir_kernels.reweight_tokens(tokens, weights)
    out.backward(load("grad_out"))
    prefix = meta["num_prefix_tokens"]
    num_selected = int(counts.shape[1] * meta["top_ratio"]) * len(golden["class_embeddings"])
    assert (counts.sum(1) == num_selected).all()
    assert (weights[:, :prefix] == 1).all()
    np.testing.assert_allclose(weights[:, prefix:].cpu(), golden["weights"], atol=1e-6)
    np.testing.assert_allclose(out.detach().cpu(), golden["out"], atol=1e-5)
    np.testing.assert_allclose(tokens.grad.cpu(), golden["grad_tokens"], atol=1e-5)
