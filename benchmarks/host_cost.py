"""Microseconds of Python in one call without a gradient: `python -m benchmarks.host_cost`.

Everything runs but the driver's launch: checks, op dispatch, choice of backend, allocation, Triton's own
argument handling. No GPU is needed; processor time, the best of several runs. F.layer_norm of one short
row on the CPU, which does next to no work, stands beside it for the speed of the machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator

import torch
import torch.nn.functional as F

from benchmarks.cases import CASES
from benchmarks.offline import launched
from benchmarks.shapes import SHAPES
from dit_kernels import backends, ops


def microseconds(call: Callable[[], object], runs: int = 150, calls: int = 20) -> float:
    """The best of many short runs: other processes slow down most of them."""
    for _ in range(20):
        call()
    best = float("inf")
    for _ in range(runs):
        start = time.process_time()
        for _ in range(calls):
            call()
        best = min(best, (time.process_time() - start) / calls)
    return best * 1e6


def costs(wanted: Collection[str] = ()) -> Iterator[tuple[str, float]]:
    """(case, microseconds); of these cases, by default of all."""
    row = torch.empty(1, 8)
    yield "F.layer_norm of a row", microseconds(lambda: F.layer_norm(row, (8,)))
    shape = SHAPES["wan-1.3b-480p"].small()
    with launched(), torch.no_grad():
        for case in CASES:
            if "triton" not in backends.TABLE[case.op] or case.name.endswith("-packed"):
                continue
            if wanted and case.name not in wanted:
                continue
            kwargs = case.make(shape, lambda *size: torch.empty(size, dtype=torch.bfloat16))
            function = getattr(ops, case.function)
            cost = microseconds(lambda f=function, k=kwargs: f(**k, backend="triton"))  # type: ignore[misc]
            yield case.name, cost


def main() -> None:
    torch.set_num_threads(1)
    for name, cost in costs():
        print(f"{name:<24}{cost:8.1f} us", flush=True)


if __name__ == "__main__":
    main()
