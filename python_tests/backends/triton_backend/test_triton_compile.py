"""Every Triton kernel, compiled without a GPU for the three generations that it is meant for.

It must compile, fit, keep its values in registers, and use the tensor cores for 16-bit types.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import proofs
import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")

pytestmark = pytest.mark.slow

# KiB of shared memory that a program may use. 8.0 itself has 163, but its configurations also serve
# 8.6, 8.9 and 12.x, which have 99.
SHARED_MEMORY = {80: 99, 90: 227, 100: 227}
# Bytes a thread. A tile that does not fit spills hundreds; a few are ptxas's own trade of registers
# for occupancy, with registers to spare, and differ from one release to the next.
MAX_STACK = 32
ATTENTION = ("forward", "backward", "statistics")
# Instructions of a warp in a pass of each main loop, for bfloat16, heads of width 64, 197 rows and
# Triton 3.8 on 9.0: 64 keys or queries, then the 16 that hold the rest. Of the stationary ones a
# warp has 32 in forward, else 16. The number of tensor-core products says what work a budget is
# for. The second of a name: whether there are weights.
LOOPS_OF = "3.8"
MAIN_LOOPS = {
    ("attention_forward_kernel", True): [(16, 665), (10, 305)],  # 635, 292
    ("attention_forward_kernel", False): [(16, 625), (10, 295)],  # 595, 280
    ("grad_query_kernel", True): [(12, 340), (9, 135)],  # 325, 128
    ("grad_query_kernel", False): [(12, 275), (9, 122)],  # 261, 116
    ("grad_key_value_kernel", True): [(16, 490), (10, 182)],  # 467, 173
    ("grad_key_value_kernel", False): [(16, 415), (10, 155)],  # 397, 148
    ("row_statistics_kernel", True): [(4, 575)],  # 549
    ("row_statistics_kernel", False): [(4, 530)],  # 508
    ("column_statistics_kernel", True): [(4, 400)],  # 383
    ("column_statistics_kernel", False): [(4, 405)],  # 388
}
TENSOR_CORE = {80: {"mma.sync"}, 90: {"wgmma.mma_async"}, 100: {"tcgen05.mma"}}


# The element type, width and number of heads' rows: these give whole blocks, a rest, and both.
HEADS = [
    ("bfloat16", 64, 197),
    ("bfloat16", 128, 50),
    ("bfloat16", 256, 64),
    ("float16", 72, 96),  # tiles of 64 and 16 columns, as for 80
]
SINGLES, WIDE_SINGLES = ("float32", 80, 197), ("float32", 256, 197)
MANY_ROWS = ("bfloat16", 128, 1100)
# Kernels that are launched alike on all GPUs, as those of float32 are, are compiled in all their
# cases for the one with the least shared memory, and in the first of these for the others.
LEAST = min(SHARED_MEMORY, key=lambda arch: SHARED_MEMORY[arch])


def attention_case(kernel: str, heads: tuple[str, int, int], **more: Any) -> dict[str, Any]:
    dtype, head_dim, length = heads
    return {"kernel": kernel, "dtype": dtype, "head_dim": head_dim, "length": length, **more}


def attention_cases(arch: int) -> list[dict[str, Any]]:
    """Causal kernels: they do all that the others do, and hide keys besides."""
    chosen = [(kernel, heads) for heads in HEADS for kernel in ("forward", "backward")]
    chosen += [("statistics", heads) for heads in (HEADS[0], HEADS[2])]
    chosen.append(("forward", SINGLES))
    if arch == LEAST:
        chosen += [("backward", SINGLES), ("forward", WIDE_SINGLES), ("statistics", WIDE_SINGLES)]
    else:  # where these have tiles of their own
        chosen += [("forward", MANY_ROWS), ("statistics", MANY_ROWS)]
    cases = [attention_case(kernel, heads) for kernel, heads in chosen]
    few = [attention_case("forward", HEADS[0], queries=16)] if arch != LEAST else []
    return [{**case, "is_causal": True} for case in (*cases, *few)]


def counted_cases(arch: int) -> list[dict[str, Any]]:
    """Those whose main loops have budgets."""
    if arch != 90:
        return []
    return [
        attention_case(kernel, HEADS[0], weighted=weighted, count_loops=True)
        for kernel in ATTENTION
        for weighted in (True, False)
    ]


def relevance_cases() -> list[dict[str, Any]]:
    clip = {"kernel": "relevance", "width": 768, "features": 512}
    return [
        {**clip, "dtype": "bfloat16", "images": 100, "classes": 5},
        {**clip, "dtype": "bfloat16", "images": 4, "classes": 100},
        {**clip, "dtype": "float32", "images": 4, "classes": 5},
        {**clip, "dtype": "float32", "images": 100, "classes": 100},
        {**clip, "dtype": "float16", "images": 4, "classes": 5, "norm": False},
        {**clip, "dtype": "float32", "images": 4, "classes": 5, "proj": False, "features": 768},
    ]


def selection_cases() -> list[dict[str, Any]]:
    sizes = [(197, 5), (50, 5), (577, 100), (1100, 5), (4096, 5)]
    return [
        {"kernel": "selection", "dtype": "float32", "length": length, "classes": classes}
        for length, classes in sizes
    ]


def dropout_cases() -> list[dict[str, Any]]:
    return [
        {"kernel": "dropout", "dtype": dtype, "width": width}
        for dtype, width in [("bfloat16", 768), ("float32", 768), ("float16", 200)]
    ]


def norm_cases() -> list[dict[str, Any]]:
    return [
        {"kernel": "add_norm", "dtype": dtype, "width": width}
        for dtype, width in [("bfloat16", 768), ("float32", 512), ("float32", 1280)]
    ]


def dropped_product_cases() -> list[dict[str, Any]]:
    return [
        {"kernel": "dropped_product", "dtype": dtype, "width": 768, "length": length}
        for dtype, length in [("bfloat16", 197), ("float32", 197), ("bfloat16", 9)]
    ]


def cases_of(arch: int) -> list[dict[str, Any]]:
    alike = (relevance_cases, selection_cases, dropout_cases, norm_cases, dropped_product_cases)
    cases = [case for make in alike for case in make()[: None if arch == LEAST else 1]]
    return [
        {**case, "arch": arch} for case in (*attention_cases(arch), *counted_cases(arch), *cases)
    ]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The compiler's word on each kernel, kept for as long as the kernels stay as they are."""
    cases = [case for arch in SHARED_MEMORY for case in cases_of(arch)]
    files = [*proofs.operator_sources(), Path(__file__).with_name("triton_offline.py")]
    kept = proofs.place("triton-compiled", files, cases, triton.__version__, torch.__version__)
    if proofs.is_done(kept):
        return [json.loads(line) for line in kept.read_text().splitlines()]
    repository = Path(__file__).parents[3]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    environment["PYTHONPATH"] = str(repository)
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("triton_offline.py"))],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) >= len(cases)
    proofs.keep(kept, done.stdout)
    return results


