"""What every op promises, kept by the kernels: tests/test_promises.py, where it holds in their dtypes."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_kernels import backends, ops, testing
from tests.test_promises import (  # noqa: F401
    every_case,
    in_dtype,
    test_a_new_length_does_not_recompile,
    test_autocast_keeps_the_gradients_dtypes,
    test_deterministic,
    test_empty_batch,
    test_export,
    test_opcheck,
    test_outputs_are_written_everywhere,
    test_torch_compile_fullgraph_forward_and_backward,
)


@pytest.fixture(autouse=True)
def served(backend, monkeypatch):
    """Calls go to this backend, or to the reference where it has no kernel for the op; never elsewhere."""
    alone = {op: tuple({backend}.intersection(names)) for op, names in backends.TABLE.items()}
    monkeypatch.setattr(backends, "TABLE", alone)
    seen = set()
    select = backends.select

    def watched(op, name, args, **options):
        module = select(op, name, args, **options)
        if name != "reference":  # the oracle
            seen.add((op, module.__name__.rpartition(".")[2]))
        return module

    monkeypatch.setattr(backends, "select", watched)
    yield
    assert seen
    for op, found in seen:
        assert found == (alone[op] or ("reference",))[0], seen


def randn(*shape: int) -> Tensor:
    return torch.randn(
        shape, generator=torch.Generator(torch.get_default_device()).manual_seed(sum(shape))
    )


def example(function: str, frames: int) -> dict[str, Any]:
    """Keyword arguments for a video of `frames` frames of 2 x 3 patches."""
    tokens = 6 * frames
    x, rows = randn(2, tokens, 40), randn(2, 40)
    # no row is short: a norm's second derivative grows with the cube of what it divides by
    q, k, v = (x + x.sign() for x in randn(1, tokens, 3, 2, 16).unbind(2))
    cos, sin = ops.rope_3d((frames, 2, 3), (4, 6, 6))
    match function:
        case "adaln":
            return dict(x=x, shift=rows, scale=rows.flip(0), weight=randn(40))
        case "gated_residual":
            return dict(residual=x, branch=x.flip(1), gate=rows, gate_act="tanh")
        case "gated_adaln":
            return dict(residual=x, branch=x.flip(1), gate=rows, shift=rows.neg(), scale=rows * 2)
        case "qk_norm_rope":
            return dict(q=q, k=k, q_weight=randn(16), k_weight=randn(16).neg(), cos=cos, sin=sin)
        case "attention3d":
            return dict(q=q, k=k, v=v, grid=(frames, 2, 3), window_size=(2, 1, 3))
        case "patch_embed":
            return dict(
                video=randn(1, 4, frames, 4, 6), weight=randn(24, 4, 1, 2, 2), bias=randn(24)
            )
        case "unpatchify":
            return dict(
                tokens=randn(1, tokens, 16), grid=(frames, 2, 3), patch_size=(1, 2, 2), channels=4
            )
        case "final_layer":
            return dict(
                x=x, shift=rows, scale=rows.neg(), weight=randn(16, 40), bias=randn(16),
                grid=(frames, 2, 3), patch_size=(1, 2, 2), channels=4,
            )  # fmt: skip
        case "gelu_bias" | "swiglu":
            return dict(x=x, bias=randn(40))
    raise ValueError(function)


FUNCTIONS = sorted({case.function for case in testing.cases(torch.float32)})
every_function = pytest.mark.parametrize("function", FUNCTIONS)


@every_function
def test_one_graph_at_two_lengths(function):
    """torch.compile(dynamic=True) takes forward and backward whole and gives the same bits."""
    torch._dynamo.reset()
    compiled = torch.compile(
        getattr(ops, function), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for frames in (2, 3):
        kwargs = example(function, frames)
        expected = testing.run(function, kwargs).all()
        actual = testing.run(compiled, kwargs).all()
        assert expected.keys() == actual.keys()
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


@every_function
def test_second_derivatives(function):
    """By the accuracy rule: the gradients of a function of the gradients."""

    def second(dtype: torch.dtype, backend: str | None) -> dict[str, Tensor]:
        kwargs = testing.converted(example(function, 2), dtype)
        leaves = {
            name: value.detach().clone().requires_grad_()
            for name, value in kwargs.items()
            if isinstance(value, Tensor)
        }
        results = getattr(ops, function)(**{**kwargs, **leaves}, backend=backend)
        results = results if isinstance(results, tuple) else (results,)
        options: dict[str, Any] = dict(allow_unused=True, materialize_grads=True)
        inputs = list(leaves.values())
        total = sum(result.sin().sum() for result in results)
        grads = torch.autograd.grad(total, inputs, create_graph=True, **options)
        again = torch.autograd.grad(sum(g.square().sum() for g in grads), inputs, **options)
        return dict(zip(leaves, again, strict=True))

    actual, oracle = second(torch.float32, "auto"), second(torch.float64, "reference")
    with testing.plain_torch():
        eager = second(torch.float32, None)
    for name, exact in oracle.items():
        testing.assert_accurate(actual[name], exact, eager[name], name)


@every_case
def test_each_gradient_alone(backend, name):
    """By the accuracy rule: which tensors want a gradient decides what a kernel reads, adds up and writes."""
    case = in_dtype(name, torch.float32)
    exact = testing.converted(case.kwargs, torch.float64)
    oracle = testing.run(case.function, exact, backend="reference").grads
    with testing.plain_torch():
        eager = testing.run(case.function, case.kwargs).grads
    for tensor in oracle:
        others = {n: v for n, v in case.kwargs.items() if n != tensor}
        call = functools.partial(getattr(ops, case.function), **others, backend=backend)
        (alone,) = testing.run(call, {tensor: case.kwargs[tensor]}).grads.values()
        testing.assert_accurate(alone, oracle[tensor], eager[tensor], tensor)
