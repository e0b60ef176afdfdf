"""docs/towers.md tells what runs on which family, as trials of each find it."""

import pytest
from methods_table import DOCS, Row, method_rows, table

from tir_kernels.fewshot.methods import METHODS
from tir_kernels.rules import PLACEMENTS

pytestmark = pytest.mark.slow


def test_every_method_and_placement_has_a_row() -> None:
    names = [row.name for row in method_rows()]
    assert {name.partition(",")[0] for name in names} == {f"`{name}`" for name in METHODS}
    assert {f"`tir`, placement {each}" for each in PLACEMENTS[1:]} <= set(names)
    assert "`tir`, relevance centroids" in names


def test_the_documentation_has_the_table() -> None:
    found, text = table(), DOCS.read_text().splitlines()
    first = text.index(found[0])
    stale = "run PYTHONPATH=python_tests python python_tests/towers/methods_table.py --write"
    assert text[first : first + len(found)] == found, stale
    assert not text[first + len(found)].startswith("|"), stale


def test_a_cell_that_fails_is_not_taken_for_one_that_is_refused() -> None:
    """A fault of a method, as an attribute that a tower has not, must not become a reason."""
    from methods_table import FAMILIES, Tried, cell

    tried = Tried(FAMILIES[-1])
    with pytest.raises(AttributeError):
        cell(Row("", lambda tried: tried.model.no_such_part).trial, tried)
    with pytest.raises(TypeError, match="not callable"):
        cell(Row("", lambda tried: tried.tokenizer(["a"])).trial, tried)
