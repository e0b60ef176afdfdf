"""The implementations that compete: ours through the public functions, and PyTorch's."""

from .attention import attention_peers
from .operator import operator_peers
from .relevance import relevance_peers, token_weights_peers

__all__ = ["attention_peers", "operator_peers", "relevance_peers", "token_weights_peers"]
