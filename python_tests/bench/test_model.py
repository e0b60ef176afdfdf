"""The model of attention's time on a GPU: its plans, its arithmetic, and what it prints."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench import model, model_command
from bench.backward_launches import backward_plan
from bench.hopper import expect_with_wgmma
from bench.launches import (
    FORWARD,
    Launch,
    Work,
    forward_launch,
    statistics_launch,
)
from bench.model import (
    GPUS,
    LIKELY,
    MULTIPROCESSORS,
    PEERS,
    SHARED_MEMORY,
    bound_microseconds,
    expect,
    expect_relevance,
    expect_selection,
    expect_statistics,
    grid_seconds,
    peer_microseconds,
)
from bench.sass.counts import committed
from bench.shapes import Point, split_heads
from bench.token_launches import relevance_plan, selection_launch

ROOT = Path(__file__).resolve().parents[2]
H100 = GPUS["h100"]
# L, B·H -> microseconds forward and backward, found by hand from the same figures. Forward for
# copies of 15 instructions and blocks shared out by makespan, but whole chunks for a row's last
# keys; backward of parts before their loops lost branches (240 and 393 instructions, now 199 and
# 286). Of whole heads, shared memory is busy for 108 cycles in a step, or 92 and 34 in two sweeps,
# and for 24 in 32 keys' part of the gradients of queries; heads of 50 tokens move 51 KB.
BY_HAND = {
    (50, 60): (5, (9, 10)),
    (50, 300): (5.4, (8.5, 9.5)),
    (50, 768): (9, (15, 16.5)),
    (50, 3072): (31, (54, 56)),
    (197, 60): (9, (16, 19)),
    (197, 300): (23, (51, 61)),
    (197, 768): (43, (99, 120)),
    (197, 3072): (165, (388, 473)),
    (257, 300): (37, (79, 96)),
    (257, 768): (72, (155, 189)),
    (257, 3072): (290, (613, 749)),
    (577, 300): (104, (360, 449)),
    (577, 768): (247, (901, 1125)),
    (577, 3072): (980, (3520, 4390)),
}
# d, L, B·H -> microseconds backward, in the same way: of whole heads, shared memory is busy for 156
# cycles in a step, or 144 and 50 in two sweeps; of parts for 164 or 208 with 16 rows and 32.
WIDE_BY_HAND = {
    (72, 256, 300): 87,
    (72, 256, 768): 171,
    (80, 257, 120): 41,
    (80, 257, 300): 119,
    (80, 257, 768): 237,
    (72, 729, 400): 1150,
}


def point(length: int, heads: int, head_dim: int = 64, dtype: str = "bfloat16") -> Point:
    return Point(length, head_dim, *split_heads(heads), 5, dtype)


@pytest.mark.parametrize(("length", "heads"), BY_HAND)
def test_times_are_those_found_by_hand(length: int, heads: int) -> None:
    forward, (low, high) = BY_HAND[length, heads]
    for direction, expected in (("forward", forward), ("backward", (low + high) / 2)):
        likely, fastest, slowest = expect(point(length, heads), direction, H100).microseconds
        assert 0.7 * expected < likely < 1.3 * expected
        assert fastest <= likely <= slowest


@pytest.mark.parametrize(("width", "length", "heads"), WIDE_BY_HAND)
def test_times_of_wide_heads_are_those_found_by_hand(width: int, length: int, heads: int) -> None:
    found = expect(point(length, heads, width), "backward", H100)
    assert 0.8 * WIDE_BY_HAND[width, length, heads] < found.microseconds[0]
    assert found.microseconds[0] < 1.2 * WIDE_BY_HAND[width, length, heads]


def test_the_forward_plan_is_shared_out_by_the_time_that_it_takes() -> None:
    """Three blocks a multiprocessor where two run side by side would leave the third alone."""
    of_few, of_many = (
        forward_launch(577, heads, MULTIPROCESSORS, SHARED_MEMORY) for heads in (300, 3072)
    )
    assert (of_few.blocks, of_few.warps) == (5 * 300, 4)
    assert (of_many.blocks, of_many.warps) == (3072, 4)


def test_more_instructions_take_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward kernel is bound by them; and nothing goes below the time of memory."""
    before = expect(point(197, 768), "forward", H100)
    assert before.by == "issue"
    found, release = committed()
    loop, step = found[FORWARD].main_loops

    def with_instructions(number: int) -> model.Expected:
        main_loops = [replace(loop, instructions=number), step]
        changed = found | {FORWARD: replace(found[FORWARD], main_loops=main_loops)}
        monkeypatch.setattr(model, "committed", lambda: (changed, release))
        return expect(point(197, 768), "forward", H100)

    # A pass of four warps over 3 chunks, two rounds, is most of a block's instructions.
    after = with_instructions(2 * loop.instructions)
    assert 1.5 < after.microseconds[0] / before.microseconds[0] < 1.8
    least = with_instructions(1)
    assert least.by != "issue"
    assert least.microseconds[0] > bound_microseconds(point(197, 768), "forward", H100)


