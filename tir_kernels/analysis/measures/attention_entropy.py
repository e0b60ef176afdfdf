"""Attention entropy: how evenly queries spread their attention."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tir_kernels.analysis.measures.protocol import BlockView, Finding


@dataclass(frozen=True)
class AttentionEntropy:
    """Entropy of attention rows, as a share of the logarithm of the number of keys: 0 to 1.

    Uniform attention, the chance level, has 1; a query that attends to one key has 0. The row of
    the class token is taken over the patches alone, renormalised, so that what it gives itself does
    not count; rows of patches are taken over all L keys. Both are means over heads, the second over
    patches too. Rows say how the class token reads the image, where the sink ratio is of columns
    (arXiv 2410.10781); reports of what fine-tuning does to rows disagree (arXiv 2605.11659).

    None is found where there is one key alone, or where a row gives the patches nothing.
    """

    name = "attention-entropy"

    def of_block(self, view: BlockView) -> Iterator[Finding]:
        prefix, length = view.num_prefix_tokens, view.hidden.shape[1]
        if view.num_class_tokens:
            row = view.class_token_row[..., prefix:]
            row = row / row.sum(2, keepdim=True)
            entropy = -row.xlogy(row).sum(2)  # (B, H)
            values = _of_keys(entropy, length - prefix).nanmean(1)
            yield Finding("entropy of class token over patches", view.block, values, 1.0)
        entropy = view.attention.entropy[..., prefix:].flatten(1)
        values = _of_keys(entropy, length).nanmean(1)
        yield Finding("entropy of patches", view.block, values, 1.0)


def _of_keys(entropy: Tensor, count: int) -> Tensor:
    if count < 2:
        return torch.full_like(entropy, torch.nan)
    return entropy / math.log(count)
