"""Each input is read once and each output written once: every address that a kernel touches, counted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from dit_kernels import ops


class Touched:
    """The addresses of all loads and stores."""

    def __init__(self) -> None:
        self.loads: list[np.ndarray] = []
        self.stores: list[np.ndarray] = []

    def times(self, which: str, tensor: Tensor) -> set[int]:
        """How often the elements of a contiguous tensor were touched."""
        addresses = np.concatenate([np.zeros(0, np.uint64), *getattr(self, which)])
        first = tensor.data_ptr()
        end = first + tensor.numel() * tensor.element_size()
        inside = addresses[(addresses >= first) & (addresses < end)].astype(np.int64) - first
        return set(np.bincount(inside // tensor.element_size(), minlength=tensor.numel()).tolist())


@contextlib.contextmanager
def touched() -> Iterator[Touched]:
    found = Touched()
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def counted(which: list[np.ndarray], ptrs: Any, mask: Any) -> None:
        data, on = np.broadcast_arrays(ptrs.data, mask.data)
        which.append(data[on.astype(bool)].ravel())

    def counted_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        counted(found.loads, ptrs, mask)
        return load(self, ptrs, mask, *rest)

    def counted_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        counted(found.stores, ptrs, mask)
        return store(self, ptrs, value, mask, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_masked_load", counted_load)
        patch.setattr(builder, "create_masked_store", counted_store)
        yield found


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


TOKENS = (2, 9, 40)  # 40 channels: parts of 32 and 16
ROWS = {name: randn(2, 40) for name in ("shift", "scale")}
QK = {"q": randn(2, 9, 3, 24), "k": randn(2, 9, 2, 24), "q_weight": randn(24)}
ANGLES = {"cos": randn(9, 12), "sin": randn(9, 12)}
# function, what is as large as the tokens, the rest; what the backward reads again; outputs that it reads
CASES = {
    "adaln": ("adaln", dict(x=randn(*TOKENS)), ROWS, "x"),
    "adaln-rms-affine": (
        "adaln",
        dict(x=randn(*TOKENS)),
        {**ROWS, "norm": "rms", "weight": randn(40)},
        "x",
    ),
    "gated_residual": (
        "gated_residual",
        dict(residual=randn(*TOKENS), branch=randn(*TOKENS)),
        dict(gate=randn(2, 40)),
        "branch",
    ),
    "gated_adaln": (
        "gated_adaln",
        dict(residual=randn(*TOKENS), branch=randn(*TOKENS)),
        {**ROWS, "gate": randn(2, 40)},
        "branch out0",
    ),
    "gated_adaln-sandwich": (
        "gated_adaln",
        dict(residual=randn(*TOKENS), branch=randn(*TOKENS)),
        {"scale": ROWS["scale"], "gate": randn(2, 40), "gate_act": "tanh", "branch_norm": "rms"},
        "branch out0",
    ),
    "gated_adaln-row-a-token": (
        "gated_adaln",
        dict(
            residual=randn(*TOKENS),
            branch=randn(*TOKENS),
            gate=randn(*TOKENS),
            shift=randn(*TOKENS),
            scale=randn(*TOKENS),
        ),
        {},
        "branch gate scale out0",
    ),
    "qk_norm_rope": (
        "qk_norm_rope",
        dict(q=QK["q"], k=QK["k"]),
        {"q_weight": QK["q_weight"], **ANGLES},
        "q k",
    ),
    "qk_norm_rope-half-hidden": (
        "qk_norm_rope",
        dict(q=QK["q"], k=QK["k"]),
        {"layout": "half", "over": "hidden", "q_weight": randn(72), **ANGLES},
        "q k",
    ),
    "gelu": ("gelu_bias", dict(x=randn(*TOKENS)), dict(bias=randn(40)), "x"),
    "swiglu": ("swiglu", dict(x=randn(*TOKENS)), dict(bias=randn(40)), "x"),
    "unpatchify": (
        "unpatchify",
        dict(tokens=randn(2, 6, 24)),
        dict(grid=(1, 2, 3), patch_size=(1, 2, 2), channels=6),
        "",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_each_input_is_read_once_and_each_output_written_once(name):
    """What is as large as the tokens; forward without and with what the backward needs, then backward."""
    function, large, rest, again = CASES[name]
    call = getattr(ops, function)
    with torch.no_grad(), touched() as forward:
        outputs = call(**large, **rest, backend="triton")
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    assert all(forward.times("loads", x) == {1} for x in large.values())
    assert all(forward.times("stores", out) == {1} for out in outputs)
    assert not any(forward.times("loads", out) - {0} for out in outputs)

    leaves = {name: x.clone().requires_grad_() for name, x in large.items()}
    small = {n: x.clone().requires_grad_() if isinstance(x, Tensor) and n not in ANGLES else x
             for n, x in rest.items()}  # fmt: skip
    with touched() as forward:
        outputs = call(**leaves, **small, backend="triton")
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    assert all(forward.times("loads", x) == {1} for x in leaves.values())
    assert all(forward.times("stores", out) == {1} for out in outputs)

    wanted = [*leaves.values(), *(x for x in small.values() if isinstance(x, Tensor) and x.requires_grad)]  # fmt: skip
    cotangents = [randn(*out.shape) for out in outputs]
    with touched() as backward:
        grads = torch.autograd.grad(outputs, wanted, cotangents)
    named = leaves | {f"out{i}": out for i, out in enumerate(outputs)}
    for which, x in named.items():
        assert backward.times("loads", x) == {int(which in again.split())}, which
    assert all(backward.times("loads", dy) == {1} for dy in cotangents)
    assert all(backward.times("stores", dx) == {1} for dx in grads)
