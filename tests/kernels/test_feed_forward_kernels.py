"""Bias and activation: `gelu_bias` and `swiglu` of every backend."""

from __future__ import annotations

import functools

import pytest
import torch

from dit_kernels import ops, testing

OP = "feed_forward"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = [case.name for case in testing.cases(torch.float32) if case.op == OP]
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
ACTS = {
    "gelu-tanh": ("gelu_bias", {"approximate": "tanh"}),
    "gelu-erf": ("gelu_bias", {"approximate": "none"}),
    "swiglu-first": ("swiglu", {"gate": "first"}),
    "swiglu-second": ("swiglu", {"gate": "second"}),
}
every_act = pytest.mark.parametrize(("function", "options"), ACTS.values(), ids=ACTS)


@every_dtype
@pytest.mark.parametrize("name", NAMES)
def test_examples(check, example, name, dtype):
    case = example(name, dtype)
    check(case.function, **case.kwargs)


@every_act
@every_dtype
@pytest.mark.parametrize("width", [1040, 1042, 1], ids=["vectors", "odd", "one"])
def test_rows_and_columns_of_several_blocks(check, function, options, dtype, width):
    """1,040 columns are read 16 bytes at a time, 1,042 of them one element at a time."""
    width = 2 * width if function == "swiglu" else width
    x = 3 * torch.randn(3, 7, width).to(dtype)
    check(function, x=x, bias=torch.randn(width).to(dtype), **options)


@every_act
def test_more_rows_than_one_step_of_a_block(check, function, options):
    x = torch.randn(700, 64).bfloat16()
    check(function, x=x, bias=torch.randn(64).bfloat16(), **options)


@every_act
def test_large_values(check, function, options):
    """Nothing overflows where the activation is flat."""
    x = torch.tensor([-1e4, -90.0, -20.0, -5.0, -1e-6, 0.0, 1e-6, 5.0, 20.0, 1e4]).repeat(2, 2)
    check(function, x=x, **options)


@every_act
@every_dtype
def test_views(check, function, options, dtype):
    wide = torch.randn(2, 3, 5, 64).to(dtype)
    check(function, x=wide[:, 1, :, 8:40], bias=torch.randn(64)[::2].to(dtype), **options)
    check(function, x=wide[:, 1, :, 1:33], **options)
    check(function, x=wide[0, 0].t()[:, :4], **options)
    check(function, x=wide[..., ::2], **options)


@every_act
def test_a_bias_of_another_dtype(check, function, options):
    check(function, x=torch.randn(5, 32).bfloat16(), bias=torch.randn(32), **options)


@every_act
def test_a_gradient_of_other_strides(backend, function, options):
    x = torch.randn(3, 4, 16, requires_grad=True)
    y = getattr(ops, function)(x, backend=backend, **options)
    dy = torch.randn(*y.shape[1::-1], y.shape[2]).transpose(0, 1)
    (got,) = torch.autograd.grad(y, x, dy)
    y = getattr(ops, function)(x, backend=backend, **options)
    (expected,) = torch.autograd.grad(y, x, dy.contiguous())
    assert torch.equal(got, expected)
    y = getattr(ops, function)(x, backend=backend, **options)
    (got,) = torch.autograd.grad(y.sum(), x)  # one element, every stride 0
    y = getattr(ops, function)(x, backend=backend, **options)
    (expected,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(got, expected)


@every_act
@pytest.mark.parametrize("shape", [(0, 4, 16), (4, 0)])
def test_empty(backend, function, options, shape):
    x = torch.randn(shape, requires_grad=True)
    bias = torch.randn(shape[-1], requires_grad=True)
    y = getattr(ops, function)(x, bias, backend=backend, **options)
    dx, dbias = torch.autograd.grad(y.sum(), (x, bias))
    assert dx.shape == x.shape
    assert torch.equal(dbias, torch.zeros(shape[-1]))


def test_only_what_is_asked_for(backend):
    x, bias = torch.randn(5, 12), torch.randn(12)
    grads = testing.run("gelu_bias", {"x": x, "bias": bias}, backend=backend).grads
    for name, other in (("x", "bias"), ("bias", "x")):
        values = {"x": x, "bias": bias}
        alone = functools.partial(ops.gelu_bias, **{other: values.pop(other)})
        assert torch.equal(testing.run(alone, values, backend=backend).grads[name], grads[name])


@every_act
def test_same_bits_in_every_run(same_bits, function, options):
    x, bias = torch.randn(70, 40).bfloat16(), torch.randn(40).bfloat16()
    same_bits(function, x=x, bias=bias, **options)


@every_act
@pytest.mark.usefixtures("one_multiprocessor")
def test_programs_that_walk_over_several_tiles(check, function, options):
    check(function, x=torch.randn(150, 18), bias=torch.randn(18), **options)


@every_act
@pytest.mark.parametrize("width", [32, 18])
def test_offsets_beyond_two_to_the_31(agree_from_afar, function, options, width):
    agree_from_afar(function, "x", x=torch.randn(2, 5, width).bfloat16(), **options)


def test_what_is_not_served(backend):
    with pytest.raises(RuntimeError, match="float64"):
        ops.gelu_bias(torch.randn(2, 4, dtype=torch.float64), backend=backend)
    three = torch.randn(4, 8, 8, 8)[:, :3, :3]
    with pytest.raises(RuntimeError, match="fold into two"):
        ops.gelu_bias(three, backend=backend)
    assert ops.gelu_bias(three).shape == three.shape
