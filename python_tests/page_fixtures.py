"""What tests of pages and of runs that write them share."""

import functools
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def charts_drawn_once() -> Iterator[None]:
    """Equal charts, as of a run that is killed over and over, are drawn once: it takes a second."""
    from tir_kernels.analysis.page import page

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "draw", functools.lru_cache(maxsize=64)(page.draw))
        yield
