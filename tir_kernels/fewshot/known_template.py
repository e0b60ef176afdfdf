"""The template of a known data set, for arms that ask for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tir_kernels.errors import FewShotError
from tir_kernels.fewshot.data.dataset import ImageData
from tir_kernels.fewshot.data.known import KNOWN_SETS, known_set
from tir_kernels.fewshot.data.words import known_name
from tir_kernels.fewshot.methods.templates import KNOWN
from tir_kernels.fewshot.settings import Arm
from tir_kernels.text import setting


def with_known_template(arms: Sequence[Arm], data: ImageData) -> tuple[Arm, ...]:
    """The arms, with the template of the data's known set where one says "known".

    Raises:
        FewShotError: The data is of no known set, or of one without a template.
    """
    return tuple(replace(arm, method=method_with_known_template(arm.method, data)) for arm in arms)


def method_with_known_template(method: Any, data: ImageData) -> Any:
    """A method as ``with_known_template`` leaves it; raises as that does."""
    given = getattr(method, "template", None) or ()
    if KNOWN not in given:
        return method
    name = known_name([entry.folder for entry in data.classes])
    template = known_set(name).template if name else ""
    if not template:
        having = [each for each in KNOWN_SETS if known_set(each).template]
        raise FewShotError(
            f"{setting('template', KNOWN)}: no template is known for "
            f"{name or 'the classes of ' + data.name}, only for {', '.join(having)}; give the "
            "words, such as "
            f"{setting('template', chr(34) + 'a photo of a {}.' + chr(34))}"
        )
    return replace(method, template=tuple(template if each == KNOWN else each for each in given))
