"""``python -m bench kernels``: how many kernels a fine-tuning step launches on a GPU, without one.

A step at few images is bound by launching its kernels, so their number is what it costs. One step
of the few-shot engine runs on the CPU, on the path that a GPU takes, and what reaches PyTorch's
dispatcher below autograd and autocast is counted. The number depends on the model's depth, not on
widths or images, so the model is a narrow one, with two heads so that no copy of heads vanishes.

An operator counts as one kernel, with these exceptions:

- None: views, ``detach``, and what only allocates. No copy between types or devices is free.
- Scaled dot-product attention: 1 forward and 3 backward (row sums, gradients, a conversion).
- ``token_weights``: 2 (relevance, selection); ``reweighted_attention``: 3 (attention too);
  ``weighted_attention_backward``: 2 (row sums, gradients; for many short heads, one does both).
- Writing at indices that may repeat (``index_put`` that accumulates): 8, most of them to sort.
- The gradient of a slice or of one entry: 2 (zeros, and a copy into them).
- ``factor_gradient``: 2 (parts, and their sum).
- A fused optimizer or ``_foreach`` operator: as many as its lists of tensors fill.

A layer normalisation's backward pass counts as one, its weights being frozen. What cuBLAS launches
beside a product, to split it, is not seen.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import click
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tir_kernels.adapters import frozen_projection
from tir_kernels.fewshot import Episode, Runtime, finetune_episodes
from tir_kernels.fewshot.methods import Method
from tir_kernels.fewshot.methods.tir import TIR
from tir_kernels.fewshot.train import batch
from tir_kernels.precision import autocast_dtype
from tir_kernels.towers import attention, norms, products
from tir_kernels.towers.mlp import OpenedMlp

from .clip_model import ClipSizes, load_sizes, make_model, make_tokenizer
from .report import Section, open_console, print_sections

CLASS_NAMES = ("annual crop", "forest", "highway", "river", "sea or lake")
PASSES = ("forward", "backward", "update")

_COUNTED_STEP = 1  # what optimizers keep is there from the second step on
_HEADS, _HEAD_DIM = 2, 8
_MORE_THAN_ONE = {
    "_scaled_dot_product_flash_attention_for_cpu_backward": 3,
    "token_weights": 2,
    "reweighted_attention": 3,
    "weighted_attention_backward": 2,
    "factor_gradient": 2,
    "slice_backward": 2,
    "select_backward": 2,
}
_ACCUMULATING = 8
_WITHOUT = (
    *("_unsafe_view", "_reshape_alias"),
    *("_record_function_enter_new", "_record_function_exit"),
)
_ALLOCATING = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
# Number of lists -> tensors that a launch over lists of tensors takes, in ATen's MultiTensorApply;
# a fused optimizer's launch carries the tensors' step counts too.
_TENSORS_OF_LISTS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
_CHUNK, _CHUNKS = 65536, 320  # elements, and how many a launch takes


class Launched(NamedTuple):
    """What was launched: a pass of the step, and the name of an operator."""

    step_pass: str
    operator: str


@dataclass(frozen=True)
class Count:
    """The kernels of a step.

    Attributes:
        kernels: Pass and operator -> kernels.
    """

    kernels: Counter[Launched]

    @property
    def total(self) -> int:
        return self.kernels.total()

    def of(self, step_pass: str) -> int:
        """The kernels of a pass."""
        return sum(number for key, number in self.kernels.items() if key.step_pass == step_pass)

    def by_operator(self) -> Counter[str]:
        found: Counter[str] = Counter()
        for key, number in self.kernels.items():
            found[key.operator] += number
        return found


class KernelCounter(TorchDispatchMode):
    """Counts kernels while it is on.

    Attributes:
        kernels: Pass and operator -> kernels.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[Launched] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if number := kernels_of(func, args):
            name = func.overloadpacket.__name__
            self.kernels[Launched(_pass_of(name), name)] += number
        return func(*args, **(kwargs or {}))


def kernels_of(func: Any, args: tuple) -> int:
    """The number of kernels that a call of an operator launches on a GPU."""
    name = func.overloadpacket.__name__
    gives_tensors = any("Tensor" in str(each.type) for each in func._schema.returns)
    is_in_place = name.startswith("_foreach_") or name.startswith("_fused_")
    if name in _ALLOCATING or name in _WITHOUT or not (gives_tensors or is_in_place):
        return 0
    aliases = [each.alias_info for each in func._schema.returns if each.alias_info is not None]
    if aliases and not any(each.is_write for each in aliases):  # a view
        return 0
    if name in ("index_put", "index_put_", "_index_put_impl_") and len(args) > 3 and args[3]:
        return _ACCUMULATING
    if name.startswith(("_fused_", "_foreach_")):
        return _launches_over(args)
    return _MORE_THAN_ONE.get(name, 1)