def test_every_kernel_compiles(compiled: list[dict[str, Any]]) -> None:
    for arch in SHARED_MEMORY:
        assert {result["kernel"] for result in compiled if result["case"]["arch"] == arch} == {
            "log_weights_kernel",
            "attention_forward_kernel",
            "grad_query_kernel",
            "grad_key_value_kernel",
            "row_statistics_kernel",
            "column_statistics_kernel",
            "relevance_kernel",
            "philox_dropout_kernel",
            "dropped_product_kernel",
            "factor_gradient_kernel",
            "add_splits_kernel",
            "add_norm_kernel",
            "add_norm_backward_kernel",
            "selection_kernel",
        }


def test_shared_memory_suffices(compiled: list[dict[str, Any]]) -> None:
    too_large = [
        result
        for result in compiled
        if result["shared"] > SHARED_MEMORY[result["case"]["arch"]] * 1024
    ]
    assert not too_large


def test_tiles_fit_into_registers(compiled: list[dict[str, Any]]) -> None:
    assert not [result for result in compiled if result["stack"] > MAX_STACK or result["local"]]


def test_tensor_cores_serve_16_bit_types(compiled: list[dict[str, Any]]) -> None:
    for result in compiled:
        case, used = result["case"], set(result["tensor_core"])
        plain = ("dropout", "dropped_product", "add_norm")
        if case["kernel"] in plain or result["kernel"] == "log_weights_kernel":
            continue
        if case["dtype"] == "float32":
            assert not used, f"float32 must not be rounded to what tensor cores take: {result}"
        elif result["stationary_rows"] >= 64:
            assert used == TENSOR_CORE[case["arch"]], result
        else:  # fewer rows than the instructions of 9.0 and 10.0 need
            assert used == {"mma.sync"}, result


def test_rows_are_read_in_wide_pieces(compiled: list[dict[str, Any]]) -> None:
    """16 bytes at a time, also for a head_dim such as 72 that is no multiple of 16."""
    for result in compiled:
        if result["case"]["kernel"] in ATTENTION and result["kernel"] != "log_weights_kernel":
            assert result["wide_loads"] >= 4, result
            assert result["narrow_loads"] == 0, result


def test_main_loops_stay_short(compiled: list[dict[str, Any]]) -> None:
    if not triton.__version__.startswith(LOOPS_OF):
        pytest.skip(f"budgets are of Triton {LOOPS_OF}, this is {triton.__version__}")
    counted = {
        (result["kernel"], result["case"].get("weighted", True)): [
            (loop["products"], loop["instructions"]) for loop in result["loops"]
        ]
        for result in compiled
        if result["loops"]
    }
    assert counted.keys() == MAIN_LOOPS.keys()
    for name, loops in counted.items():
        assert [products for products, _ in loops] == [products for products, _ in MAIN_LOOPS[name]]
        for (_, found), (_, budget) in zip(loops, MAIN_LOOPS[name], strict=True):
            assert 0.9 * budget <= found <= budget, f"{name}: {found}, the budget is {budget}"
