"""The gate on what the CUDA compiler makes of the kernels' loops."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench.sass import tools
from bench.sass.__main__ import main
from bench.sass.budgets import BUDGETS, over_budget
from bench.sass.counts import blocks_per_multiprocessor, committed, count
from bench.sass.listing import UnknownListing, kernels, readable
from bench.sass.loops import count_pass, find_loops

SYMBOL = "_ZN3tir4cuda3_GL6kernelINS0_8bfloat16ELi64ELb1EEEvi"
USAGE = {"REG": 200, "STACK": 0, "SHARED": 1024}


def listing(code: str) -> str:
    """What nvdisasm writes of a kernel; labels end with a colon, the rest are instructions."""
    lines, address = [f".text.{SYMBOL}:"], 0
    for line in textwrap.dedent(code).strip().splitlines():
        if line.endswith(":"):
            lines.append(line)
        else:
            word = line if line.startswith("@") else f"     {line}"
            lines.append(f"        /*{address:04x}*/   {word} ;")
            address += 16
    return "\n".join(lines)


# A loop over rounds with one over chunks inside, in which rows are copied and then multiplied. One
# part, for rows that are not aligned, lies behind the end of the kernel, as does a slow path.
NESTED = listing("""
    S2R R0, SR_TID.X
    .L_round:
    MOV R1, RZ
    .L_chunk:
    BSSY B0, `(.L_met)
    .L_copy:
    @!P3 BRA `(.L_unaligned)
    @P2 BRA `(.L_missing)
    IMAD R4, R5, R6, RZ
    IMAD R7, R5, R6, RZ
    .L_missing:
    LDGSTS.E.BYPASS.128 [R13], desc[UR6][R26.64], P0
    .L_copied:
    @!P1 BRA `(.L_copy)
    BSYNC B0
    .L_met:
    LDSM.16.M88.4 R8, [R9]
    HMMA.16816.F32.BF16 R4, R8, R10, R4
    HMMA.16816.F32.BF16 R4, R8, R10, R4
    BRA.DIV UR4, `(.L_diverged)
    MUFU.EX2 R4, R4
    .L_again:
    @P0 BRA `(.L_rescale)
    .L_rescaled:
    @P4 BRA P5, `(.L_chunk)
    .L_store:
    STG.E.128 desc[UR6][R2.64], R4
    @P6 BRA `(.L_store)
    @P0 BRA `(.L_round)
    EXIT
    .L_unaligned:
    LDG.E.U16 R4, desc[UR6][R2.64]
    STS.U16 [R4], R5
    BRA `(.L_copied)
    .L_diverged:
    WARPSYNC.COLLECTIVE R8, `(.L_again)
    BRA `(.L_again)
    .L_rescale:
    FMUL R4, R4, R5
    BRA `(.L_rescaled)
""")


def test_loops_are_found_wherever_their_parts_lie() -> None:
    ((symbol, code),) = kernels(NESTED).items()
    whole = find_loops(code)
    chains = list(whole.below())
    assert [len(chain) - 1 for chain in chains] == [1, 2, 3, 2]  # round, chunk, copy, store
    round_, chunk, copy, store = (chain[-1] for chain in chains)
    opcodes = [code[index].opcode for index in sorted(chunk.own)]
    assert "FMUL" in opcodes
    assert "WARPSYNC.COLLECTIVE" in opcodes
    assert "LDG.E.U16" not in opcodes
    assert {code[index].opcode for index in copy.own} >= {"LDG.E.U16", "LDGSTS.E.BYPASS.128"}
    assert "EXIT" not in {code[index].opcode for index in round_.body}
    assert len(store.own) == 2
    assert readable(symbol) == "kernel<bfloat16, 64, 1>"


def test_a_pass_is_the_steady_way_through_a_loop() -> None:
    (code,) = kernels(NESTED).values()
    found = count(code, USAGE)
    (loop,) = found.main_loops
    # BSSY and BSYNC, LDSM, 2 HMMA, MUFU and three branches; neither a rescaling nor a slow path.
    assert loop.products == 2
    assert loop.instructions == 9
    assert loop.kinds == {"HMMA": 2, "LDSM": 1, "MUFU.EX2": 1, "BSSY": 1, "BRA": 3}
    assert loop.around == [2, 2]  # MOV and the jump back; S2R and EXIT
    assert found.copies == [6.0]  # the longest way, for a row that exists and is aligned
    assert found.stores == [2.0]
    assert found.spills == 0


def test_a_way_through_a_given_inner_loop() -> None:
    """Two loops of which a kernel takes one, as the two halves of a backward pass."""
    (code,) = kernels(
        listing("""
        @P0 BRA `(.L_second)
        .L_first:
        HMMA.16816.F32 R4, R8, R10, R4
        @P1 BRA `(.L_first)
        EXIT
        .L_second:
        MOV R1, RZ
        MOV R2, RZ
        .L_inside:
        HMMA.16816.F32 R4, R8, R10, R4
        HMMA.16816.F32 R4, R8, R10, R4
        @P1 BRA `(.L_inside)
        EXIT
        """)
    ).values()
    whole = find_loops(code)
    first, second = sorted(whole.inner, key=lambda loop: loop.header)
    assert count_pass(code, whole, first)["instructions"] == 2
    assert count_pass(code, whole, second)["instructions"] == 4
    assert [loop.around for loop in count(code, USAGE).main_loops] == [[2], [4]]


def test_a_kernel_that_only_sums_has_main_loops_too() -> None:
    """Innermost loops; where tensor cores multiply they count for nothing."""
    text = """
        .L_class:
        MOV R1, RZ
        .L_bit:
        ISETP.GE.U32.AND P0, PT, R1, R2, PT
        REDUX.SUM UR4, R5
        @P1 BRA `(.L_bit)
        REDUX.MAX UR4, R5
        @P2 BRA `(.L_class)
        EXIT
        """
    (code,) = kernels(listing("NOP\n" + textwrap.dedent(text))).values()
    (loop,) = count(code, USAGE).main_loops
    assert (loop.instructions, loop.products, loop.kinds["REDUX"]) == (3, 0, 1)
    assert loop.around == [3, 2]
    multiplying = "NOP\n.L_main:\nHMMA.16816.F32 R4, R8, R10, R4\n@P0 BRA `(.L_main)\n"
    (code,) = kernels(listing(multiplying + textwrap.dedent(text))).values()
    (loop,) = count(code, USAGE).main_loops
    assert loop.products == 1


def test_a_table_of_branches_is_followed() -> None:
    text = listing("""
        .L_loop:
        BRX R4 -0x4a40                     (*"BRANCH_TARGETS .L_a,.L_b"*)
        .L_a:
        STL [R1], R2
        @P0 BRA `(.L_loop)
        .L_b:
        EXIT
        STL [R1], R2
        """)
    text = text.replace(f".text.{SYMBOL}:", f".text.{SYMBOL}:\n        /*0000*/   NOP ;", 1)
    (code,) = kernels(text).values()
    assert code[1].next == (2, 4)
    assert count(code, USAGE).spills == 1  # the other one is never reached


@pytest.mark.parametrize(
    "code",
    ["BRX R4 -0x4a40", "BRA `(.L_nowhere)"],
)
def test_a_branch_that_leads_nowhere_known_is_refused(code: str) -> None:
    with pytest.raises(UnknownListing):
        kernels(listing(code))


