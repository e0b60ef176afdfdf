"""Token re-weighted attention for few-shot adaptation of CLIP-like vision transformers.

Where PyTorch is imported already, the operators are there at once; else they come with the first
use of a name, so that a program's ``--help`` need not wait for PyTorch.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .operators.api import (
        TokenWeights,
        reweight_tokens,
        reweighted_attention,
        token_relevance,
        token_weights,
        weighted_attention,
    )
    from .operators.autograd import ReweightedAttention
    from .operators.choose import available_backends
    from .rules import JointSpace, WeightRule

__version__ = "0.1.0"

__all__ = [
    "JointSpace",
    "ReweightedAttention",
    "TokenWeights",
    "WeightRule",
    "available_backends",
    "reweight_tokens",
    "reweighted_attention",
    "token_relevance",
    "token_weights",
    "weighted_attention",
]

_ELSEWHERE = {
    "JointSpace": "rules",
    "ReweightedAttention": "operators.autograd",
    "WeightRule": "rules",
    "available_backends": "operators.choose",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for each in __all__:
        home = importlib.import_module(f"{__name__}.{_ELSEWHERE.get(each, 'operators.api')}")
        globals()[each] = getattr(home, each)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if "torch" in sys.modules:
    __getattr__(__all__[0])
