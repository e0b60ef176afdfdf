"""Few-shot fine-tuning of CLIP models with dynamic token re-weighting."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tir_kernels.fewshot.episode import Episode
    from tir_kernels.fewshot.run.folder import read_run
    from tir_kernels.fewshot.settings import FewShotConfig
    from tir_kernels.fewshot.train.loop import (
        EpisodeResult,
        NonFiniteLossError,
        Savings,
        episodes_that_fit,
        finetune_episode,
        finetune_episodes,
    )

__all__ = [
    "Episode",
    "EpisodeResult",
    "FewShotConfig",
    "NonFiniteLossError",
    "Savings",
    "episodes_that_fit",
    "finetune_episode",
    "finetune_episodes",
    "read_run",
]


_ELSEWHERE = {"Episode": "episode", "FewShotConfig": "settings", "read_run": "run.folder"}


def __getattr__(name: str) -> Any:
    # PyTorch and open_clip take seconds that a command line's --help should not.
    if name in __all__:
        module = importlib.import_module(f"{__name__}.{_ELSEWHERE.get(name, 'train.loop')}")
        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
