"""The operators as CUDA C++ kernels, for devices of capability 8.0 and newer.

The kernels were compiled into tir_kernels._C if nvcc was there when the package was installed. They
get raw pointers and the stream that is current when they are called.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .common import (
    KERNEL_DTYPES,
    address,
    attention_problem,
    device_guard,
    empty_gradients,
    empty_result,
    projection_arguments,
    reason_of_all,
    relevance_problem,
    relevance_shape,
    row_grid,
    type_name,
    with_contiguous_rows,
)
from .inputs import AttentionInputs, BackwardInputs, RelevanceInputs, StatisticsInputs
from .protocol import AttentionStatistics, Gradients, Pair

MIN_CAPABILITY = (8, 0)

_NOT_BUILT = (
    "tir_kernels was installed without its CUDA kernels: put nvcc (CUDA 12.8 or newer) on PATH or "
    "set CUDA_HOME, and install it again; or use backend='triton'"
)


class DerivedWeights(NamedTuple):
    """Weights of keys that the kernels look up by themselves, instead of reading them."""

    table: int  # address of (C + 1,)
    counts: int  # address of (B, N)
    num_prefix_tokens: int


class Launcher:
    """The operations over compiled kernels; the tests have a subclass over emulated ones."""

    max_head_dim = 128
    dtypes = KERNEL_DTYPES
    _kernels: Any

    def _current_stream(self, device: torch.device) -> int:
        # What torch.cuda.current_stream() asks, without making an object of the answer.
        return torch._C._cuda_getCurrentRawStream(device.index)

    def _guard(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        return device_guard(device)

    def relevance(self, inputs: RelevanceInputs) -> Tensor:
        tokens = with_contiguous_rows(inputs.tokens)
        class_embeddings = inputs.class_embeddings.contiguous()
        norm_weight, norm_bias = _of_one_type(inputs.norm_weight, inputs.norm_bias)
        proj = inputs.proj
        if proj is not None and 1 not in proj.stride():
            proj = proj.contiguous()
        scores = _empty(relevance_shape(inputs), tokens)
        with self._guard(tokens.device):
            self._kernels.relevance(
                (
                    *relevance_problem(inputs, tokens),
                    type_name(class_embeddings),
                    class_embeddings.data_ptr(),
                    inputs.norm_eps is not None,
                    type_name(norm_bias if norm_weight is None else norm_weight),
                    address(norm_weight),
                    address(norm_bias),
                    inputs.norm_eps or 0.0,
                    *projection_arguments(proj),
                ),
                scores.data_ptr(),
                self._current_stream(tokens.device),
            )
        return scores

    def token_weights(self, inputs: RelevanceInputs, table: Tensor, top_k: int) -> Pair:
        scores = self.relevance(inputs)
        weights = _empty(inputs.tokens.shape[:2], scores)
        return weights, self._select(scores, table.contiguous(), top_k, weights)

    def attention_forward(self, inputs: AttentionInputs) -> Pair:
        weights = None if inputs.weights is None else inputs.weights.contiguous()
        derived = _weights_of_one(inputs.key) if weights is None else None
        return self._forward(inputs, weights, derived)

    def attention_backward(self, inputs: AttentionInputs, backward: BackwardInputs) -> Gradients:
        weights = None if inputs.weights is None else inputs.weights.contiguous()
        derived = _weights_of_one(inputs.key) if weights is None else None
        return self._backward(inputs, weights, derived, backward)

    def attention_statistics(self, inputs: StatisticsInputs) -> AttentionStatistics:
        query, key = inputs.query, inputs.key
        weights = None if inputs.weights is None else inputs.weights.contiguous()
        results = AttentionStatistics(
            *(_empty(rows.shape[:3], query) for rows in (key, key, query, query))
        )
        softmax = _empty((*query.shape[:3], 2), query)
        with self._guard(query.device):
            self._kernels.attention_statistics(
                *attention_problem(inputs),
                *map(row_grid, inputs[:2]),
                address(weights),
                inputs.num_prefix_tokens,
                *map(address, results),
                softmax.data_ptr(),
                self._current_stream(query.device),
            )
        return results

    def reweighted_forward(
        self, attention: AttentionInputs, relevance: RelevanceInputs, table: Tensor, top_k: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """No weight is written: the attention kernel looks weights up by itself.

        It does not select by itself: each of an image's heads would search again, which costs more
        than a launch.
        """
        table = table.contiguous()
        counts = self._select(self.relevance(relevance), table, top_k, None)
        prefix = relevance.num_prefix_tokens
        derived = DerivedWeights(table.data_ptr(), counts.data_ptr(), prefix)
        return (*self._forward(attention, None, derived), counts)

    def reweighted_backward(
        self, inputs: AttentionInputs, backward: BackwardInputs, counts: Tensor, table: Tensor
    ) -> Gradients:
        table, counts = table.contiguous(), counts.contiguous()
        prefix = inputs.key.shape[2] - counts.shape[1]
        derived = DerivedWeights(table.data_ptr(), counts.data_ptr(), prefix)
        return self._backward(inputs, None, derived, backward)

    def _select(self, scores: Tensor, table: Tensor, top_k: int, weights: Tensor | None) -> Tensor:
        """Counts (B, N); ``weights`` (B, L) is filled where it is given."""
        batch, num_classes, num_patches = scores.shape
        num_prefix_tokens = 0 if weights is None else weights.shape[1] - num_patches
        counts = _empty((batch, num_patches), scores, torch.int32)
        with self._guard(scores.device):
            self._kernels.select_tokens(
                (batch, num_classes, num_patches, num_prefix_tokens),
                top_k,
                scores.data_ptr(),
                table.data_ptr(),
                counts.data_ptr(),
                address(weights),
                self._current_stream(scores.device),
            )
        return counts

    def _forward(
        self, inputs: AttentionInputs, weights: Tensor | None, derived: DerivedWeights | None
    ) -> Pair:
        query = inputs.query
        output = empty_result(query)
        log_sum_exp = _empty(query.shape[:3], query)
        with self._guard(query.device):
            self._kernels.attention_forward(
                *attention_problem(inputs),
                *map(row_grid, inputs[:3]),
                address(weights),
                row_grid(output),
                log_sum_exp.data_ptr(),
                derived,
                self._current_stream(query.device),
            )
        return output, log_sum_exp

    def _backward(
        self,
        inputs: AttentionInputs,
        weights: Tensor | None,
        derived: DerivedWeights | None,
        backward: BackwardInputs,
    ) -> Gradients:
        query, key = inputs.query, inputs.key
        output = with_contiguous_rows(backward.output)
        log_sum_exp = backward.log_sum_exp.contiguous()
        grads = empty_gradients(inputs, backward.is_packed)
        delta = _empty(log_sum_exp.shape, query)
        partial = grad_weights = None
        if backward.needs_weights_grad:
            partial = _empty(key.shape[:3], query)
            grad_weights = _empty((key.shape[0], key.shape[2]), query)
        with self._guard(query.device):
            self._kernels.attention_backward(
                *attention_problem(inputs),
                row_grid(backward.grad_output),
                *map(row_grid, inputs[:3]),
                address(weights),
                row_grid(output),
                log_sum_exp.data_ptr(),
                *map(row_grid, grads),
                address(grad_weights),
                derived,
                delta.data_ptr(),
                address(partial),
                self._current_stream(query.device),
            )
        if grad_weights is None:
            grad_weights = _empty((0,), query)
        return (*grads, grad_weights)


class CudaBackend(Launcher):
    """Compiled kernels for tensors on GPUs of capability 8.0 and newer."""

    name = "cuda"

    @functools.cached_property
    def _kernels(self) -> Any:
        kernels = _compiled()
        if kernels is None:
            raise RuntimeError(_NOT_BUILT)
        return kernels

    def unavailable(self) -> str:
        try:
            kernels = _compiled()
        except ImportError as error:
            return f"tir_kernels._C does not load: {error}"
        if kernels is None:
            return _NOT_BUILT
        if not torch.cuda.is_available():
            return "no CUDA device is visible to PyTorch; use the cpu backend"
        if reason := _runtime_reason(kernels):
            return reason
        return reason_of_all(functools.partial(_card_reason, kernels))

    def refusal(self, device: torch.device) -> str:
        if device.type != "cuda":
            return f"the kernels run on a GPU, not on {device.type}"
        kernels = _compiled()
        return _NOT_BUILT if kernels is None else _card_reason(kernels, device.index)

    def description(self) -> str:
        """The architectures that the kernels were built for, or nothing where they were not."""
        try:
            kernels = _compiled()
        except ImportError:
            return ""
        if kernels is None:
            return ""
        return f"built for {kernels.architectures()} with CUDA {_release(kernels.runtime()[0])}"


def _runtime_reason(kernels: Any) -> str:
    """The reason that the CUDA runtime linked with the kernels, not PyTorch's, cannot work here."""
    version, driver_version, error = kernels.runtime()
    if not error:
        return ""
    return (
        f"the kernels were built with CUDA {_release(version)}, whose runtime says {error!r}; the "
        f"driver serves CUDA {_release(driver_version)}: update the driver, or install tir_kernels "
        f"again with the nvcc of a CUDA toolkit that it serves, or use backend='triton'"
    )


