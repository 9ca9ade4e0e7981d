"""Tests that run the Triton kernels in Triton's interpreter, on the CPU:

    TRITON_INTERPRET=1 pytest tests/triton

The variable has to be there before anything imports triton, so these tests are a run of their own;
a plain `pytest` shows them as skipped.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED:
    collect_ignore_glob = ["test_*.py"]


def pytest_report_header(config: pytest.Config) -> str:
    how = "run in the interpreter" if INTERPRETED else "skipped: set TRITON_INTERPRET=1"
    return f"triton kernels: {how}"


@pytest.fixture(autouse=True)
def no_plan_of_another_test() -> None:
    """A test may change the tiles that a kept plan was made with."""
    from dit_kernels.ops import triton_launch

    triton_launch.Plans.clear()


@pytest.fixture(autouse=True, scope="session")
def interpreter() -> None:
    from dit_kernels.ops import triton_launch

    assert triton_launch.INTERPRETED, "triton was imported before TRITON_INTERPRET=1 was set"
    torch.set_num_threads(1)
