"""A kernel that hangs or crashes on a GPU costs its own test, and no other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from benchmarks import guarded

SECONDS = 120  # of one test, the compilers' work in it


@contextmanager
def harms_no_other_test() -> Iterator[None]:
    """A kernel that hangs ends its process; so does an error that leaves a GPU on which nothing runs.

    Under pytest-xdist the other tests go on in a new process. The GPU's memory is given back: a dozen
    processes share it.
    """
    with guarded.ended_after(SECONDS, "cuda"):
        yield
    if guarded.lost("cuda"):
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        pytest.exit("the GPU's context is lost: no later test can run", 1)
    torch.cuda.empty_cache()
