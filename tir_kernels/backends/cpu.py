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
    gradients_like,
    projection_arguments,
    relevance_problem,
    relevance_shape,
    result_strides,
    row_grid,
    type_name,
    with_contiguous_rows,
)
from .inputs import AttentionInputs, BackwardInputs, RelevanceInputs, StatisticsInputs
from .optional import AttentionLaunch, BackwardLaunch, DropoutInputs, SelectionLaunch
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
        problem = _relevance_problem(inputs)(*_tensors_of(inputs))
        _kernels().relevance(problem, output.data_ptr(), torch.get_num_threads())
        return output

    def token_weights(self, inputs: RelevanceInputs, table: Tensor, top_k: int) -> Pair:
        inputs = _as_kernels_take_them(inputs)
        return self.selection_launch(inputs, top_k)(*_tensors_of(inputs), table.contiguous())

    def selection_launch(self, inputs: RelevanceInputs, top_k: int) -> SelectionLaunch:
        problem_of = _relevance_problem(inputs)
        batch, _, num_patches = relevance_shape(inputs)
        length = inputs.tokens.shape[1]
        of_counts, of_weights = (((batch, n), (n, 1)) for n in (num_patches, length))

        def launch(tokens: Tensor, *others: Tensor | None) -> Pair:
            *parts, table = others
            counts = tokens.new_empty_strided(*of_counts, dtype=torch.int32)
            weights = tokens.new_empty_strided(*of_weights, dtype=torch.float32)
            _kernels().token_weights(
                problem_of(tokens, *parts),
                top_k,
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
        output, log_sum_exp, grad_output, *_ = backward
        weights = None if weights is None else weights.contiguous()
        grad_output, output = with_contiguous_rows(grad_output), with_contiguous_rows(output)
        log_sum_exp = log_sum_exp.contiguous()
        backward = backward._replace(output=output, grad_output=grad_output)
        launch = self.backward_launch(inputs, backward)
        return launch(grad_output, query, key, value, weights, output, log_sum_exp)

    def backward_launch(self, inputs: AttentionInputs, backward: BackwardInputs) -> BackwardLaunch:
        problem = attention_problem(inputs)
        of_grad, of_query, of_key, of_value, of_output = (
            rows.stride()[:3] for rows in (backward.grad_output, *inputs[:3], backward.output)
        )
        empty = gradients_like(inputs, backward.is_packed)
        wants_weights = backward.needs_weights_grad
        weights_shape = (inputs.key.shape[0], inputs.key.shape[2]) if wants_weights else (0,)

        def launch(
            grad_output: Tensor,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            weights: Tensor | None,
            output: Tensor,
            log_sum_exp: Tensor,
        ) -> Gradients:
            grads = empty(query)
            grad_weights = log_sum_exp.new_empty(weights_shape)
            _kernels().attention_backward(
                *problem,
                (grad_output.data_ptr(), *of_grad),
                (query.data_ptr(), *of_query),
                (key.data_ptr(), *of_key),
                (value.data_ptr(), *of_value),
                address(weights),
                (output.data_ptr(), *of_output),
                log_sum_exp.data_ptr(),
                *map(row_grid, grads),
                grad_weights.data_ptr() if wants_weights else 0,
                torch.get_num_threads(),
            )
            return (*grads, grad_weights)

        return launch

    def weights_of_counts(self, counts: Tensor, table: Tensor, num_prefix_tokens: int) -> Tensor:
        batch, num_patches = counts.shape
        weights = table.new_empty((batch, num_prefix_tokens + num_patches))
        _kernels().look_up_weights(
            (batch, num_patches, num_prefix_tokens),
            table.contiguous().data_ptr(),
            counts.contiguous().data_ptr(),
            weights.data_ptr(),
        )
        return weights

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


def _relevance_problem(inputs: RelevanceInputs) -> Callable[..., tuple]:
    """What makes the kernels' description of tensors like these, which it does not hold."""
    sizes, token_type, (_, *token_strides) = relevance_problem(inputs, inputs.tokens)
    _, classes, gain, offset, eps, proj, _ = inputs
    class_type, norm_type = type_name(classes), type_name(offset if gain is None else gain)
    has_norm, norm_eps = eps is not None, eps or 0.0
    proj_type, _, *proj_strides = projection_arguments(proj)

    def problem_of(
        tokens: Tensor,
        classes: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        proj: Tensor | None,
    ) -> tuple:
        return (
            sizes,
            token_type,
            (tokens.data_ptr(), *token_strides),
            class_type,
            classes.data_ptr(),
            has_norm,
            norm_type,
            address(norm_weight),
            address(norm_bias),
            norm_eps,
            proj_type,
            address(proj),
            *proj_strides,
        )

    return problem_of


def _as_kernels_take_them(inputs: RelevanceInputs) -> RelevanceInputs:
    tokens, classes, gain, offset, eps, proj, num_prefix_tokens = inputs
    tokens = with_contiguous_rows(tokens)
    classes = classes.to(_common_type(classes)).contiguous()
    norm_type = _common_type(gain, offset)
    gain, offset = (
        None if each is None else each.to(norm_type).contiguous() for each in (gain, offset)
    )
    proj = None if proj is None else _projection(proj, tokens.dtype)
    return RelevanceInputs(tokens, classes, gain, offset, eps, proj, num_prefix_tokens)


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


def _common_type(*tensors: Tensor | None) -> torch.dtype:
    """The type of all of them, if the kernels read it, else float32."""
    types = {each.dtype for each in tensors if each is not None}
    return types.pop() if len(types) == 1 and types <= set(KERNEL_DTYPES) else torch.float32