def _card_reason(kernels: Any, index: int | None) -> str:
    capability = torch.cuda.get_device_capability(index)
    name = (
        f"{torch.cuda.get_device_name(index)} (compute capability {capability[0]}.{capability[1]})"
    )
    if capability < MIN_CAPABILITY:
        return f"{name} is older than 8.0, the oldest served; use the reference backend"
    built = kernels.architectures()
    rebuild = (
        f"install tir_kernels again with TIR_CUDA_ARCHS={capability[0]}{capability[1]} in the "
        "environment, or use backend='triton'"
    )
    if not runs_on(built, capability):
        return f"the CUDA kernels were built for {built}, which {name} does not run: {rebuild}"
    version, driver_version, _ = kernels.runtime()
    if driver_version < version and not runs_on(built.replace("+PTX", ""), capability):
        return (
            f"the CUDA kernels hold no machine code for {name}, and the driver, which serves CUDA "
            f"{_release(driver_version)}, cannot compile what CUDA {_release(version)} left for "
            f"it: update the driver, or {rebuild}"
        )
    return ""


def _release(version: int) -> str:
    """The release, such as "13.0", behind a number that CUDA's runtime gives."""
    return f"{version // 1000}.{version % 1000 // 10}"


def runs_on(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether code for architectures such as "80+PTX;90;100" runs on a device.

    Machine code serves its own generation from its own revision on, that of "90a" 9.0 alone; PTX
    everything that is newer.
    """
    for entry in architectures.split(";"):
        number, _, ptx = entry.partition("+")
        if number.endswith("a"):
            if divmod(int(number[:-1]), 10) == capability:
                return True
            continue
        built = divmod(int(number), 10)
        if built[0] == capability[0] and built <= capability:
            return True
        if ptx and built <= capability:
            return True
    return False


def _compiled() -> ModuleType | None:
    """The compiled kernels, or None where the package was installed without them."""
    try:
        return getattr(importlib.import_module("tir_kernels._C"), "cuda", None)
    except ModuleNotFoundError:
        return None


def _weights_of_one(key: Tensor) -> DerivedWeights:
    """No weights to read: every token is a prefix token, whose weight is 1.

    So neither the table nor the counts are looked at, and any address serves for them.
    """
    unread = key.data_ptr()
    return DerivedWeights(unread, unread, key.shape[2])


def _empty(shape: Sequence[int], like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def _of_one_type(*tensors: Tensor | None) -> list[Tensor | None]:
    """Contiguous, and all float32 if they are not of one type as they are."""
    types = {t.dtype for t in tensors if t is not None}
    return [
        None if t is None else (t.float() if len(types) > 1 else t).contiguous() for t in tensors
    ]
