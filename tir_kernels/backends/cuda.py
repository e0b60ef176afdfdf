"""The operators as CUDA C++ kernels, for devices of capability 8.0 and newer.

The kernels were compiled into tir_kernels._C if nvcc was there when the package was installed. They
get raw pointers and the stream that is current when they are called.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .common import (
    TYPE_NAMES,
    address,
    device_guard,
    reason_of_all,
    row_grid,
    with_contiguous_rows,
)

MAX_HEAD_DIM = 128
MIN_CAPABILITY = (8, 0)

_NOT_BUILT = (
    "tir_kernels was installed without its CUDA kernels: put nvcc (CUDA 12.8 or newer) on PATH or "
    "set CUDA_HOME, and install it again; or use backend='triton'"
)
# Addresses of table (C + 1,), relevance (B, C, N) or 0, and counts (B, N); then P, C, top_k.
_Derived = tuple[int, int, int, int, int, int]


class Launcher:
    """The backend's functions over compiled kernels, which the tests can replace by emulated ones.

    ``current_stream(device)`` gives the stream to launch on, as an integer; ``guard(device)`` is a
    context in which that device is current.
    """

    MAX_HEAD_DIM = MAX_HEAD_DIM

    def __init__(self, kernels: Any, current_stream: Any, guard: Any) -> None:
        self._kernels = kernels
        self._current_stream = current_stream
        self._guard = guard

    def relevance(
        self,
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
        class_embeddings = class_embeddings.contiguous()
        norm_weight, norm_bias = _of_one_type(norm_weight, norm_bias)
        norm = norm_weight if norm_weight is not None else norm_bias
        if proj is not None and 1 not in proj.stride():
            proj = proj.contiguous()
        scores = _empty((batch, num_classes, length - num_prefix_tokens), tokens)
        with self._guard(tokens.device):
            self._kernels.relevance(
                (batch, length, num_prefix_tokens, width, joint_width, num_groups, num_classes),
                TYPE_NAMES[tokens.dtype],
                (tokens.data_ptr(), tokens.stride(0), 0, tokens.stride(1)),
                TYPE_NAMES[class_embeddings.dtype],
                class_embeddings.data_ptr(),
                norm_eps is not None,
                "float32" if norm is None else TYPE_NAMES[norm.dtype],
                address(norm_weight),
                address(norm_bias),
                0.0 if norm_eps is None else norm_eps,
                "float32" if proj is None else TYPE_NAMES[proj.dtype],
                address(proj),
                *((0, 0) if proj is None else proj.stride()),
                scores.data_ptr(),
                self._current_stream(tokens.device),
            )
        return scores

    def token_weights(
        self,
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
        scores = self.relevance(
            tokens, class_embeddings, norm_weight, norm_bias, norm_eps, proj, num_prefix_tokens
        )
        weights = _empty(tokens.shape[:2], tokens)
        return weights, self._select(scores, table.contiguous(), top_k, num_prefix_tokens, weights)

    def attention_forward(
        self, query: Tensor, key: Tensor, value: Tensor, weights: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        return self._forward(query, key, value, weights.contiguous(), None, scale)

    def attention_backward(
        self,
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
        weights = weights.contiguous()
        return self._backward(
            grad_output,
            query,
            key,
            value,
            weights,
            None,
            output,
            log_sum_exp,
            scale,
            needs_weights_grad,
        )

    def reweighted_forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        tokens: Tensor,
        class_embeddings: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        norm_eps: float | None,
        proj: Tensor | None,
        table: Tensor,
        top_k: int,
        num_prefix_tokens: int,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """No weight is written: the attention kernel selects and looks weights up by itself."""
        scores = self.relevance(
            tokens, class_embeddings, norm_weight, norm_bias, norm_eps, proj, num_prefix_tokens
        )
        table = table.contiguous()
        batch, num_classes, num_patches = scores.shape
        if self._kernels.can_select(num_patches, num_classes):
            counts = _empty((batch, num_patches), scores, torch.int32)
            found_in = scores.data_ptr()
        else:
            counts = self._select(scores, table, top_k, num_prefix_tokens, None)
            found_in = 0
        derived = (
            table.data_ptr(),
            found_in,
            counts.data_ptr(),
            num_prefix_tokens,
            num_classes,
            top_k,
        )
        return (*self._forward(query, key, value, None, derived, scale), counts)

    def reweighted_backward(
        self,
        grad_output: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        counts: Tensor,
        table: Tensor,
        output: Tensor,
        log_sum_exp: Tensor,
        scale: float,
        needs_weights_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        table, counts = table.contiguous(), counts.contiguous()
        num_prefix_tokens = query.shape[2] - counts.shape[1]
        derived = (
            table.data_ptr(),
            0,
            counts.data_ptr(),
            num_prefix_tokens,
            table.shape[0] - 1,
            0,
        )
        return self._backward(
            grad_output,
            query,
            key,
            value,
            None,
            derived,
            output,
            log_sum_exp,
            scale,
            needs_weights_grad,
        )

    def _select(
        self,
        scores: Tensor,
        table: Tensor,
        top_k: int,
        num_prefix_tokens: int,
        weights: Tensor | None,
    ) -> Tensor:
        """Counts (B, N); ``weights`` (B, L) is filled where it is given."""
        batch, num_classes, num_patches = scores.shape
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
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        weights: Tensor | None,
        derived: _Derived | None,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        output = _empty(query.shape, query, query.dtype)
        log_sum_exp = _empty(query.shape[:3], query)
        with self._guard(query.device):
            self._kernels.attention_forward(
                query.shape,
                TYPE_NAMES[query.dtype],
                scale,
                row_grid(query),
                row_grid(key),
                row_grid(value),
                address(weights),
                output.data_ptr(),
                log_sum_exp.data_ptr(),
                derived,
                self._current_stream(query.device),
            )
        return output, log_sum_exp

    def _backward(
        self,
        grad_output: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        weights: Tensor | None,
        derived: _Derived | None,
        output: Tensor,
        log_sum_exp: Tensor,
        scale: float,
        needs_weights_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        output, log_sum_exp = with_contiguous_rows(output), log_sum_exp.contiguous()
        grad_query = _empty(query.shape, query, query.dtype)
        grad_key = _empty(query.shape, query, query.dtype)
        grad_value = _empty(query.shape, query, query.dtype)
        delta = _empty(log_sum_exp.shape, query)
        partial = grad_weights = None
        if needs_weights_grad:
            partial = _empty(log_sum_exp.shape, query)
            grad_weights = _empty((query.shape[0], query.shape[2]), query)
        with self._guard(query.device):
            self._kernels.attention_backward(
                query.shape,
                TYPE_NAMES[query.dtype],
                scale,
                row_grid(grad_output),
                row_grid(query),
                row_grid(key),
                row_grid(value),
                address(weights),
                row_grid(output),
                log_sum_exp.data_ptr(),
                grad_query.data_ptr(),
                grad_key.data_ptr(),
                grad_value.data_ptr(),
                address(grad_weights),
                derived,
                delta.data_ptr(),
                address(partial),
                self._current_stream(query.device),
            )
        if grad_weights is None:
            grad_weights = _empty((0,), query)
        return grad_query, grad_key, grad_value, grad_weights


def unavailable_reason() -> str:
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


def device_reason(device: torch.device) -> str:
    if device.type != "cuda":
        return f"the kernels run on a GPU, not on {device.type}"
    kernels = _compiled()
    return _NOT_BUILT if kernels is None else _card_reason(kernels, device.index)


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
    """Whether code for architectures such as "80;90;100+PTX" runs on a device.

    Machine code serves its own generation from its own revision on; PTX everything that is newer.
    """
    for entry in architectures.split(";"):
        number, _, ptx = entry.partition("+")
        built = divmod(int(number), 10)
        if built[0] == capability[0] and built <= capability:
            return True
        if ptx and built <= capability:
            return True
    return False


def description() -> str:
    """The architectures that the kernels were built for, or nothing where they were not built."""
    try:
        kernels = _compiled()
    except ImportError:
        return ""
    if kernels is None:
        return ""
    return f"built for {kernels.architectures()} with CUDA {_release(kernels.runtime()[0])}"


def _compiled() -> ModuleType | None:
    """The compiled kernels, or None where the package was installed without them."""
    try:
        return getattr(importlib.import_module("tir_kernels._C"), "cuda", None)
    except ModuleNotFoundError:
        return None


@functools.cache
def _launcher() -> Launcher:
    kernels = _compiled()
    if kernels is None:
        raise RuntimeError(_NOT_BUILT)
    return Launcher(kernels, _current_stream, device_guard)


def __getattr__(name: str) -> Any:
    """The functions of a backend are those of the one launcher, made when first asked for."""
    if name in _FUNCTIONS:
        return getattr(_launcher(), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_FUNCTIONS = (
    "relevance",
    "token_weights",
    "attention_forward",
    "attention_backward",
    "reweighted_forward",
    "reweighted_backward",
)


def _current_stream(device: torch.device) -> int:
    # What torch.cuda.current_stream() asks, without making an object of the answer.
    return torch._C._cuda_getCurrentRawStream(device.index)


def _empty(shape: Sequence[int], like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def _of_one_type(*tensors: Tensor | None) -> list[Tensor | None]:
    """Contiguous, and all float32 if they are not of one type as they are."""
    types = {t.dtype for t in tensors if t is not None}
    return [
        None if t is None else (t.float() if len(types) > 1 else t).contiguous() for t in tensors
    ]
