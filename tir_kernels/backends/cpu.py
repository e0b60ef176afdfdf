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
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from .common import (
    KERNEL_DTYPES,
    TYPE_NAMES,
    address,
    attention_problem,
    empty_gradients,
    projection_arguments,
    relevance_problem,
    relevance_shape,
    result_strides,
    row_grid,
    type_name,
    with_contiguous_rows,
)
from .inputs import AttentionInputs, BackwardInputs, RelevanceInputs, StatisticsInputs
from .optional import AttentionLaunch, DropoutInputs, SelectionLaunch
from .protocol import AttentionStatistics, Gradients, Pair

_NOT_BUILT = (
    "the compiled kernels (tir_kernels._C) are not there: install a C++17 compiler "
    "(Debian, Ubuntu: apt install g++) and install tir_kernels again"
)


class CpuBackend:
    """Compiled kernels for tensors on the CPU."""

    name = "cpu"
    max_head_dim = 256
    dtypes = KERNEL_DTYPES

    def unavailable(self) -> str:
        try:
            _kernels()
        except ImportError as error:
            is_missing = isinstance(error, ModuleNotFoundError)
            return _NOT_BUILT if is_missing else f"tir_kernels._C does not load: {error}"
        except ValueError as error:  # TIR_CPU_ARCH asks for what the machine cannot do
            return f"TIR_CPU_ARCH: {error}"
        return ""

    def refusal(self, device: torch.device) -> str:
        is_served = device.type == "cpu"
        return "" if is_served else f"the cpu backend takes CPU tensors, not {device.type}"

    def description(self) -> str:
        """The instruction set in use, those that could be, and where threads come from; or nothing
        where the kernels do not run.
        """
        if self.unavailable():
            return ""
        kernels = _kernels()
        usable = ", ".join(name for name, is_supported in kernels.architectures() if is_supported)
        return (
            f"{kernels.architecture()} (this machine runs {usable}), "
            f"{torch.get_num_threads()} threads from {kernels.thread_source()}"
        )

    def relevance(self, inputs: RelevanceInputs) -> Tensor:
        inputs = _as_kernels_take_them(inputs)
        output = inputs.tokens.new_empty(relevance_shape(inputs), dtype=torch.float32)
        _relevance_launch(inputs)(*_tensors_of(inputs), output)
        return output

    def token_weights(self, inputs: RelevanceInputs, table: Tensor, top_k: int) -> Pair:
        inputs = _as_kernels_take_them(inputs)
        return self.selection_launch(inputs, top_k)(*_tensors_of(inputs), table.contiguous())

    def selection_launch(self, inputs: RelevanceInputs, top_k: int) -> SelectionLaunch:
        find_relevance = _relevance_launch(inputs)
        shape = batch, _, num_patches = relevance_shape(inputs)
        sizes = (*shape, inputs.num_prefix_tokens)
        counts_shape, weights_shape = (batch, num_patches), inputs.tokens.shape[:2]

        def launch(tokens: Tensor, classes: Tensor, *rest: Tensor | None) -> Pair:
            *parts, table = rest
            scores = tokens.new_empty(shape, dtype=torch.float32)
            counts = tokens.new_empty(counts_shape, dtype=torch.int32)
            weights = tokens.new_empty(weights_shape, dtype=torch.float32)
            find_relevance(tokens, classes, *parts, scores)
            _kernels().select_tokens(
                sizes,
                top_k,
                scores.data_ptr(),
                address(table),
                counts.data_ptr(),
                weights.data_ptr(),
                torch.get_num_threads(),
            )
            return weights, counts

        return launch

    def takes(self, inputs: RelevanceInputs, table: Tensor) -> bool:
        taken = _tensors_of(_as_kernels_take_them(inputs))
        pairs = zip(_tensors_of(inputs), taken, strict=True)
        return table.is_contiguous() and all(ours is theirs for ours, theirs in pairs)

    def attention_forward(self, inputs: AttentionInputs) -> Pair:
        query, key, value, weights, *_ = inputs
        weights = None if weights is None else weights.contiguous()
        return self.attention_launch(inputs)(query, key, value, weights)

    def attention_launch(self, inputs: AttentionInputs) -> AttentionLaunch:
        query, key, value = inputs[:3]
        problem = attention_problem(inputs)
        of_query, of_key, of_value = (rows.stride()[:3] for rows in (query, key, value))
        shape, strides = query.shape, result_strides(query)
        of_output = strides[:3]
        batch, heads, length, _ = shape
        sums_shape, sums_strides = (batch, heads, length), (heads * length, length, 1)

        def launch(query: Tensor, key: Tensor, value: Tensor, weights: Tensor | None) -> Pair:
            output = query.new_empty_strided(shape, strides)
            log_sum_exp = query.new_empty_strided(sums_shape, sums_strides, dtype=torch.float32)
            _kernels().attention_forward(
                *problem,
                (query.data_ptr(), *of_query),
                (key.data_ptr(), *of_key),
                (value.data_ptr(), *of_value),
                address(weights),
                (output.data_ptr(), *of_output),
                log_sum_exp.data_ptr(),
                torch.get_num_threads(),
            )
            return output, log_sum_exp

        return launch

    def attention_backward(self, inputs: AttentionInputs, backward: BackwardInputs) -> Gradients:
        query, key, value, weights, *_ = inputs
        output, log_sum_exp, grad_output, needs_weights_grad, is_packed = backward
        grad_output, output = with_contiguous_rows(grad_output), with_contiguous_rows(output)
        weights = None if weights is None else weights.contiguous()
        log_sum_exp = log_sum_exp.contiguous()
        grads = empty_gradients(inputs, is_packed)
        weights_shape = (key.shape[0], key.shape[2]) if needs_weights_grad else (0,)
        grad_weights = log_sum_exp.new_empty(weights_shape)
        _kernels().attention_backward(
            *attention_problem(inputs),
            *map(row_grid, (grad_output, query, key, value)),
            address(weights),
            row_grid(output),
            log_sum_exp.data_ptr(),
            *map(row_grid, grads),
            grad_weights.data_ptr() if needs_weights_grad else 0,
            torch.get_num_threads(),
        )
        return (*grads, grad_weights)

    def attention_statistics(self, inputs: StatisticsInputs) -> AttentionStatistics:
        query, key, weights, _, num_prefix_tokens, _ = inputs
        weights = None if weights is None else weights.contiguous()
        results = AttentionStatistics(
            *(
                rows.new_empty(rows.shape[:3], dtype=torch.float32)
                for rows in (key, key, query, query)
            )
        )
        _kernels().attention_statistics(
            *attention_problem(inputs),
            row_grid(query),
            row_grid(key),
            address(weights),
            num_prefix_tokens,
            *map(address, results),
            torch.get_num_threads(),
        )
        return results

    def philox_dropout(self, inputs: DropoutInputs, output: Tensor) -> None:
        rows, seeds, step, *numbers = inputs
        seeds = seeds.contiguous()
        _kernels().philox_dropout(
            tuple(output.shape),
            TYPE_NAMES[rows.dtype],
            TYPE_NAMES[output.dtype],
            rows.data_ptr(),
            seeds.data_ptr(),
            int(step),
            *numbers,
            output.data_ptr(),
            torch.get_num_threads(),
        )

    def bias_activation(
        self, hidden: Tensor, bias: Tensor | None, kind: str, grad_output: Tensor | None
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
            type_name(bias),
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


def _relevance_launch(inputs: RelevanceInputs) -> Callable[..., None]:
    """What fills relevance (B, C, N) from tensors like these, which it does not hold."""
    sizes, token_type, (_, *token_strides) = relevance_problem(inputs, inputs.tokens)
    _, classes, gain, _, eps, proj, _ = inputs
    class_type, gain_type = type_name(classes), type_name(gain)
    proj_type, _, *proj_strides = projection_arguments(proj)

    def launch(
        tokens: Tensor,
        classes: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        proj: Tensor | None,
        output: Tensor,
    ) -> None:
        _kernels().relevance(
            sizes,
            token_type,
            (tokens.data_ptr(), *token_strides),
            class_type,
            classes.data_ptr(),
            eps is not None,
            gain_type,
            address(norm_weight),
            address(norm_bias),
            eps or 0.0,
            proj_type,
            address(proj),
            *proj_strides,
            output.data_ptr(),
            torch.get_num_threads(),
        )

    return launch


def _as_kernels_take_them(inputs: RelevanceInputs) -> RelevanceInputs:
    tokens, classes, gain, offset, eps, proj, num_prefix_tokens = inputs
    tokens = with_contiguous_rows(tokens)
    classes = classes.to(torch.float32).contiguous()
    proj = None if proj is None else _projection(proj, tokens.dtype)
    parts = classes, _float32(gain), _float32(offset), eps, proj
    return RelevanceInputs(tokens, *parts, num_prefix_tokens)


def _tensors_of(inputs: RelevanceInputs) -> tuple[Tensor | None, ...]:
    tokens, classes, gain, offset, _, proj, _ = inputs
    return tokens, classes, gain, offset, proj


def _projection(proj: Tensor, token_dtype: torch.dtype) -> Tensor:
    """The projection in a type and layout that the kernels take.

    bfloat16 tokens are rounded to bfloat16 after the norm, as a bfloat16 LayerNorm does, only if
    the projection is bfloat16 too; every other pair is multiplied in float32.
    """
    if not (proj.dtype == token_dtype == torch.bfloat16):
        proj = proj.to(torch.float32)
    return proj if 1 in proj.stride() else proj.contiguous()


def _float32(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(torch.float32).contiguous()
