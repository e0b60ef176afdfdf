"""Few-shot fine-tuning of CLIP models with dynamic token re-weighting."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import FewShotConfig
    from .engine import (
        EpisodeResult,
        NonFiniteLossError,
        Savings,
        episodes_that_fit,
        finetune_episode,
        finetune_episodes,
    )
    from .episodes import Episode
    from .run_folder import read_run

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


_ELSEWHERE = {"Episode": "episodes", "FewShotConfig": "config", "read_run": "run_folder"}


def __getattr__(name: str) -> Any:
    # PyTorch and open_clip take seconds that a command line's --help should not.
    if name in __all__:
        module = importlib.import_module(f"{__name__}.{_ELSEWHERE.get(name, 'engine')}")
        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