def test_what_takes_longest_is_named() -> None:
    assert expect(point(50, 3072), "forward", H100).by == "HBM"
    assert expect(point(577, 768), "backward", H100).by == "shared memory"
    assert expect(point(50, 60), "backward", H100).by == "launch"


def test_a_last_block_alone_costs_more_than_beside_another() -> None:
    work = Work(instructions=4e4, products=0, exponentials=0, shared=0, cache_bytes=0)

    def cycles(blocks: int) -> float:
        return grid_seconds(Launch(blocks, 4, 60 * 1024), work, 237, LIKELY) * model.CLOCK

    # Two blocks fit on a multiprocessor; 1e4 cycles of issue each.
    alone, together = 1e4 / 0.42, 2e4 / 0.70
    assert cycles(MULTIPROCESSORS) == pytest.approx(alone)
    assert cycles(2 * MULTIPROCESSORS) == pytest.approx(together)
    assert cycles(300) == pytest.approx(together + alone)
    assert cycles(4 * MULTIPROCESSORS) == pytest.approx(2 * together)


def test_bounds_and_peers_follow_from_rates() -> None:
    # Four tensors of 768 x 197 x 64 elements, and weights.
    some = point(197, 768)
    assert bound_microseconds(some, "forward", H100) == pytest.approx(25.85, rel=0.01)
    # 4 x 768 x 256 x 256 x 64 operations, at 335 and 282 TFLOP/s, and a launch.
    assert peer_microseconds(PEERS["cuDNN"], some, "forward", H100) == pytest.approx(41.0, rel=0.01)
    assert peer_microseconds(PEERS["FA2"], some, "forward", H100) == pytest.approx(48.2, rel=0.01)
    # Nothing is faster than memory.
    few = point(16, 3072)
    moved = bound_microseconds(few, "forward", H100)
    assert peer_microseconds(PEERS["cuDNN"], few, "forward", H100) > moved
    # A length of its own rate.
    long = point(1024, 512)
    work = 4 * 512 * 1024**2 * 64 / 373e12
    assert peer_microseconds(PEERS["cuDNN"], long, "forward", H100) == pytest.approx(
        1e6 * work + 2.5
    )


@pytest.mark.parametrize("other", [point(197, 60, head_dim=80), point(197, 60, dtype="float32")])
def test_other_kernels_were_not_counted(other: Point) -> None:
    with pytest.raises(ValueError, match="bfloat16 and heads of width 64"):
        expect(other, "forward", H100)


def test_the_table_says_that_it_is_a_model() -> None:
    done = CliRunner().invoke(
        model_command.main, ["--lengths", "197", "--heads", "300,12", "--gpu", "h200"]
    )
    assert done.exit_code == 0, done.output
    for direction in ("forward", "backward"):
        assert f"MODEL, not a measurement, ±30 %: attention {direction}" in done.output
    assert "h200" in done.output
    assert "600 × 4" in done.output
    assert "55.0 KiB, 2" in done.output
    assert "before attention, L 197, D 768, E 512, 5 classes, h200" in done.output
    assert "relevance, float32" in done.output
    assert "131 × 8" in done.output
    assert "forward with wgmma and TMA, NOT WRITTEN" in done.output


@pytest.mark.parametrize(
    ("length", "heads", "by_hand", "by"),
    [
        # 64 x 584 pairs are 2336 cycles, twice that at half speed; 3000 tiles are at most 23 each.
        (577, 300, 2.5 + 23 * 2 * 2336 / 1755, "tensor"),
        (257, 60, 2.5 + 3 * 2 * 1056 / 1755, "tensor"),  # 64 x 264 pairs, 300 tiles
        # Four tensors and the weights of 64 images.
        (50, 768, 2.5 + (768 * 4 * 50 * 64 * 2 + 64 * 50 * 4) / 3e6, "HBM"),
    ],
)
def test_wgmma_takes_as_long_as_by_hand(length: int, heads: int, by_hand: float, by: str) -> None:
    expected = expect_with_wgmma(point(length, heads), H100)
    assert expected.by == by
    assert expected.microseconds[0] == pytest.approx(by_hand)


