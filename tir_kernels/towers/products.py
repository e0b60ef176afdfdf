"""Products with frozen matrices, which oneDNN need not lay out anew in every call.

PyTorch's products on a CPU first copy a matrix to where their kernels read it from. One that stays
as it is can be copied once, for both of its products: with tokens, and with their gradients.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from tir_kernels.operators.library import is_transformed
from tir_kernels.precision import autocast_dtype, without_autocast
from tir_kernels.towers.opening import is_untouched

_PROCESSORS = Path("/proc/cpuinfo")
_SUPPORT = {
    torch.bfloat16: "_is_mkldnn_bf16_supported",
    torch.float16: "_is_mkldnn_fp16_supported",
}


class _Matrix:
    """A frozen matrix. Parts of it are packed when they are first multiplied."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix  # held, or its address could become another tensor's
        self.version = matrix._version
        self._packed: dict[tuple, Tensor] = {}

    def packed_for(self, rows: Tensor, part: Tensor, is_transposed: bool) -> Tensor:
        """The packed form of a part of the matrix, or of its transpose, for about as many rows."""
        key = (part.storage_offset(), part.shape, part.stride(), is_transposed)
        packed = self._packed.get(key)
        if packed is None:
            matrix = (part.mT if is_transposed else part).detach().contiguous()
            num_rows = rows.numel() // rows.shape[-1]
            packed = torch.ops.mkldnn._reorder_linear_weight(matrix, num_rows)
            self._packed[key] = packed
        return packed


_matrices: dict[int, _Matrix] = {}  # by the address of their memory


@contextmanager
def packing(matrices: Iterable[Tensor]) -> Iterator[None]:
    """Let products with matrices, or with rows of them, have them packed, in the context.

    Args:
        matrices: Without gradients. A product with one that is written to is PyTorch's again.
    """
    own = {_address(each): _Matrix(each.detach()) for each in matrices}
    own = {address: each for address, each in own.items() if address not in _matrices}
    _matrices.update(own)
    try:
        yield
    finally:
        for address in own:
            del _matrices[address]


def can_pack() -> bool:
    """Whether this PyTorch has oneDNN's products with packed matrices, on an x86-64 processor."""
    names = ("_linear_pointwise", "_reorder_linear_weight", *_SUPPORT.values())
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    return (
        is_x86
        and torch.backends.mkldnn.is_available()
        and all(hasattr(torch.ops.mkldnn, name) for name in names)
    )


@functools.cache
def is_faster(dtype: torch.dtype) -> bool:
    """Whether products with packed matrices of a type are faster here than PyTorch's own.

    In 16 bits they are wherever oneDNN multiplies them. In float32 the others are MKL's, which were
    slower by 8 to 20 % on an AMD processor with AVX-512, and faster by 4 to 18 % on one with AVX2
    alone; of other makers' it is not known.
    """
    if not can_pack():
        return False
    if dtype in _SUPPORT:
        return getattr(torch.ops.mkldnn, _SUPPORT[dtype])()
    is_wide = "AVX512" in torch.backends.cpu.get_cpu_capability()
    return dtype == torch.float32 and is_wide and _vendor() == "AuthenticAMD"


def _vendor() -> str:
    try:
        lines = _PROCESSORS.read_text().splitlines()
    except OSError:
        return ""
    return next((line.split()[-1] for line in lines if line.startswith("vendor_id")), "")


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear(rows, weight, bias)``, with the matrix packed where that is known of it."""
    form = _form(rows, weight)
    if form is None or (bias is not None and bias.requires_grad):
        return F.linear(rows, weight, bias)
    bias = None if bias is None else bias.to(weight.dtype)
    return _Product.apply(rows.to(weight.dtype), weight, bias, form, False)  # as autocast would


def input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """``grad weight``, of the output (..., O) and the matrix (O, D): that of the input (..., D)."""
    form = _form(grad, weight)
    if form is None:
        return torch.matmul(grad, weight.to(grad.dtype))
    return _Product.apply(grad, weight, None, form, True)


def through(layer: nn.Module, rows: Tensor) -> Tensor:
    """``layer(rows)``, by :func:`linear` where the layer is no more than that."""
    is_linear = type(layer) in (nn.Linear, NonDynamicallyQuantizableLinear)
    if _matrices and is_linear and is_untouched(layer):
        return linear(rows, layer.weight, layer.bias)  # type: ignore[arg-type]
    return layer(rows)


class _Product(torch.autograd.Function):
    """The product with a matrix, or with its transpose, whose gradient is the other one."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        form: _Matrix,
        is_transposed: bool,
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.is_transposed = is_transposed
        packed = form.packed_for(rows, weight, is_transposed)
        return torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        with without_autocast(grad.device.type):
            back = linear if ctx.is_transposed else input_gradient
            return back(grad, weight), None, None, None, None


def _form(rows: Tensor, weight: Tensor) -> _Matrix | None:
    """What is known of a matrix, if a product with such rows can use it.

    Modes that look at operators, to count their work say, see PyTorch's own.
    """
    if not _matrices or is_transformed() or torch._C._len_torch_dispatch_stack():
        return None
    found = _matrices.get(_address(weight))
    if found is None or weight.requires_grad or weight._version != found.version:
        return None
    is_plain = type(rows) is Tensor and rows.numel() > 0 and rows.dim() > 1
    dtype = autocast_dtype("cpu") or rows.dtype
    return found if is_plain and rows.device.type == "cpu" and dtype == weight.dtype else None


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
