"""The setting ``resize``: how images get a model's size."""

from __future__ import annotations

from dataclasses import replace

from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.settings import CROP, SQUASH_BILINEAR
from tir_kernels.text import setting
from tir_kernels.towers.loading.loaded import LoadedModel


def with_resize(loaded: LoadedModel, resize: str | None) -> LoadedModel:
    """The model with another resizing in its preprocessing.

    Args:
        loaded: The model.
        resize: One of ``RESIZES``; ``None``: the model's own.

    Raises:
        FewShotError: Its preprocessing can't resize in this way.
    """
    if resize is None:
        return loaded
    interpolation = "bilinear" if resize == SQUASH_BILINEAR else None
    try:
        preprocess = loaded.preprocess.with_resize(resize != CROP, interpolation)
    except FewShotError as error:
        raise FewShotError(
            f"{setting('resize', resize)} can't be had with {loaded.description}: "
            f"{error.notice.marked}"
        ) from error
    return replace(loaded, preprocess=preprocess)
