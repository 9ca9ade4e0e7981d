"""The promises of tests/test_promises.py that hold in a kernel's dtypes, kept by the CUDA kernels: under
DIT_KERNELS_EMULATE=1 "auto" takes them wherever they support a call."""

from __future__ import annotations

import pytest
import torch

from dit_kernels import backends, testing
from tests import test_promises
from tests.test_promises import (  # noqa: F401
    test_a_new_length_does_not_recompile,
    test_autocast_keeps_the_gradients_dtypes,
    test_deterministic,
    test_empty_batch,
    test_export,
    test_outputs_are_written_everywhere,
    test_torch_compile_fullgraph_forward_and_backward,
)


@pytest.fixture(autouse=True)
def served(monkeypatch):
    """Which backends served the test: at least one call goes to a CUDA kernel, or to no kernel at all."""
    seen = set()
    select = backends.select

    def watched(op, name, args, **options):
        module = select(op, name, args, **options)
        seen.add((op, module.__name__.rpartition(".")[2]))
        return module

    monkeypatch.setattr(backends, "select", watched)
    yield
    for op, backend in seen:
        assert backend == ("cuda" if "cuda" in backends.TABLE[op] else "reference"), seen


# the backward of gated_adaln reads an output of its forward, which that test does not hand on
@pytest.mark.parametrize(
    "name", [name for name in test_promises.CASES if "gated_adaln" not in name]
)
def test_opcheck(name, monkeypatch):
    test_promises.test_opcheck(name, monkeypatch)


def test_every_op_with_kernels_has_examples():
    ops = {case.op for case in testing.cases(torch.float32)}
    assert {op for op, names in backends.TABLE.items() if "cuda" in names} <= ops
