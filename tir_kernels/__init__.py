"""Token re-weighted attention for few-shot adaptation of CLIP-like vision transformers."""

from .api import (
    TokenWeights,
    reweight_tokens,
    reweighted_attention,
    token_relevance,
    token_weights,
    weighted_attention,
)
from .autograd import ReweightedAttention
from .dispatch import available_backends
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
