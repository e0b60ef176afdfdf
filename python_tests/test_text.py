"""Settings in sentences for the user, named as the reader knows them."""

import pickle

import pytest

from tir_kernels.errors import FewShotError, first_line
from tir_kernels.fewshot.options import with_options
from tir_kernels.text import Notice, setting

ADVICE = f"{setting('class_names')}: x_y is empty; pass {setting('class_names', 'a_b.json')}"


def test_settings_are_named_as_the_reader_knows_them():
    notice = Notice(ADVICE)
    assert notice == "class_names: x_y is empty; pass class_names=a_b.json"
    assert with_options(notice) == "--class-names: x_y is empty; pass --class-names a_b.json"
    assert with_options("data=x") == "data=x"


def test_errors_that_quote_others_keep_the_settings():
    inner = FewShotError(f"{ADVICE}\n  or don't")
    assert str(inner) == "class_names: x_y is empty; pass class_names=a_b.json or don't"
    assert str(pickle.loads(pickle.dumps(inner))) == str(inner)
    outer = FewShotError(f"episode 3: {first_line(inner)}")
    assert with_options(outer.notice).startswith("episode 3: --class-names: x_y is empty; pass --c")


@pytest.mark.parametrize("show", [str, with_options])
def test_names_of_files_can_hold_the_marks(show):
    text = show(FewShotError(f"can't read a{setting('b', 'c')}\ufdd1\ufdd0\x1b").notice)
    assert text.isprintable()
    assert text.endswith("\\ufdd1\\ufdd0\\x1b")
