"""Tests that run the CUDA kernels in the emulator, on the CPU:

    DIT_KERNELS_EMULATE=1 pytest tests/cuda

The variable has to be there before anything imports the ops, so these tests are a run of their own; a
plain `pytest` shows them as skipped.
"""

import os

import pytest
import torch

EMULATED = os.environ.get("DIT_KERNELS_EMULATE") == "1"
if not EMULATED:
    collect_ignore_glob = ["test_*.py"]


def pytest_report_header(config: pytest.Config) -> str:
    how = "run in the emulator" if EMULATED else "skipped: set DIT_KERNELS_EMULATE=1"
    return f"cuda kernels: {how}"


@pytest.fixture(autouse=True, scope="session")
def emulator() -> None:
    from dit_kernels.ops import cuda_extension

    assert cuda_extension.unavailable() is None
    torch.set_num_threads(1)
