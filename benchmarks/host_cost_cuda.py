"""Microseconds of the host in one call of each CUDA backend: `python -m benchmarks.host_cost_cuda`.

No GPU is needed: the emulator's extension only notes the launches, so that all but the driver's launch and
the two look-ups of device and stream runs. "above" is what supports() and forward(), or backward(), take
beyond the allocation of their tensors: keys and plans, calls of the extension, launchers. Processor time,
the best of many short runs in turns, for other processes slow down most of them.

Writes host_cost_cuda.json beside this file, and exits with 1 where a forward is above the limit.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["DIT_KERNELS_EMULATE"] = "1"

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.cases import CASES
from benchmarks.shapes import SHAPES
from dit_kernels import backends, ops
from dit_kernels.ops import cuda_extension

LIMIT = 4.0  # of a forward, above the allocation
ROUNDS, CALLS = 400, 20
Run = Callable[[], object]


class Allocations(TorchDispatchMode):
    """The sizes and dtypes that are allocated inside."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Any, torch.dtype]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (
            torch.ops.aten.new_empty, torch.ops.aten.empty_like, torch.ops.aten.empty,
        ):  # fmt: skip
            self.found.append((result.shape, result.dtype))
        return result


def microseconds(runs: list[Run]) -> list[float]:
    """The best of each, measured in turns."""
    best = [float("inf")] * len(runs)
    for run in runs:
        for _ in range(2 * CALLS):
            run()
    for _ in range(ROUNDS):
        for i, run in enumerate(runs):
            start = time.process_time()
            for _ in range(CALLS):
                run()
            best[i] = min(best[i], (time.process_time() - start) / CALLS)
    return [1e6 * seconds for seconds in best]


def allocation(call: Run, like: Tensor) -> Run:
    """A call that allocates what this one does, each in the cheapest way, and no more."""
    with Allocations() as mode:
        call()
    found = [
        None if (size, dtype) == (like.shape, like.dtype) else (tuple(size), dtype)
        for size, dtype in mode.found
    ]
    return lambda: [
        torch.empty_like(like) if other is None else like.new_empty(other[0], dtype=other[1])
        for other in found
    ]


def observed(module: Any, name: str, call: Run) -> tuple[Any, ...] | None:
    """The arguments that `module.name` gets in this call."""
    seen: list[tuple[Any, ...]] = []
    real = getattr(module, name)

    def watched(*args: Any) -> Any:
        seen.append(args)
        return real(*args)

    setattr(module, name, watched)
    try:
        call()
    except backends.Unsupported:
        return None
    finally:
        setattr(module, name, real)
    return seen[0]


def costs() -> Iterator[tuple[str, dict[str, float]]]:
    shape = SHAPES["wan-1.3b-480p"].small()
    kernels = cuda_extension.kernels()
    kernels.record(True)
    try:
        for case in CASES:
            if "cuda" not in backends.TABLE[case.op] or case.name.endswith("-packed"):
                continue
            kwargs = case.make(shape, lambda *size: torch.empty(size, dtype=torch.bfloat16))
            function, module = getattr(ops, case.function), backends.load(case.op, "cuda")

            def whole(f: Any = function, k: Any = kwargs) -> Any:
                return f(**k, backend="cuda")

            with torch.no_grad():
                args = observed(module, "forward", whole)
            if args is None:
                continue
            wanted = [v for v in kwargs.values() if isinstance(v, Tensor) and v.is_floating_point()]
            for tensor in wanted:
                tensor.requires_grad_()

            def both(op: Run = whole, inputs: list[Tensor] = wanted) -> None:
                result = op()
                result = result if isinstance(result, tuple) else (result,)
                grads = [torch.empty_like(t) for t in result]  # type: ignore[attr-defined]
                torch.autograd.grad(result, inputs, grads, allow_unused=True)

            back = observed(module, "backward", both)
            assert back is not None
            for tensor in wanted:
                tensor.requires_grad_(False)
            first = next(a for a in args if isinstance(a, Tensor))

            def forward(m: Any = module, a: Any = args) -> None:
                m.supports(*a[:-1])
                m.forward(*a)

            def backward(m: Any = module, a: Any = back) -> None:
                m.backward(*a)

            with torch.no_grad():
                op, served, ours, gradients, theirs = microseconds([
                    whole, forward, allocation(forward, first), backward, allocation(backward, first),
                ])  # fmt: skip
            kernels.record(True)  # forgets what was noted
            yield case.name, {
                "op": op, "forward": served, "allocation": ours, "above": served - ours,
                "backward": gradients, "its allocation": theirs, "backward above": gradients - theirs,
            }  # fmt: skip
    finally:
        kernels.record(False)


def main() -> int:
    torch.set_num_threads(1)
    found = {}
    for name, row in costs():
        if not found:
            print(f"{'us':<20}" + "".join(f"{column:>16}" for column in row))
        print(f"{name:<20}" + "".join(f"{value:16.1f}" for value in row.values()), flush=True)
        found[name] = {column: round(value, 2) for column, value in row.items()}
    versions = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": _processor(),
    }
    store = Path(__file__).with_suffix(".json")
    store.write_text(json.dumps({**versions, "microseconds": found}, indent=1) + "\n")
    slow = [name for name, row in found.items() if row["above"] > LIMIT]
    print("\n".join(f"{name} takes more than {LIMIT} us above the allocation" for name in slow))
    return 1 if slow else 0


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    sys.exit(main())
