"""A process that keeps freed memory takes no page faults for the next tensors."""

from __future__ import annotations

import os
import platform

import pytest
from programs import output_of

TURNS = 20
PAGES = 4 * 2**20 // os.sysconf("SC_PAGE_SIZE")  # of a tensor's bytes

PROGRAM = f"""
import resource, sys, torch
from tir_kernels import allocator

is_asked = sys.argv[1] == "keep"
is_kept = is_asked and allocator.keep_freed_memory()
assert allocator.keeps_freed_memory() == is_kept

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range({TURNS}):
        torch.ones(2**20), torch.ones(2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(is_kept, faults())
"""

needs_glibc = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="the C library is not glibc, which alone is told"
)


def run(argument: str, **variables: str) -> tuple[bool, int]:
    """Whether memory was kept, and the page faults of making and freeing tensors of 4 MiB."""
    told = ("GLIBC_TUNABLES", "MALLOC_")
    environment = {name: v for name, v in os.environ.items() if not name.startswith(told)}
    is_kept, faults = output_of(PROGRAM, argument, env=environment | variables).split()
    return is_kept == "True", int(faults)


@needs_glibc
def test_kept_memory_is_not_faulted_in_again() -> None:
    is_kept, faults = run("keep")
    assert is_kept
    assert faults < PAGES


@needs_glibc
def test_memory_that_is_given_back_is_faulted_in_again() -> None:
    """Or the test above would say nothing."""
    _, faults = run("leave", MALLOC_MMAP_THRESHOLD_="1000000")
    assert faults > 1.5 * TURNS * PAGES


@pytest.mark.parametrize(
    "variable", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_"]
)
def test_what_the_environment_says_holds(variable: str) -> None:
    is_kept, _ = run("keep", **{variable: "1000000"})
    assert not is_kept
