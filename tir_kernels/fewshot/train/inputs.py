"""What learners that leave the image tower alone make of an episode's images, made once for all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tir_kernels.fewshot.episode import Episode
from tir_kernels.fewshot.methods import Learner

_AT_ONCE = 64  # images, more only overflow a CPU's caches


class SharedInputs:
    """Inputs of episodes' images by their kind, kept for as long as the same episodes are met."""

    def __init__(self) -> None:
        self._episodes: dict[int, Episode] = {}  # by id, held so that no other gets the id
        self._known: dict[tuple[int, str, str], Tensor] = {}

    def keep_only(self, episodes: Sequence[Episode]) -> None:
        """Forget what was made of other episodes than these."""
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
        images = getattr(episode, name)
        if learner.inputs_kind is None or not isinstance(images, Tensor) or not len(images):
            return None
        key = (id(episode), name, learner.inputs_kind)
        if key not in self._known:
            self._episodes[id(episode)] = episode
            parts = [learner.inputs(part[None].to(device))[0] for part in images.split(_AT_ONCE)]
            self._known[key] = torch.cat(parts)
        return self._known[key]
