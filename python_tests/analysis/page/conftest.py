"""One page of a run whose names are nasty, for all tests that look at it."""

import pytest
from made_runs import ARMS, write_run

from tir_kernels.analysis.page import write_page


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    arms = {**ARMS, "_<img src=x onerror=alert(1)>$a$": "tir"}
    return write_run(tmp_path_factory.mktemp("runs") / "a <b>run</b>", arms=arms, episodes=2)


@pytest.fixture(scope="session")
def page(run_folder):
    return write_page([run_folder], run_folder / "report.html")
