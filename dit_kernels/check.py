"""`dit-kernels check`: every backend that runs on this machine against the float64 reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from dit_kernels import backends, testing


@dataclass(frozen=True)
class Row:
    """The case of an op that comes nearest to what is allowed, of one backend, dtype and direction."""

    op: str
    case: str
    backend: str
    dtype: str
    direction: str
    error: float
    allowed: float
    compared: int  # tensors, over all cases of the op

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def run(device: str | None = None, dtypes: Sequence[torch.dtype] = DTYPES) -> Iterator[Row]:
    """Measure every op's example inputs in each dtype, forward and backward.

    A backend is measured on the cases that it supports.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    cases = {dtype: list(testing.cases(dtype, device)) for dtype in dtypes}
    for op, backend, dtype in _served(dtypes):
        worst: dict[str, tuple[float, str, testing.Accuracy]] = {}
        compared = dict.fromkeys(("forward", "backward"), 0)
        for case in cases[dtype]:
            if case.op != op:
                continue
            try:
                results = testing.measure(case, backend=backend)
            except backends.Unsupported:
                continue
            for measured in results:
                direction = "backward" if measured.tensor.startswith("d") else "forward"
                compared[direction] += 1
                ratio = (
                    measured.error / measured.allowed
                    if measured.allowed
                    else float(not measured.ok)
                )
                if direction not in worst or ratio > worst[direction][0]:
                    worst[direction] = (ratio, f"{case.id} {measured.tensor}", measured)
        if not worst:
            for direction in ("forward", "backward"):
                yield Row(
                    op, "none of its cases is supported", backend, str(dtype).removeprefix("torch."),
                    direction, 0.0, 0.0, 0,
                )  # fmt: skip
        for direction, (_, name, measured) in worst.items():
            yield Row(
                op, name, backend, str(dtype).removeprefix("torch."), direction,
                measured.error, measured.allowed, compared[direction],
            )  # fmt: skip


def _served(dtypes: Sequence[torch.dtype]) -> Iterator[tuple[str, str, torch.dtype]]:
    available = [line.name for line in backends.report() if line.available]
    for op, names in backends.TABLE.items():
        for backend in available:
            if backend == "reference" or backend in names:
                for dtype in dtypes:
                    yield op, backend, dtype