def test_a_loop_with_two_entries_is_refused() -> None:
    text = """
        NOP
        @P0 BRA `(.L_second)
        .L_first:
        FADD R1, R1, R2
        .L_second:
        FADD R1, R1, R3
        @P1 BRA `(.L_first)
        .L_main:
        HMMA.16816.F32 R4, R8, R10, R4
        @P2 BRA `(.L_main)
        EXIT
        """
    (code,) = kernels(listing(text)).values()
    with pytest.raises(UnknownListing, match="into the middle of a loop"):
        count(code, USAGE)


def test_a_kernel_that_begins_within_a_loop_is_refused() -> None:
    (code,) = kernels(listing(".L_main:\n@P0 BRA `(.L_main)\nEXIT")).values()
    with pytest.raises(UnknownListing, match="begins within a loop"):
        find_loops(code)


def test_a_listing_of_something_else_is_refused() -> None:
    with pytest.raises(UnknownListing, match="nvdisasm"):
        kernels("Fatbin elf code:\n")


@pytest.mark.parametrize(
    ("symbol", "name"),
    [
        (
            "_ZN3tir4cuda44_GLOBAL__N__37d4994c_6_one_cu_2b7eb4c1_28586"
            "24attention_forward_kernelINS0_8bfloat16ELi64EEEvNS_16AttentionForwardE",
            "attention_forward_kernel<bfloat16, 64>",
        ),
        ("_ZN3tir4cuda4_GLO12delta_kernelIfEEvNS_17AttentionBackwardEPfb", "delta_kernel<float>"),
        ("_ZN3tir4cuda4_GLO16sum_heads_kernelEPKfPflll", "sum_heads_kernel"),
        (
            "_ZN3tir4cuda4_GLO16relevance_kernelINS0_7float16ELi3ELb0EEEvNS_9RelevanceE",
            "relevance_kernel<float16, 3, 0>",
        ),
    ],
)
def test_names_are_readable(symbol: str, name: str) -> None:
    assert readable(symbol) == name


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "blocks"),
    [
        (237, 79 * 1024, 4, 2),  # registers
        (237, 28 * 1024, 2, 4),
        (124, 40 * 1024, 4, 4),
        (168, 40 * 1024, 4, 3),
        (169, 40 * 1024, 4, 2),
        (64, 120 * 1024, 4, 1),  # shared memory
        (16, 1024, 1, 32),  # blocks
        (16, 1024, 8, 8),  # warps
    ],
)
def test_blocks_of_a_multiprocessor(registers: int, shared: int, warps: int, blocks: int) -> None:
    assert blocks_per_multiprocessor(registers, shared, warps, 90) == blocks


