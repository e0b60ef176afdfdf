"""Memory that a training may take: a container's limit counts, and packed matrices know theirs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fewshot.training_cases import EPISODES, METHOD, make_model, make_tokenizer

from tir_kernels.fewshot import finetune_episodes
from tir_kernels.fewshot.train import memory
from tir_kernels.towers import packable, products


@pytest.fixture
def limits(monkeypatch, tmp_path: Path) -> Path:
    """A folder for "machine", "limit" and "use", in place of the system's own files."""
    files = {"_MEMORY_INFO": "machine", "_GROUP_LIMIT": "limit", "_GROUP_USE": "use"}
    for name, file in files.items():
        monkeypatch.setattr(memory, name, tmp_path / file)
    (tmp_path / "machine").write_text("MemTotal: 4000 kB\nMemFree: 9 kB\nMemAvailable: 3000 kB\n")
    return tmp_path


@pytest.mark.parametrize(
    ("limit", "use", "available", "total"),
    [
        (None, None, 3000 * 1024, 4000 * 1024),
        ("max", "5", 3000 * 1024, 4000 * 1024),
        ("1000000", "400000", 600_000, 1_000_000),
        ("9000000", "1", 3000 * 1024, 4000 * 1024),
    ],
)
def test_the_smaller_of_machine_and_container_counts(limits, limit, use, available, total) -> None:
    if limit is not None:
        (limits / "limit").write_text(limit)
        (limits / "use").write_text(use)
    assert memory.available_bytes(torch.device("cpu")) == available
    assert memory._total_bytes() == total


def test_matrices_are_packed_where_an_eighth_of_the_memory_holds_them(limits, monkeypatch) -> None:
    monkeypatch.setattr(products, "is_faster", lambda dtype: True)
    model = make_model().requires_grad_(False)
    matrices = packable(model)
    needed = 8 * 2 * sum(each.nbytes for each in matrices)
    assert needed > 0
    for kilobytes, expected in ((needed // 1024 + 1, matrices), (needed // 1024 - 1, ())):
        (limits / "machine").write_text(f"MemTotal: {kilobytes} kB\n")
        found = memory.packed_matrices(model)
        assert [id(each) for each in found] == [id(each) for each in expected]


def test_steps_multiply_in_packed_form_and_leave_none(packed_shapes, monkeypatch) -> None:
    monkeypatch.setattr(products, "is_faster", lambda dtype: dtype == torch.float32)
    model = make_model()
    finetune_episodes(model, make_tokenizer(), EPISODES[:1], METHOD)
    model.requires_grad_(False)
    # An MLP has two matrices, an attention two; but the first blocks need no gradient of tokens.
    blocks = len(model.visual.transformer.resblocks) + len(model.transformer.resblocks)
    assert 4 * blocks <= len(packed_shapes) <= 8 * blocks + 4
    assert not products._matrices
