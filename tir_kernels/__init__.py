"""Token re-weighted attention for few-shot adaptation of CLIP-like vision transformers.

Where PyTorch is imported already, the operators are there at once; else they come with the first
use of a name, so that a program's ``--help`` need not wait for PyTorch.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .operators.attention_statistics import AttentionStatistics, attention_statistics
    from .operators.choose import available_backends
    from .operators.relevance import token_relevance
    from .operators.reweighted_attention import ReweightedAttention, reweighted_attention
    from .operators.token_weights import TokenWeights, reweight_tokens, token_weights
    from .operators.weighted_attention import weighted_attention
    from .rules import JointSpace, WeightRule

__version__ = "0.1.0"

__all__ = [
    "AttentionStatistics",
    "JointSpace",
    "ReweightedAttention",
    "TokenWeights",
    "WeightRule",
    "attention_statistics",
    "available_backends",
    "reweight_tokens",
    "reweighted_attention",
    "token_relevance",
    "token_weights",
    "weighted_attention",
]

_HOMES = {
    "AttentionStatistics": "operators.attention_statistics",
    "JointSpace": "rules",
    "ReweightedAttention": "operators.reweighted_attention",
    "TokenWeights": "operators.token_weights",
    "WeightRule": "rules",
    "attention_statistics": "operators.attention_statistics",
    "available_backends": "operators.choose",
    "reweight_tokens": "operators.token_weights",
    "reweighted_attention": "operators.reweighted_attention",
    "token_relevance": "operators.relevance",
    "token_weights": "operators.token_weights",
    "weighted_attention": "operators.weighted_attention",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for each, home in _HOMES.items():
        globals()[each] = getattr(importlib.import_module(f"{__name__}.{home}"), each)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if "torch" in sys.modules:
    __getattr__(__all__[0])
