"""The temperature of a classifier, fitted on its own labelled images and never on others."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from tir_kernels.errors import FewShotError, first_line
from tir_kernels.fewshot.classifier.classifier import Classifier
from tir_kernels.fewshot.classifier.expected import held_out_parts, number_of_folds
from tir_kernels.fewshot.classifier.figures import why_no_estimate
from tir_kernels.fewshot.classifier.fitting import Fitter, Support
from tir_kernels.fewshot.classifier.folder import ABOUT_FILE
from tir_kernels.fewshot.run.folder import expanded_out, write_json
from tir_kernels.fewshot.settings import FitSettings
from tir_kernels.fewshot.strict_json import decode_json
from tir_kernels.fewshot.train.batch import NonFiniteLossError
from tir_kernels.files import MIB, read_bytes
from tir_kernels.text import setting

_TEMPERATURE = setting("temperature")
_LEAST, _MOST = 1e-2, 1e2
_FOLDS = 5  # where the fit was without held-out trainings


def held_out_logits(
    classifier: Classifier, support: Support
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Logits of a classifier's labelled images, each from a training without it, and their labels.

    The folds are those of ``expected_accuracy``, of five where the fit had none.

    Args:
        classifier: The classifier, whose method is trained again.
        support: The images that it was made from.

    Raises:
        FewShotError: There is no way to hold images out, a training failed, or memory ran out.
    """
    about = classifier.about
    settings = FitSettings(**about.settings)
    settings = replace(settings, folds=settings.folds or _FOLDS)
    runtime = replace(classifier.runtime, precision=about.precision)
    fitter = Fitter(classifier.model, about.base, about.method, settings, runtime)
    if not number_of_folds(fitter, support):
        raise FewShotError(
            f"{_TEMPERATURE}: can't be fitted, since "
            f"{why_no_estimate(settings.folds, about.support)}, so that images can't be held out; "
            "pass a number"
        )
    logits, labels = [], []
    for fold, (kept, held_out) in enumerate(held_out_parts(fitter, support)):
        try:
            result = fitter.train(f"fold{fold}", fitter.episode(kept, held_out))
        except NonFiniteLossError as error:
            raise FewShotError(
                f"{_TEMPERATURE}: can't be fitted, since a training without some of the images "
                f"failed: {first_line(error)}; pass a number"
            ) from error
        except torch.OutOfMemoryError as error:
            raise FewShotError(
                f"{_TEMPERATURE}: can't be fitted, since memory does not suffice for a training "
                f"as fit carries it out ({first_line(error)}); use another device, or pass a number"
            ) from error
        logits.append(result.query_logits.float().cpu())
        labels.append(held_out.labels)
    return torch.cat(logits).numpy(), torch.cat(labels).numpy()


def fit_temperature(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """The divisor of logits at which their log loss is least.

    Temperature scaling, Guo et al., On Calibration of Modern Neural Networks, ICML 2017.

    Args:
        logits: (N, C).
        labels: (N,) classes.

    Raises:
        FewShotError: There is none between 0.01 and 100, as where all answers are right.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax

    rows = np.arange(len(labels))

    def loss(log_temperature: float) -> float:
        scaled = logits.astype(np.float64) / math.exp(log_temperature)
        return float(-log_softmax(scaled, axis=1)[rows, labels].mean())

    ends = math.log(_LEAST), math.log(_MOST)
    found = float(minimize_scalar(loss, bounds=ends, method="bounded").x)
    # The loss falls towards one of the ends where there is no least one between them.
    if min(map(loss, ends)) <= loss(found):
        right = int((logits.argmax(1) == labels).sum())
        raise FewShotError(
            f"{_TEMPERATURE}: can't be fitted, since {right} of {len(labels)} held-out images are "
            f"classified rightly, and the log loss is least at a temperature beyond "
            f"{_LEAST:g} to {_MOST:g}; pass a number"
        )
    return math.exp(found)


def keep_temperature(folder: str | os.PathLike[str], temperature: float) -> None:
    """Write a temperature into a classifier's folder; nothing else there changes.

    Raises:
        FewShotError: The folder holds no classifier, or can't be written.
    """
    path = Path(expanded_out(os.fspath(folder))) / ABOUT_FILE
    try:
        content = decode_json(read_bytes(path, at_most=64 * MIB))
    except (OSError, ValueError) as error:
        raise FewShotError(f"can't read {path}: {first_line(error)}") from error
    write_json(path, {**content, "temperature": temperature})
