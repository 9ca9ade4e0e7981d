"""Tests that need a GPU; they import nothing but torch, triton and this package.

Lack of a GPU is the only reason to skip one.
"""

import os

import pytest
import torch

from benchmarks import bench

SECONDS = 120  # of one test, the compilers' work in it


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "/gpu/" in item.nodeid:
            item.add_marker(
                pytest.mark.skip(reason="needs a GPU: run `make gpu` on a machine with one")
            )


@pytest.fixture(autouse=True)
def _harms_no_other_test():
    """A kernel that hangs ends its process; so does an error that leaves a GPU on which nothing runs.

    Under pytest-xdist the other tests go on in a new process.
    """
    with bench.ended_after(SECONDS, "cuda"):
        yield
    if bench.lost("cuda"):
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        pytest.exit("the GPU's context is lost: no later test can run", 1)
