"""Masks of text towers that also say in words what they hide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


class KnownMask:
    """A mask whose tower knows what it hides, so that attention need not read it.

    A library's block hands it to an opened attention in the place of a mask; no other module can
    take it.

    Args:
        make: Makes the mask as the library's own blocks take it, (L, L) or (B H, L, L).
        is_causal: Whether it hides from each token those behind it.
        keys: (B, L) float32, 0 for the tokens that it hides from all, else 1; ``None``: it hides
            no more.
    """

    def __init__(
        self, make: Callable[[], Tensor], is_causal: bool, keys: Tensor | None = None
    ) -> None:
        self.is_causal = is_causal
        self.keys = keys
        self._make = make
        self._made: Tensor | None = None

    def tensor(self) -> Tensor:
        """The mask itself, added to the scores; made once."""
        if self._made is None:
            self._made = self._make()
        return self._made

    def to(self, *arguments: Any) -> KnownMask:
        """Itself: blocks of open_clip give masks the type of their tokens."""
        return self