FORWARD = "attention_forward_kernel<bfloat16, 64>"


def test_the_budgets_are_close_to_the_committed_counts() -> None:
    """And met by them: a budget that leaves much room is no gate."""
    found, _ = committed()
    assert list(over_budget(found)) == []
    for name, budget in BUDGETS.items():
        for loop, limits in zip(found[name].main_loops, budget.loops, strict=True):
            assert limits.instructions <= 1.06 * loop.instructions, name


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"registers": 256}, "256 registers"),
        ({"spills": 2}, "spilled"),
        ({"stack": 8}, "spilled"),
        ({"copies": [43.0, 60.0]}, "60 instructions per 16-byte copy"),
        ({"copies": []}, "no loop that does a 16-byte copy"),
        ({"stores": [41.0]}, "store"),
        ({"main_loops": []}, "cut otherwise"),
    ],
)
def test_what_is_over_budget_is_named(change: dict, word: str) -> None:
    found, _ = committed()
    found[FORWARD] = replace(found[FORWARD], **change)
    (what,) = over_budget(found)
    assert FORWARD in what
    assert word in what


@pytest.mark.parametrize(
    ("kinds", "instructions", "word"),
    [
        ({}, 701, "701 instructions"),
        ({"LDSM": 40}, 689, "40 LDSM"),
        ({"FMUL": 64}, 689, "260 arithmetic"),
        ({"BSSY": 8}, 689, "17 branch"),
    ],
)
def test_a_loop_over_budget_is_named(kinds: dict[str, int], instructions: int, word: str) -> None:
    found, _ = committed()
    loop, step = found[FORWARD].main_loops
    loop = replace(loop, kinds=loop.kinds | kinds, instructions=instructions)
    found[FORWARD] = replace(found[FORWARD], main_loops=[loop, step])
    (what,) = over_budget(found)
    assert word in what


def test_a_kernel_that_is_gone_is_named() -> None:
    found, _ = committed()
    del found[FORWARD]
    (what,) = over_budget(found)
    assert "no such kernel" in what


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    done = CliRunner().invoke(main, [])
    assert done.exit_code == 1
    assert f"no nvcc in CUDA_HOME={tmp_path}" in done.output
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(tools.ToolError, match="no nvdisasm"):
        tools.disassembler("nvdisasm")


def test_counts_of_files_are_not_kept(tmp_path: Path) -> None:
    file = tmp_path / "some.cubin"
    file.touch()
    done = CliRunner().invoke(main, ["--write", str(file)])
    assert done.exit_code == 2
    assert "FILES" in done.output


@pytest.fixture(scope="module")
def compiler() -> Path:
    """nvcc, where a disassembler is too."""
    try:
        for name in ("cuobjdump", "nvdisasm"):
            tools.disassembler(name)
        return tools.nvcc()
    except tools.ToolError as error:
        pytest.skip(error.message)


@pytest.mark.slow
def test_an_object_is_read_for_one_architecture(compiler: Path, tmp_path: Path) -> None:
    source, built = tmp_path / "reverse.cu", tmp_path / "reverse.o"
    source.write_text("""
    #if __CUDA_ARCH__ >= 900
    #define ROOM 90
    #else
    #define ROOM 80
    #endif
    __global__ void reverse(float* numbers) {
      __shared__ float kept[ROOM];
      kept[threadIdx.x] = numbers[threadIdx.x];
      __syncthreads();
      numbers[threadIdx.x] = kept[31 - threadIdx.x];
    }
    """)
    codes = [f"-gencode=arch=compute_{each},code=sm_{each}" for each in (80, 90)]
    subprocess.run([compiler, *codes, "-c", "-o", built, source], check=True)
    (old,), (new,) = (tools.counts_of([built], each).values() for each in (80, 90))
    assert old.shared == 4 * 80
    assert new.shared in (4 * 90, 1024 + 4 * 90)  # with what is reserved from 9.0 on, or without
    assert old.main_loops == new.main_loops == []
    with pytest.raises(tools.ToolError, match="no code for sm_100"):
        tools.counts_of([built], 100)


@pytest.fixture(scope="module")
def cubins(compiler: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The kernels as nvcc compiles them now."""
    _, release = committed()
    if (here := tools.release(compiler)) != release:
        pytest.skip(f"counts and budgets are of nvcc {release}, this is {here}")
    return tools.compile_kernels(tmp_path_factory.mktemp("sass"))


@pytest.mark.slow
def test_no_loop_is_over_budget(cubins: list[Path]) -> None:
    found = tools.counts_of(cubins)
    assert list(over_budget(found)) == []
    kept, _ = committed()
    assert found == kept, "python -m bench.sass --write keeps the new counts"
