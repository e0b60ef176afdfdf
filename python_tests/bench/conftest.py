"""The benchmark program is imported from the root of the repository, where it is started from."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from one_thread import one_thread  # noqa: F401

# This folder is called bench too, but the package goes before a folder that is none.
sys.path.insert(0, str(Path(__file__).parents[2]))


@pytest.fixture
def low_ceilings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Measures the machine's ceilings in no time, and not well."""
    from bench import bounds

    monkeypatch.setattr(bounds, "_SECONDS", 0.0)
    monkeypatch.setattr(bounds, "_COPY_BYTES", {"cpu": 2**16, "cuda": 2**16})
    monkeypatch.setattr(bounds, "_PRODUCT_SIZE", {"cpu": 32, "cuda": 32})
    yield
    for rate in (bounds.bytes_per_second, bounds.known_flops_per_second):
        rate.cache_clear()
