"""Checks of class prompts before anything is trained: that they fit, and that they differ."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from tir_kernels.adapters.prompt_text import CutNameWarning, PromptTexts, prompt_texts
from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.data.dataset import ImageClass, ImageData
from tir_kernels.fewshot.methods import Method
from tir_kernels.text import setting

# What errors of prompts name as an argument -> the setting that it comes from.
_SETTINGS = {
    "class_names": "class_names",
    "template": "template",
    "context_tokens": "context_tokens",
    "num_vectors": "context_tokens",
}


def check_prompts(
    data: ImageData, tokenizer: Callable[[list[str]], Tensor], methods: Sequence[Method]
) -> list[str]:
    """Check that the prompts of methods suit a model, and that it tells all classes apart.

    Returns:
        At most one line for the user, on names that are too long and are cut in the prompts of
        the method with the least room; it names settings by ``setting``.

    Raises:
        FewShotError: Two classes have the same tokens, as words have that differ in case only, or
            in characters that the tokenizer leaves out, or once they are cut; or a template does
            not suit the learned context.
    """
    _require_distinct(data, tokenizer)
    words, folders = ([getattr(each, of) for each in data.classes] for of in ("words", "folder"))
    longest: PromptTexts | None = None
    for method in methods:
        if not hasattr(method, "template"):  # of those that read no words
            continue
        for template in method.template or (None,):
            try:
                texts = prompt_texts(
                    tokenizer, words, getattr(method, "context_tokens", 0), template
                )
            except ValueError as error:
                raise FewShotError(_with_settings(str(error))) from error
            if len(texts.cut) > (0 if longest is None else len(longest.cut)):
                longest = texts
    if longest is None:
        return []
    return [f"{longest.note(folders)}; give shorter words with {setting('class_names', 'FILE')}"]


@contextmanager
def cut_names_are_known() -> Iterator[None]:
    """A context whose reader was told of cut names by ``check_prompts``: it need not be again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CutNameWarning)
        yield


def _with_settings(message: str) -> str:
    names = "|".join(_SETTINGS)
    return re.sub(
        rf"(?<![\w'\"])({names})(?=[ =:;,]|$)",
        lambda match: setting(_SETTINGS[match[1]]),
        message,
    )


def _require_distinct(data: ImageData, tokenizer: Callable[[list[str]], Tensor]) -> None:
    owners: dict[tuple[int, ...], ImageClass] = {}
    for entry, tokens in zip(data.classes, tokenizer([c.words for c in data.classes]), strict=True):
        other = owners.setdefault(tuple(tokens.tolist()), entry)
        if other is not entry:
            raise FewShotError(
                f"classes {other.folder!r} and {entry.folder!r} have the words {other.words!r} and "
                f"{entry.words!r}, which the model's tokenizer does not tell apart; give them "
                f"others with {setting('class_names', 'FILE')}"
            )
