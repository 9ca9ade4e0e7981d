"""Each kernel once, small: what compute-sanitizer watches for accesses out of bounds and for races.

No oracle runs here, so that the watched program is short; `test_kernels` compares the values.
"""

from __future__ import annotations

import functools

import pytest
import torch

from dit_kernels import backends, testing

# the CUDA kernels first: the tools are slow, and their stage may be out of time before the last one
CASES = [
    (case.id, backend)
    for backend in ("cuda", "triton")
    for case in testing.cases(torch.bfloat16)
    if backend in backends.TABLE[case.op]
]


@functools.cache
def examples() -> dict[str, testing.Case]:
    """Made once: under the tools each tensor takes its time."""
    return {case.id: case for case in testing.cases(torch.bfloat16, "cuda")}


@pytest.mark.parametrize(("name", "backend"), CASES, ids=lambda value: value)
def test_runs(name, backend):
    case = examples()[name]
    assert backends.unavailable(backend) is None, backends.unavailable(backend)
    try:
        found = testing.run(case.function, case.kwargs, backend=backend).all()
    except backends.Unsupported:
        found = testing.run(case.function, case.kwargs, backend="auto").all()
    torch.cuda.synchronize()
    for key, value in found.items():
        assert value.isfinite().all(), key
