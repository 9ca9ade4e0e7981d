"""Microseconds of the host in one forward call of each CUDA backend: `python -m benchmarks.host_cost_cuda`.

No GPU is needed: the emulator's extension only notes the launches, so that all but the driver's launch
runs. "above" is what supports() and forward() take beyond the allocation of their results: strides, one
call through pybind11, the launcher. Processor time, the best of many short runs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ["DIT_KERNELS_EMULATE"] = "1"

import torch

from benchmarks.cases import CASES
from benchmarks.host_cost import microseconds
from benchmarks.shapes import SHAPES
from dit_kernels import backends, ops
from dit_kernels.ops import cuda_extension


def costs() -> Iterator[tuple[str, float, float, float]]:
    """(case, the whole op, supports and forward, allocation of the results)"""
    shape = SHAPES["wan-1.3b-480p"].small()
    cuda_extension.kernels().record(True)
    try:
        for case in CASES:
            if "cuda" not in backends.TABLE[case.op] or case.name.endswith("-packed"):
                continue
            kwargs = case.make(shape, lambda *size: torch.empty(size, dtype=torch.bfloat16))
            function, module = getattr(ops, case.function), backends.load(case.op, "cuda")
            call = []
            select = backends.select

            def watched(op: str, name: str, args: tuple, call=call, select=select):  # type: ignore[no-untyped-def,type-arg]
                call.append(args)
                return select(op, name, args)

            backends.select = watched
            try:
                with torch.no_grad():
                    function(**kwargs, backend="cuda")
            except backends.Unsupported:
                continue
            finally:
                backends.select = select
            (args,) = call
            results = [(t.shape, t.dtype) for t in module.forward(*args, False)]
            first = next(a for a in args if isinstance(a, torch.Tensor))
            with torch.no_grad():
                whole = microseconds(lambda f=function, k=kwargs: f(**k, backend="cuda"))  # type: ignore[misc]
                served = microseconds(
                    lambda m=module, a=args: (m.supports(*a), m.forward(*a, False))
                )  # type: ignore[misc]
                allocation = microseconds(
                    lambda t=first, r=results: [t.new_empty(size, dtype=d) for size, d in r]  # type: ignore[misc]
                )
            cuda_extension.kernels().record(True)
            yield case.name, whole, served, allocation
    finally:
        cuda_extension.kernels().record(False)


def main() -> None:
    torch.set_num_threads(1)
    print(f"{'us':<24}{'the op':>10}{'backend':>10}{'allocation':>12}{'above':>8}")
    for name, whole, served, allocation in costs():
        print(f"{name:<24}{whole:10.1f}{served:10.1f}{allocation:12.1f}{served - allocation:8.1f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
