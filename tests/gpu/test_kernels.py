"""Every backend that runs on this GPU, on the shapes of real models, in CUDA graphs and twice.

Forms, dtypes, sizes and strides are in tests/kernels, which runs on a GPU too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.cases import cases_for
from benchmarks.shapes import SHAPES, SWEEPS
from dit_kernels import backends, ops, testing

NAMES = {case.id: case for case in testing.cases(torch.float32)}
KERNELS = [(name, backend) for name, case in NAMES.items() for backend in backends.TABLE[case.op]]
# the packed batches are in the sweeps only
FORMS = SHAPES | {f"packed-{n}": shape for n, shape in SWEEPS["packed"].points.items()}
MODELS = [
    (shape, case.name, backend)
    for shape in FORMS
    for case in cases_for(FORMS[shape])
    for backend in backends.TABLE[case.op]
]


@functools.cache
def examples() -> dict[str, testing.Case]:
    return {case.id: case for case in testing.cases(torch.bfloat16, "cuda")}


def who_serves(case: testing.Case, backend: str) -> str:
    """The backend; or "auto" for a call that it refuses, which another one then has to serve right."""
    assert backends.unavailable(backend) is None, backends.unavailable(backend)
    try:
        with torch.no_grad():
            getattr(ops, case.function)(**case.kwargs, backend=backend)
    except backends.Unsupported:
        return "auto"
    return backend


def replayed(run: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What a CUDA graph of `run` gives when it is replayed over results that were wiped."""
    found: dict[str, Tensor] = {}

    def kept() -> None:
        found.update(run())

    replay = timing.captured(kept)
    assert replay is not None, "it waits for the GPU, or else can't be captured"
    for value in found.values():
        value.detach().zero_()
    replay()
    return found


@pytest.mark.parametrize(("shape", "name", "backend"), MODELS, ids=lambda value: value)
def test_models_shapes(shape, name, backend):
    """The channels, heads and windows of each model, on few tokens."""
    found = next(c for c in cases_for(FORMS[shape]) if c.name == name)
    kwargs = found.arguments(FORMS[shape].small(), torch.bfloat16, "cuda", 0)
    case = testing.Case(found.op, name, found.function, kwargs)
    for measured in testing.measure(case, backend=who_serves(case, backend)):
        assert measured.ok, measured


@pytest.mark.parametrize(("name", "backend"), KERNELS, ids=lambda value: value)
def test_forward_and_backward_replay_from_a_graph(name, backend):
    case = examples()[name]
    options: dict[str, Any] = {"backend": who_serves(case, backend)}
    if case.op == "attention3d":
        options["deterministic"] = True
    leaves = {
        n: v.detach().requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v
        for n, v in case.kwargs.items()
    }
    wanted = {n: v for n, v in leaves.items() if isinstance(v, Tensor) and v.requires_grad}

    def outputs() -> dict[str, Tensor]:
        result = getattr(ops, case.function)(**leaves, **options)
        result = result if isinstance(result, tuple) else (result,)
        return {f"out{i}": out for i, out in enumerate(result) if out is not None}

    cotangents = {n: torch.randn_like(out) for n, out in outputs().items()}

    def run() -> dict[str, Tensor]:
        found = outputs()
        grads = torch.autograd.grad(
            list(found.values()), list(wanted.values()), list(cotangents.values()),
            allow_unused=True, materialize_grads=True,
        )  # fmt: skip
        return found | {f"d{n}": grad for n, grad in zip(wanted, grads, strict=True)}

    expected = {n: value.detach().clone() for n, value in run().items()}
    for key, value in replayed(run).items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize(("name", "backend"), KERNELS, ids=lambda value: value)
def test_gradients_are_deterministic(name, backend):
    case = examples()[name]
    options: dict[str, Any] = {"backend": who_serves(case, backend)}
    if case.op == "attention3d":
        options["deterministic"] = True
    first, second = (testing.run(case.function, case.kwargs, **options).all() for _ in range(2))
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


@pytest.mark.parametrize("backend", backends.TABLE["adaln"])
def test_tensors_of_more_than_2_31_elements(backend):
    """Takes 10 GB of GPU memory."""
    tokens, channels = (1 << 21) + 3, 1152
    x = torch.randn(1, tokens, channels, dtype=torch.bfloat16, device="cuda")
    shift, scale = torch.randn(1, 2 * channels, device="cuda").chunk(2, dim=-1)
    y = ops.adaln(x, shift, scale, backend=backend)
    tail = x[:, -5:].clone()
    assert torch.equal(y[:, -5:], ops.adaln(tail, shift, scale, backend=backend))
