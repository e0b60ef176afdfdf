"""Compiles, for GPUs that need not be here, what the Triton backend would launch.

Run as a program, in a process without TRITON_INTERPRET: reads a JSON list of cases from standard
input, writes one JSON line a compiled kernel. A case names a launcher and its inputs; the launcher
runs with kernels that only write down what they are given, so what is compiled is what is launched.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.sass import tools
from tir_kernels.backends.inputs import AttentionInputs, BackwardInputs, StatisticsInputs
from tir_kernels.backends.optional import DropoutInputs
from tir_kernels.backends.triton.kernels import (
    add_norm,
    attention_backward,
    attention_forward,
    attention_statistics,
    dropout,
    dropped_product,
    key_weights,
    relevance,
    selection,
)

MODULES = (
    attention_forward,
    attention_backward,
    attention_statistics,
    add_norm,
    dropout,
    dropped_product,
    key_weights,
    relevance,
    selection,
)
POINTER_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
TENSOR_CORE = re.compile(r"\b(tcgen05\.mma|wgmma\.mma_async|mma\.sync)\b")
# 16 bytes and more at a time, and 2 bytes at a time.
WIDE_LOAD = re.compile(r"cp\.async\.\w+\.shared\.global.*, 0x10|ld\.global\S*\.v(?:4|8)\.b32")
NARROW_LOAD = re.compile(r"ld\.global\S*\.b16")
OPTIONS = ("num_warps", "num_stages")


class Recorder:
    """Stands for a kernel: keeps the arguments of its launches."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.launches: list[dict[str, Any]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def record(*args: Any, **kwargs: Any) -> None:
            self.launches.append(dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs)

        return record


def recorded_launches(case: dict[str, Any]) -> list[tuple[Any, dict[str, Any]]]:
    """The kernels that a case launches and the arguments they get."""
    capability = tuple(divmod(case["arch"], 10))
    recorders = []
    for module in MODULES:
        if hasattr(module, "device_capability"):
            module.device_capability = lambda device: capability
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            kernel = getattr(module, name)
            recorder = Recorder(kernel.kernel if isinstance(kernel, Recorder) else kernel)
            setattr(module, name, recorder)
            recorders.append(recorder)
    run_launcher(case)
    return [(r.kernel, launch) for r in recorders for launch in r.launches]


def run_launcher(case: dict[str, Any]) -> None:
    dtype = getattr(torch, case["dtype"])
    length = case.get("length", 197)

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    if case["kernel"] in ("forward", "backward", "statistics"):
        packed = tensor(2, length, 3, 12, case["head_dim"]).permute(2, 0, 3, 1, 4)
        query, key, value = packed
        query = query[:, :, : case.get("queries", length)]
        weights = tensor(2, length, dtype=torch.float32) if case.get("weighted", True) else None
        is_causal = case.get("is_causal", False)
        inputs = AttentionInputs(query, key, value, weights, 0.125, is_causal)
        if case["kernel"] == "forward":
            attention_forward.attention_forward(inputs)
            return
        if case["kernel"] == "statistics":
            described = StatisticsInputs(query, key, weights, 0.125, 1, is_causal)
            attention_statistics.attention_statistics(described)
            return
        output = tensor(2, 12, length, case["head_dim"])
        log_sums = tensor(2, 12, length, dtype=torch.float32)
        backward = BackwardInputs(output, log_sums, output, weights is not None)
        attention_backward.attention_backward(inputs, backward)
    elif case["kernel"] == "relevance":
        width, features = case["width"], case["features"]
        has_norm, has_proj = case.get("norm", True), case.get("proj", True)
        norm = tensor(width, dtype=torch.float32) if has_norm else None
        relevance.relevance(
            tensor(case["images"], length, width),
            tensor(1, case["classes"], features),
            norm,
            norm,
            1e-5 if has_norm else None,
            tensor(width, features) if has_proj else None,
            1,
        )
    elif case["kernel"] == "add_norm":
        rows, change = tensor(50, case["width"]), tensor(50, case["width"], dtype=torch.bfloat16)
        gain = tensor(case["width"], dtype=torch.float32)
        add_norm.add_norm(rows, change, gain, gain, 1e-5, rows, change)
        add_norm.add_norm_backward(rows, gain, rows, change, 1e-5, rows, change)
    elif case["kernel"] == "dropped_product":
        rows, factor = tensor(2, 25, length, case["width"]), tensor(2, 3, 16, case["width"])
        seeds, step = tensor(2, dtype=torch.int64), tensor(1, dtype=torch.int64)
        inputs = DropoutInputs(rows, seeds, step, 5, 0, 1 << 14, 4 / 3)
        product = tensor(2, 3, 25 * length, 16)
        dropped_product.dropped_product(inputs, factor, product)
        dropped_product.factor_gradient(inputs, product, factor)
    elif case["kernel"] == "dropout":
        rows = tensor(2, 25, length, case["width"])
        kept = tensor(2, 3, 25, length, case["width"])
        seeds, step = tensor(2, dtype=torch.int64), tensor(1, dtype=torch.int64)
        dropout.philox_dropout(rows, seeds, step, 5, 0, 1 << 14, 4 / 3, kept)
    else:
        scores = tensor(2, case["classes"], length - 1, dtype=torch.float32)
        selection.select_and_weigh(scores, tensor(case["classes"] + 1), 5, 1)