@pytest.mark.parametrize(("images", "by_hand"), [(5, 31), (25, 35), (64, 38)])
def test_relevance_takes_as_long_as_by_hand(images: int, by_hand: float) -> None:
    """It is bound by reading the projection from the L2 cache, in blocks of few tokens."""
    expected = expect_relevance(Point(197, 64, images, 12, 5, "bfloat16"), H100)
    assert expected.by == "L2"
    assert 0.8 * by_hand < expected.microseconds[0] < 1.2 * by_hand


def test_float32_takes_longer_and_statistics_take_less_than_attention_both_ways() -> None:
    point_ = Point(197, 64, 25, 12, 5, "bfloat16")
    relevance = expect_relevance(point_, H100).microseconds[0]
    in_float = expect_relevance(replace(point_, dtype="float32"), H100).microseconds[0]
    # Six times the products, but not six times the copies.
    assert 1.5 * relevance < in_float < 6 * relevance
    both = sum(expect(point_, way, H100).microseconds[0] for way in ("forward", "backward"))
    assert 5 < expect_statistics(point_, H100).microseconds[0] < both


def test_selection_takes_a_search_and_a_launch() -> None:
    few, more = (expect_selection(Point(197, 64, images, 12, 5, "bfloat16")) for images in (5, 64))
    assert few.microseconds == more.microseconds
    assert model.LAUNCH * 1e6 < few.microseconds[0] < 8
    assert few.launch == Launch(5, 5, 6 * 196 * 4)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize(("dtype", "element"), [("bfloat16", "bfloat16"), ("float32", "float")])
def test_plans_before_attention_are_those_of_the_launchers(
    tmp_path: Path, dtype: str, element: str
) -> None:
    program = compiled("token_launches.cpp", tmp_path, f"-DTIR_ELEMENT={element}")
    rng = random.Random(0)
    shapes = [(5, 197, 12, 512, 5), (25, 197, 12, 512, 5), (64, 197, 12, 512, 5)]
    shapes += [
        (rng.randint(1, 80), rng.randint(2, 700), rng.randint(1, 24), rng.randint(1, 128) * 8,
         rng.randint(1, 300))
        for _ in range(100)
    ]  # fmt: skip
    launches = answers(program, shapes)
    assert len(launches) == 4 * len(shapes)
    for index, (images, length, heads, joint, classes) in enumerate(shapes):
        some = Point(length, 64, images, heads, classes, dtype, joint)
        found = [
            relevance_plan(some, MULTIPROCESSORS, SHARED_MEMORY).launch,
            selection_launch(some),
        ]
        if dtype == "bfloat16":
            found += [statistics_launch(length, images * heads)] * 2
        printed = launches[4 * index : 4 * index + len(found)]
        assert [(each.blocks, 32 * each.warps, each.shared) for each in found] == printed, some


@pytest.mark.slow
def test_the_program_starts_it() -> None:
    command = [sys.executable, "-m", "bench", "model", "--lengths", "50", "--heads", "12"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "MODEL" in done.stdout


def compiled(name: str, folder: Path, *options: str) -> Path:
    """A program of this folder, which asks the C++ launchers."""
    program = folder / "launches"
    sources = [Path(__file__).with_name(name), ROOT / "csrc/emulation/gpu.cpp"]
    include = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/include'}"]
    flags = ["-std=c++17", "-O0", "-fno-strict-aliasing", *options]
    subprocess.run(["g++", *flags, *include, "-o", program, *sources], check=True)
    return program


def answers(program: Path, shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Numbers of each line that the program prints for lines of numbers."""
    asked = "".join(" ".join(map(str, shape)) + "\n" for shape in shapes)
    done = subprocess.run([program], input=asked, capture_output=True, text=True, check=True)
    return [tuple(map(int, line.split())) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_plans_are_those_of_the_launchers(tmp_path: Path) -> None:
    program = compiled("launches.cpp", tmp_path)
    rng = random.Random(0)
    shapes = [(length, heads) for length in (1, 16, 50, 197, 257, 577, 1024) for heads in (1, 60)]
    shapes += [(rng.randint(1, 1100), rng.choice((3, 12, 60, 300, 768, 3072))) for _ in range(200)]
    gpu = (MULTIPROCESSORS, SHARED_MEMORY)
    for width in (64, 80):
        launches = answers(program, [(length, *split_heads(h), width) for length, h in shapes])
        assert len(launches) == 2 * len(shapes)
        for (length, heads), forward, backward in zip(
            shapes, launches[::2], launches[1::2], strict=True
        ):
            expected = [(backward_plan(length, heads, *gpu, width).launch, backward)]
            if width == 64:
                expected.append((forward_launch(length, heads, *gpu), forward))
            for launch, found in expected:
                assert (launch.blocks, 32 * launch.warps, launch.shared) == found, (length, heads)
