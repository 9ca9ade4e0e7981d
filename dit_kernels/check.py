"""`dit-kernels check`: every backend that runs on this machine against the float64 reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from dit_kernels import backends, testing


@dataclass(frozen=True)
class Row:
    """The worst tensor of one case, in one direction, of one backend."""

    op: str
    case: str
    backend: str
    dtype: str
    direction: str
    error: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def run(device: str | None = None, dtypes: Sequence[torch.dtype] = DTYPES) -> Iterator[Row]:
    """Measure every op's example inputs in each dtype, forward and backward.

    A backend is measured on the cases that it supports.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    names = [b.name for b in backends.report() if b.available]
    for dtype in dtypes:
        for case in testing.cases(dtype, device):
            for name in names:
                if name != "reference" and name not in backends.TABLE[case.op]:
                    continue
                measured = testing.measure(case, backend=name)
                for direction in ("forward", "backward"):
                    tensors = [
                        m for m in measured if m.tensor.startswith("d") == (direction == "backward")
                    ]
                    if tensors:
                        worst = max(tensors, key=lambda m: m.error / max(m.allowed, 1e-300))
                        yield Row(
                            case.op, case.id, name, str(dtype).removeprefix("torch."), direction,
                            worst.error, worst.allowed,
                        )  # fmt: skip
