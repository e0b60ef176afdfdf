"""The device of the Triton kernels: a process either compiles or interprets them."""

import pytest

from tir_kernels.backends.triton import interpreter_is_on

INTERPRETED = interpreter_is_on()

ONLY_DEVICE = (
    pytest.param("cpu", id="interpreted", marks=pytest.mark.slow)
    if INTERPRETED
    else pytest.param("cuda", marks=pytest.mark.gpu)
)


@pytest.fixture(params=[ONLY_DEVICE])
def device(request: pytest.FixtureRequest) -> str:
    """Where the kernels of this process run: a process either compiles or interprets them."""
    return request.param


@pytest.fixture
def cuda() -> str:
    if INTERPRETED:
        pytest.skip("no CUDA device, or TRITON_INTERPRET is set")
    return "cuda"
