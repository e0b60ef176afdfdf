"""The operators on the CPU: compiled kernels for the instruction set that the machine has.

The kernels get raw pointers. They convert float16 and bfloat16 as they read and write, keep sums
in float32, and run on the threads of torch's own OpenMP runtime: as many as
``torch.get_num_threads()`` says, so a DataLoader worker stays on its one thread.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import sys
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from .common import TYPE_NAMES, address, row_grid, with_contiguous_rows

MAX_HEAD_DIM = 256
_NOT_BUILT = (
    "the compiled kernels (tir_kernels._C) are not there: install a C++17 compiler "
    "(Debian, Ubuntu: apt install g++) and install tir_kernels again"
)


def unavailable_reason() -> str:
    try:
        _kernels()
    except ImportError as error:
        is_missing = isinstance(error, ModuleNotFoundError)
        return _NOT_BUILT if is_missing else f"tir_kernels._C does not load: {error}"
    except ValueError as error:  # TIR_CPU_ARCH asks for what the machine cannot do
        return f"TIR_CPU_ARCH: {error}"
    return ""


def device_reason(device: torch.device) -> str:
    return "" if device.type == "cpu" else f"the cpu backend takes CPU tensors, not {device.type}"


def description() -> str:
    """The instruction set in use, those that could be, and where threads come from."""
    kernels = _kernels()
    usable = ", ".join(name for name, is_supported in kernels.architectures() if is_supported)
    return (
        f"{kernels.architecture()} (this machine runs {usable}), "
        f"{torch.get_num_threads()} threads from {kernels.thread_source()}"
    )


def relevance(
    tokens: Tensor,
    class_embeddings: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float | None,
    proj: Tensor | None,
    num_prefix_tokens: int,
) -> Tensor:
    batch, length, width = tokens.shape
    num_groups, num_classes, joint_width = class_embeddings.shape
    tokens = with_contiguous_rows(tokens)
    classes = class_embeddings.to(torch.float32).contiguous()
    gain = None if norm_weight is None else norm_weight.to(torch.float32).contiguous()
    offset = None if norm_bias is None else norm_bias.to(torch.float32).contiguous()
    matrix = None if proj is None else _projection(proj, tokens.dtype)
    output = tokens.new_empty((batch, num_classes, length - num_prefix_tokens), dtype=torch.float32)
    _kernels().relevance(
        (batch, length, num_prefix_tokens, width, joint_width, num_groups, num_classes),
        TYPE_NAMES[tokens.dtype],
        (tokens.data_ptr(), tokens.stride(0), 0, tokens.stride(1)),
        "float32",
        classes.data_ptr(),
        norm_eps is not None,
        "float32",
        address(gain),
        address(offset),
        0.0 if norm_eps is None else norm_eps,
        "float32" if matrix is None else TYPE_NAMES[matrix.dtype],
        address(matrix),
        *((0, 0) if matrix is None else matrix.stride()),
        output.data_ptr(),
        torch.get_num_threads(),
    )
    return output


def token_weights(
    tokens: Tensor,
    class_embeddings: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float | None,
    proj: Tensor | None,
    table: Tensor,
    top_k: int,
    num_prefix_tokens: int,
) -> tuple[Tensor, Tensor]:
    scores = relevance(
        tokens, class_embeddings, norm_weight, norm_bias, norm_eps, proj, num_prefix_tokens
    )
    batch, num_classes, num_patches = scores.shape
    table = table.contiguous()
    counts = scores.new_empty((batch, num_patches), dtype=torch.int32)
    weights = scores.new_empty((batch, num_prefix_tokens + num_patches))
    _kernels().select_tokens(
        (batch, num_classes, num_patches, num_prefix_tokens),
        top_k,
        scores.data_ptr(),
        table.data_ptr(),
        counts.data_ptr(),
        weights.data_ptr(),
        torch.get_num_threads(),
    )
    return weights, counts


def attention_forward(
    query: Tensor, key: Tensor, value: Tensor, weights: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    weights = weights.contiguous()
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    log_sum_exp = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    _kernels().attention_forward(
        tuple(query.shape),
        TYPE_NAMES[query.dtype],
        scale,
        row_grid(query),
        row_grid(key),
        row_grid(value),
        weights.data_ptr(),
        output.data_ptr(),
        log_sum_exp.data_ptr(),
        torch.get_num_threads(),
    )
    return output, log_sum_exp


def attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    scale: float,
    needs_weights_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_output, output = with_contiguous_rows(grad_output), with_contiguous_rows(output)
    weights, log_sum_exp = weights.contiguous(), log_sum_exp.contiguous()
    grad_query = query.new_empty(query.shape)
    grad_key = key.new_empty(key.shape)
    grad_value = value.new_empty(value.shape)
    grad_weights = weights.new_empty(weights.shape if needs_weights_grad else (0,))
    _kernels().attention_backward(
        tuple(query.shape),
        TYPE_NAMES[query.dtype],
        scale,
        row_grid(grad_output),
        row_grid(query),
        row_grid(key),
        row_grid(value),
        weights.data_ptr(),
        row_grid(output),
        log_sum_exp.data_ptr(),
        grad_query.data_ptr(),
        grad_key.data_ptr(),
        grad_value.data_ptr(),
        grad_weights.data_ptr() if needs_weights_grad else 0,
        torch.get_num_threads(),
    )
    return grad_query, grad_key, grad_value, grad_weights


def philox_dropout(
    rows: Tensor,
    seeds: Tensor,
    step: Tensor,
    stream: int,
    first_branch: int,
    threshold: int,
    scale: float,
    output: Tensor,
) -> None:
    seeds = seeds.contiguous()
    _kernels().philox_dropout(
        tuple(output.shape),
        TYPE_NAMES[rows.dtype],
        TYPE_NAMES[output.dtype],
        rows.data_ptr(),
        seeds.data_ptr(),
        int(step),
        stream,
        first_branch,
        threshold,
        scale,
        output.data_ptr(),
        torch.get_num_threads(),
    )


def bias_activation(
    hidden: Tensor, bias: Tensor | None, kind: str, grad_output: Tensor | None
) -> Tensor:
    output = torch.empty_like(hidden)
    width = hidden.shape[-1]
    bias = None if bias is None else bias.contiguous()
    if bias is not None and bias.dtype not in TYPE_NAMES:
        bias = bias.to(torch.float32)
    if grad_output is not None:
        grad_output = grad_output.to(hidden.dtype)
    _kernels().activation(
        kind,
        hidden.numel() // width,
        width,
        TYPE_NAMES[hidden.dtype],
        hidden.data_ptr(),
        "float32" if bias is None else TYPE_NAMES[bias.dtype],
        address(bias),
        address(grad_output),
        output.data_ptr(),
        torch.get_num_threads(),
    )
    return output


@functools.cache
def _kernels() -> ModuleType:
    kernels = importlib.import_module("tir_kernels._C")
    kernels.architecture()  # raises where TIR_CPU_ARCH cannot be served
    kernels.use_openmp(*_openmp_addresses())
    return kernels


def _openmp_addresses() -> tuple[int, int]:
    """GOMP_parallel and omp_in_parallel as torch itself calls them; (0, 0) where it has none.

    A second pool of threads beside torch's would compete with it for the same cores. The dynamic
    linker resolves torch's calls in the process's global scope first (a preloaded runtime), then in
    torch's own dependencies: the same order here finds the same functions.
    """
    libraries: list[str | None] = [None]
    suffix = ".dylib" if sys.platform == "darwin" else ".so"
    libraries.append(str(Path(torch.__file__).parent / "lib" / f"libtorch_cpu{suffix}"))
    for library in libraries:
        try:
            loaded = ctypes.CDLL(library)
            functions = (loaded.GOMP_parallel, loaded.omp_in_parallel)
        except (OSError, AttributeError):
            continue
        parallel, in_parallel = (
            ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions
        )
        return parallel, in_parallel
    return 0, 0


def _projection(proj: Tensor, token_dtype: torch.dtype) -> Tensor:
    """The projection in a type and layout that the kernels take.

    bfloat16 tokens are rounded to bfloat16 after the norm, as a bfloat16 LayerNorm does, only if
    the projection is bfloat16 too; every other pair is multiplied in float32.
    """
    if not (proj.dtype == token_dtype == torch.bfloat16):
        proj = proj.to(torch.float32)
    return proj if 1 in proj.stride() else proj.contiguous()
