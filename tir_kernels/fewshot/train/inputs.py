"""What learners that leave the image tower alone make of images, made once for all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tir_kernels.fewshot.episode import Episode
from tir_kernels.fewshot.methods import Learner
from tir_kernels.files import MIB

_AT_ONCE = 64  # images, more only overflow a CPU's caches
_MOST_BYTES = 512 * MIB  # of what is kept from one episode to others
_NAMES = {"support_images": "support_names", "query_images": "query_names"}


class SharedInputs:
    """Inputs by their kind: of episodes' images, and by name of those that others have too."""

    def __init__(self) -> None:
        self._episodes: dict[int, Episode] = {}  # by id, held so that no other gets the id
        self._known: dict[tuple[int, str, str], Tensor] = {}
        self._by_name: dict[tuple[str, str], Tensor] = {}
        self._bytes = 0

    def keep_only(self, episodes: Sequence[Episode]) -> None:
        """Forget what was made of other episodes than these, but for images that have names."""
        kept = {id(episode): episode for episode in episodes}
        self._known = {key: each for key, each in self._known.items() if key[0] in kept}
        self._episodes = kept

    def of(
        self, learner: Learner, episode: Episode, name: str, device: torch.device
    ) -> Tensor | None:
        """The inputs (N, ...) of an episode's images of that name, made or remembered.

        Returns:
            ``None`` where the learner's inputs are its own, or the images are had in parts.
        """
        images, kind = getattr(episode, name), learner.inputs_kind
        if kind is None or not isinstance(images, Tensor) or not len(images):
            return None
        key = (id(episode), name, kind)
        if key not in self._known:
            self._episodes[id(episode)] = episode
            names = getattr(episode, _NAMES[name]) or (None,) * len(images)
            self._known[key] = self._made(learner, images, [(kind, each) for each in names], device)
        return self._known[key]

    def _made(
        self,
        learner: Learner,
        images: Tensor,
        keys: Sequence[tuple[str, str | None]],
        device: torch.device,
    ) -> Tensor:
        rows = {i: self._by_name[key] for i, key in enumerate(keys) if key in self._by_name}
        missing = [i for i in range(len(images)) if i not in rows]
        for first in range(0, len(missing), _AT_ONCE):
            part = missing[first : first + _AT_ONCE]
            made = learner.inputs(images[part][None].to(device))[0]
            rows.update(zip(part, made, strict=True))
        for i in missing:
            kind, name = keys[i]
            if name is not None and self._bytes + rows[i].nbytes <= _MOST_BYTES:
                # A row of its own, not a view that holds its whole batch.
                self._by_name[kind, name] = rows[i].clone()
                self._bytes += rows[i].nbytes
        return torch.stack([rows[i] for i in range(len(images))])
