"""The Triton kernels of gelu_bias and swiglu, interpreted on the CPU."""

from __future__ import annotations

import pytest
import torch

from dit_kernels import backends, ops, testing
from dit_kernels.ops import triton_launch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CASES = [case.name for case in testing.cases(torch.float32) if case.op == "feed_forward"]
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
ACTS = [
    ("gelu_bias", {"approximate": "tanh"}),
    ("gelu_bias", {"approximate": "none"}),
    ("swiglu", {"gate": "first"}),
    ("swiglu", {"gate": "second"}),
]
every_act = pytest.mark.parametrize(("function", "options"), ACTS, ids=lambda v: str(v))


def check(function, **kwargs):
    for measured in testing.measure(
        testing.Case("feed_forward", "", function, kwargs), backend="triton"
    ):
        assert measured.ok, measured


@every_dtype
@pytest.mark.parametrize("name", CASES)
def test_examples(name, dtype):
    (case,) = [c for c in testing.cases(dtype) if c.op == "feed_forward" and c.name == name]
    for measured in testing.measure(case, backend="triton"):
        assert measured.ok, measured


@every_act
@every_dtype
def test_odd_rows_and_columns_of_several_blocks(function, options, dtype):
    x = 3 * torch.randn(3, 7, 1042).to(dtype)
    check(function, x=x, bias=torch.randn(1042), **options)


@every_act
def test_large_values(function, options):
    """Nothing overflows where the activation is flat."""
    x = torch.tensor([-1e4, -90.0, -20.0, -5.0, -1e-6, 0.0, 1e-6, 5.0, 20.0, 1e4]).repeat(2, 2)
    check(function, x=x, **options)


@every_act
def test_views(function, options):
    wide = torch.randn(2, 3, 5, 64)
    check(function, x=wide[:, 1, :, 8:40], bias=torch.randn(64)[::2], **options)
    check(function, x=wide[0, 0].t()[:, :4], **options)


@every_act
def test_a_gradient_of_other_strides(function, options):
    x = torch.randn(3, 4, 16, requires_grad=True)
    y = getattr(ops, function)(x, backend="triton", **options)
    dy = torch.randn(*y.shape[1::-1], y.shape[2]).transpose(0, 1)
    (got,) = torch.autograd.grad(y, x, dy)
    y = getattr(ops, function)(x, backend="triton", **options)
    (expected,) = torch.autograd.grad(y, x, dy.contiguous())
    assert torch.equal(got, expected)


@every_act
def test_empty(function, options):
    x = torch.randn(0, 4, 16, requires_grad=True)
    bias = torch.randn(16, requires_grad=True)
    y = getattr(ops, function)(x, bias, backend="triton", **options)
    dx, dbias = torch.autograd.grad(y.sum(), (x, bias))
    assert dx.shape == x.shape
    assert torch.equal(dbias, torch.zeros(16))


def test_only_what_is_asked_for():
    x, bias = torch.randn(5, 12), torch.randn(12)
    grads = testing.run("gelu_bias", {"x": x, "bias": bias}, backend="triton").grads
    dy = torch.randn(5, 12, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    for name in ("x", "bias"):
        args = {"x": x, "bias": bias}
        args[name] = args[name].clone().requires_grad_()
        (got,) = torch.autograd.grad(ops.gelu_bias(**args, backend="triton"), args[name], dy)
        assert torch.equal(got, grads[name])


def test_programs_that_walk_over_several_tiles(monkeypatch):
    monkeypatch.setattr(triton_launch, "multiprocessors", lambda tensor: 1)
    check("gelu_bias", x=torch.randn(150, 17), bias=torch.randn(17))
    check("swiglu", x=torch.randn(150, 18), bias=torch.randn(18))


def test_deterministic():
    kwargs = {"x": torch.randn(30, 40).bfloat16(), "bias": torch.randn(40).bfloat16()}
    first, second = (testing.run("swiglu", kwargs, backend="triton").all() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_unsupported():
    with pytest.raises(RuntimeError, match="float64"):
        ops.gelu_bias(torch.randn(2, 4, dtype=torch.float64), backend="triton")
    three = torch.randn(4, 8, 8, 8)[:, :3, :3]
    with pytest.raises(RuntimeError, match="fold into two"):
        ops.gelu_bias(three, backend="triton")
    assert ops.gelu_bias(three).shape == three.shape
    module = backends.load("feed_forward", "triton")
    assert module.supports(torch.randn(2, 4), None, "gelu-tanh") is None