def _launches_over(args: tuple) -> int:
    """Launches of an operator over lists of tensors, which fill them by number and by size."""
    lists = [each for each in args if isinstance(each, (list, tuple)) and each]
    tensors: list[Tensor] = list(lists[0])
    most = _TENSORS_OF_LISTS[min(max(len([each for each in lists if _has_tensors(each)]), 1), 5)]
    chunks = sum(-(-tensor.numel() // _CHUNK) for tensor in tensors)
    return max(-(-len(tensors) // most), -(-chunks // _CHUNKS))


def _has_tensors(values: Any) -> bool:
    return isinstance(values[0], Tensor) and values[0].dim() > 0


def _pass_of(operator: str) -> str:
    if torch._C._current_autograd_node() is not None:
        return "backward"
    return "update" if operator.startswith(("_fused_", "_foreach_add_")) else "forward"


def count_step(
    depth: tuple[int, int] = (12, 12),
    method: Method | None = None,
    precision: str = "bfloat16",
    episodes: int = 1,
) -> Count:
    """Count the kernels of a step of the few-shot engine on the path that a GPU takes.

    Args:
        depth: Blocks of the image tower and of the text tower.
        method: ``None``: the method with placement "tokens", as published.
        precision: Of the step.
        episodes: Trained at once.
    """
    method = TIR(steps=_COUNTED_STEP + 1, logit_scale=4.0) if method is None else method
    sizes = _narrow(load_sizes(None), depth)
    model, side = make_model(sizes, "cpu"), sizes.vision["image_size"]
    counter = KernelCounter()

    class Counting(batch.RepeatedStep):
        taken = 0

        def __call__(self) -> Tensor:
            is_counted = self.taken == _COUNTED_STEP
            self.taken += 1
            with counter if is_counted else contextlib.nullcontext():
                return super().__call__()

    images = torch.zeros(2 * len(CLASS_NAMES), 3, side, side)
    labels = torch.arange(len(images)) % len(CLASS_NAMES)
    drawn = [Episode(list(CLASS_NAMES), images, labels, images[:0], n) for n in range(episodes)]
    with as_on_a_gpu(), mock.patch.object(batch, "RepeatedStep", Counting):
        finetune_episodes(
            model,
            make_tokenizer(sizes),
            drawn,
            method,
            runtime=Runtime(precision=precision, device="cpu"),
        )
    return Count(counter.kernels)


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Let the towers run on a CPU what they would run on a GPU."""
    normalise = F.layer_norm

    def in_float32(tokens: Tensor, *rest: Any, **options: Any) -> Tensor:
        # Autocast lets a GPU, but not a CPU, normalise in float32 alone.
        return normalise(
            tokens if autocast_dtype("cpu") is None else tokens.float(), *rest, **options
        )

    swapped: list[tuple[Any, str, Callable]] = [
        (F, "layer_norm", in_float32),
        (frozen_projection, "writes_transposed", lambda rows: True),
        (frozen_projection, "drops_as_it_reads", lambda rows: True),
        (attention, "_has_cpu_kernels", lambda: False),
        (OpenedMlp, "_kind", lambda self, layers: None),
        (norms, "are_fused", lambda hidden: True),
        (products, "is_faster", lambda dtype: False),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in swapped:
            stack.enter_context(mock.patch.object(owner, name, replacement))
        yield


def _narrow(sizes: ClipSizes, depth: tuple[int, int]) -> ClipSizes:
    width = _HEADS * _HEAD_DIM
    vision = {"image_size": 2 * sizes.vision["patch_size"], "head_width": _HEAD_DIM}
    return ClipSizes(
        sizes.model_cfg
        | {"embed_dim": width}
        | {"vision_cfg": sizes.vision | vision | {"width": width, "layers": depth[0]}}
        | {"text_cfg": sizes.text | {"width": width, "heads": _HEADS, "layers": depth[1]}}
    )


def sections(count: Count) -> list[Section]:
    """A table of kernels by operator and pass."""
    rows = [
        (name, *(str(count.kernels[Launched(each, name)] or "") for each in PASSES), str(number))
        for name, number in count.by_operator().most_common()
    ]
    total = ("all", *(str(count.of(each)) for each in PASSES), str(count.total))
    title = "Kernels that a fine-tuning step launches on a GPU, counted on a CPU"
    return [Section(title, ("operator", *PASSES, "kernels"), [rows, [total]])]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model", help="An open_clip architecture, whose depth counts.  [default: ViT-B-16]")
@click.option("--precision", type=click.Choice(["float32", "bfloat16"]), default="bfloat16")
@click.option("--episodes", type=click.IntRange(1), default=1, help="Trained at once.")
def main(model: str | None, precision: str, episodes: int) -> None:
    """Print how many kernels a fine-tuning step launches on a GPU that need not be there.

    What counts as a kernel is in bench/step_kernels.py.
    """
    sizes = load_sizes(model)
    depth = sizes.vision["layers"], sizes.text["layers"]
    print_sections(open_console(), sections(count_step(depth, None, precision, episodes)))
