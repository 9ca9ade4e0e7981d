"""The cases of `bench` under pytest-benchmark, for its comparisons: `pytest benchmarks -k "gelu and forward"`.

What is timed is a batch of calls, waited for; launch gaps count, which `bench` leaves out by replaying graphs.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import bench
from benchmarks.baselines import baselines
from benchmarks.cases import cases_for
from benchmarks.shapes import SHAPES
from benchmarks.timing import sets_for

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BASELINES = {baseline.name: baseline for baseline in baselines(DEVICE)}
CASES = {
    f"{case.name}-{shape}-{name}": (case, SHAPES[shape], baseline)
    for shape in bench.default_shapes(DEVICE, quick=True)
    for case in cases_for(SHAPES[shape])
    for name, baseline in BASELINES.items()
    if baseline.applies(case)
}


@pytest.mark.parametrize("direction", bench.DIRECTIONS)
@pytest.mark.parametrize("name", CASES)
def test_op(benchmark, name, direction):
    case, shape, baseline = CASES[name]
    arguments = case.arguments(shape, torch.bfloat16, DEVICE, 0)
    reason = baseline.missing(case, arguments)
    if reason is None and direction != "forward" and not baseline.has_backward(case):
        reason = "it has no backward"
    if reason:
        pytest.skip(reason)
    call, found, _ = bench.prepared(case, shape, torch.bfloat16, DEVICE, baseline, arguments)
    wrong = [a for a in found if not a.ok]
    assert not wrong or baseline.name not in bench.OURS, wrong
    size = case.cost(shape, torch.bfloat16)["forward"][1]
    seeds = range(sets_for(size, DEVICE))
    inputs = [case.arguments(shape, torch.bfloat16, DEVICE, seed) for seed in seeds]
    calls = bench.calls(call, inputs, direction, DEVICE)

    def batch() -> None:
        for once in calls:
            once()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    batch()
    benchmark.group = f"{case.name} {direction}"
    benchmark.extra_info["calls"] = len(calls)
    benchmark(batch)
