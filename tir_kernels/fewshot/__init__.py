"""Few-shot fine-tuning of CLIP models with dynamic token re-weighting."""

from typing import TYPE_CHECKING, Any

from .config import FewShotConfig

if TYPE_CHECKING:
    from .engine import EpisodeResult, NonFiniteLossError, finetune_episode, finetune_episodes
    from .episodes import Episode
    from .training import Savings

__all__ = [
    "Episode",
    "EpisodeResult",
    "FewShotConfig",
    "NonFiniteLossError",
    "Savings",
    "finetune_episode",
    "finetune_episodes",
]


def __getattr__(name: str) -> Any:
    # The engine imports open_clip, which takes seconds that a command line's --help should not.
    if name == "Episode":
        from .episodes import Episode

        return Episode
    if name in __all__:
        from . import engine

        return getattr(engine, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
