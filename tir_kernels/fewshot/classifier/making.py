"""``fewshot.fit``: from data and the name of a model to a classifier, in one call."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import replace

from tir_kernels.fewshot.classifier.about import BaseModel
from tir_kernels.fewshot.classifier.classifier import Classifier
from tir_kernels.fewshot.classifier.expected import expected_accuracy
from tir_kernels.fewshot.classifier.fitting import (
    Fitter,
    read_support,
    require_fitting,
    with_subjects,
)
from tir_kernels.fewshot.data.dataset import load_data
from tir_kernels.fewshot.data.decoding import Decoding
from tir_kernels.fewshot.data.reader import ImageReader
from tir_kernels.fewshot.devices import resolve_device
from tir_kernels.fewshot.known_template import method_with_known_template
from tir_kernels.fewshot.method_check import check_methods
from tir_kernels.fewshot.methods import DEFAULT_METHODS, Method, method_class
from tir_kernels.fewshot.prompt_check import check_prompts
from tir_kernels.fewshot.resizing import with_resize
from tir_kernels.fewshot.run_options import Inputs
from tir_kernels.fewshot.settings import FitSettings, Runtime
from tir_kernels.towers.loading.models import load_model

_DEFAULT_SETTINGS, _DEFAULT_RUNTIME = FitSettings(), Runtime()


def fit(
    data: str | os.PathLike[str],
    model: str,
    pretrained: str | None = None,
    *,
    method: Method | None = None,
    settings: FitSettings = _DEFAULT_SETTINGS,
    runtime: Runtime = _DEFAULT_RUNTIME,
    class_names: str | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> Classifier:
    """Make a classifier from labelled images.

    Args:
        data: Folder with a sub-folder of images per class, a list of images, or a data set of
            Hugging Face; see ``load_data``. All of its classes are learned, which may be of unequal
            size.
        model, pretrained: The base model, see ``load_model``.
        method: Method with its options; ``None``: the published one, as ``tir-finetune`` takes it.
        settings: Images per class, seed, views, resizing, the estimate of the accuracy, and the
            column of subjects.
        runtime: Device and types.
        class_names: Words of the classes, see ``class_words``.
        on_step: Called with the step, from 0, and its loss after each step on all images.

    Returns:
        The classifier, with figures of its expected accuracy in ``about.figures``.

    Raises:
        FewShotError: The data or the model can't be used, or an image can't be read.
        NonFiniteLossError: The loss became NaN or infinite.
        torch.OutOfMemoryError: Memory does not suffice: set ``batch_size``, or fewer ``shots``.
    """
    method = method_class(DEFAULT_METHODS[0])() if method is None else method
    require_fitting(method, settings)
    runtime = replace(runtime, device=resolve_device(runtime.device)[0])
    inputs = Inputs(os.fspath(data), model, None, class_names, pretrained)
    listed = load_data(
        inputs.data, class_names=inputs.class_names, group_column=settings.group_column
    )
    settings = with_subjects(settings, listed)
    method = method_with_known_template(method, listed)
    loaded = with_resize(load_model(model, pretrained, device=runtime.device), settings.resize)
    for note in (*listed.notes, *loaded.notes):
        warnings.warn(note, stacklevel=2)
    check_prompts(listed, loaded.tokenizer, [method])
    words = [each.words for each in listed.classes]
    check_methods(loaded, {method.name: method}, words, settings.shots or 2, runtime)
    images = ImageReader(
        listed,
        loaded.preprocess,
        decoding=Decoding(),
        notify=lambda text: warnings.warn(text, stacklevel=2),
    )
    support = read_support(listed, images, settings.shots, settings.seed)
    base = BaseModel.of(model, pretrained, loaded)
    fitter = Fitter(loaded, base, method, settings, runtime)
    figures = expected_accuracy(fitter, support)
    return fitter.fit(support, figures=figures, on_step=on_step)