def signature_of(given: Any, is_general: bool) -> tuple[str, bool]:
    """Triton's type for an argument, and whether it is known to be a multiple of 16.

    Args:
        given: Argument of a launch.
        is_general: Whether one compiled kernel serves all of its values.
    """
    if given is None or (type(given) is int and given == 1 and not is_general):
        return "constexpr", False  # as Triton does at a launch
    if isinstance(given, torch.Tensor):
        return POINTER_TYPES[given.dtype], True
    if isinstance(given, int):
        return "i32", given % 16 == 0 and not is_general
    return "fp32", False


def compile_launch(kernel: Any, launch: dict[str, Any], case: dict[str, Any]) -> dict[str, Any]:
    """The compiled launch: its shared memory, registers, stack, tensor-core instructions, loops."""
    options = {name: launch.pop(name) for name in OPTIONS if name in launch}
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        name, given = parameter.name, launch[parameter.name]
        if parameter.is_constexpr:
            signature[name], constants[name] = "constexpr", given
            continue
        members = given if isinstance(given, tuple) else (given,)
        kinds = [signature_of(member, parameter.do_not_specialize) for member in members]
        signature[name] = tuple(kind for kind, _ in kinds) if given is members else kinds[0][0]
        for place, (member, (kind, is_divisible)) in enumerate(zip(members, kinds, strict=True)):
            path = (index, place) if given is members else (index,)
            if kind == "constexpr":
                constants[path] = member
            if is_divisible:
                attributes[path] = [["tt.divisibility", 16]]
    stationary = "BLOCK_KEY" if kernel.__name__ == "grad_key_value_kernel" else "BLOCK_QUERY"
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", case["arch"], 32), options=options)
    ptx = compiled.asm["ptx"]
    return {
        "kernel": kernel.__name__,
        "stationary_rows": constants.get(stationary, constants.get("BLOCK_ROWS", 0)),
        "shared": compiled.metadata.shared,
        "tensor_core": sorted(set(TENSOR_CORE.findall(ptx))),
        "wide_loads": len(WIDE_LOAD.findall(ptx)),
        "narrow_loads": len(NARROW_LOAD.findall(ptx)),
        "loops": main_loops(compiled.asm["cubin"]) if case.get("count_loops") else [],
        **resource_usage(compiled.asm["cubin"]),
        **options,
    }


def main_loops(cubin: bytes) -> list[dict[str, int]]:
    """Instructions and tensor-core products of a pass of each main loop, in the code's order."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        (counts,) = tools.counts_of([Path(file.name)]).values()
    return [
        {"products": loop.products, "instructions": loop.instructions} for loop in counts.main_loops
    ]


def resource_usage(cubin: bytes) -> dict[str, int]:
    """Registers, stack (spills live there) and local memory a thread, from the machine code."""
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [program, "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text))
    return {name.lower(): int(found[name]) for name in ("REG", "STACK", "LOCAL")}


def run_case(case: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"case": case, **compile_launch(kernel, launch, case)}
        for kernel, launch in recorded_launches(case)
    ]


def main() -> None:
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what every release so far does
    cases = json.load(sys.stdin)
    with ProcessPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        for results in pool.map(run_case, cases):
            for result in results:
                print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
