"""Few-shot fine-tuning of CLIP models with dynamic token re-weighting."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tir_kernels.fewshot import methods
    from tir_kernels.fewshot.classifier.classifier import Classifier
    from tir_kernels.fewshot.classifier.folder import load_classifier
    from tir_kernels.fewshot.classifier.making import fit
    from tir_kernels.fewshot.episode import Episode
    from tir_kernels.fewshot.evaluation.evaluating import evaluate
    from tir_kernels.fewshot.evaluation.evaluation import Evaluation
    from tir_kernels.fewshot.evaluation.settings import EvaluateSettings
    from tir_kernels.fewshot.run.folder import read_run
    from tir_kernels.fewshot.run.tracked import read_tracked
    from tir_kernels.fewshot.settings import Arm, FitSettings, Protocol, Runtime
    from tir_kernels.fewshot.track.tracker import Tracker
    from tir_kernels.fewshot.train.batch import EpisodeResult, NonFiniteLossError
    from tir_kernels.fewshot.train.loop import (
        episodes_that_fit,
        finetune_episode,
        finetune_episodes,
    )

_HOMES = {
    "Arm": "settings",
    "Classifier": "classifier.classifier",
    "Episode": "episode",
    "EpisodeResult": "train.batch",
    "EvaluateSettings": "evaluation.settings",
    "Evaluation": "evaluation.evaluation",
    "FitSettings": "settings",
    "NonFiniteLossError": "train.batch",
    "Protocol": "settings",
    "Runtime": "settings",
    "Tracker": "track.tracker",
    "episodes_that_fit": "train.loop",
    "evaluate": "evaluation.evaluating",
    "finetune_episode": "train.loop",
    "finetune_episodes": "train.loop",
    "fit": "classifier.making",
    "load_classifier": "classifier.folder",
    "read_run": "run.folder",
    "read_tracked": "run.tracked",
}

__all__ = [
    "Arm",
    "Classifier",
    "Episode",
    "EpisodeResult",
    "EvaluateSettings",
    "Evaluation",
    "FitSettings",
    "NonFiniteLossError",
    "Protocol",
    "Runtime",
    "Tracker",
    "episodes_that_fit",
    "evaluate",
    "finetune_episode",
    "finetune_episodes",
    "fit",
    "load_classifier",
    "methods",
    "read_run",
    "read_tracked",
]


def __getattr__(name: str) -> Any:
    # PyTorch and open_clip take seconds that a command line's --help should not.
    if name == "methods":
        return importlib.import_module(f"{__name__}.methods")
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
