"""The CUDA kernels of gelu_bias and swiglu, on the CPU in the emulator."""

from __future__ import annotations

import pytest
import torch

from dit_kernels import backends, ops, testing
from dit_kernels.ops import cuda_extension

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CASES = [case.name for case in testing.cases(torch.float32) if case.op == "feed_forward"]
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
ACTS = {
    "gelu-tanh": ("gelu_bias", {"approximate": "tanh"}),
    "gelu-erf": ("gelu_bias", {"approximate": "none"}),
    "swiglu-first": ("swiglu", {"gate": "first"}),
    "swiglu-second": ("swiglu", {"gate": "second"}),
}
every_act = pytest.mark.parametrize(("function", "options"), ACTS.values(), ids=ACTS)


def check(function, **kwargs):
    for measured in testing.measure(
        testing.Case("feed_forward", "", function, kwargs), backend="cuda"
    ):
        assert measured.ok, measured


@every_dtype
@pytest.mark.parametrize("name", CASES)
def test_examples(name, dtype):
    (case,) = [c for c in testing.cases(dtype) if c.op == "feed_forward" and c.name == name]
    for measured in testing.measure(case, backend="cuda"):
        assert measured.ok, measured


@every_act
@every_dtype
@pytest.mark.parametrize("width", [1040, 1042, 1], ids=["vectors", "odd", "one"])
def test_rows_and_columns_of_several_blocks(function, options, dtype, width):
    """1,040 columns are read 16 bytes at a time, 1,042 of them one element at a time."""
    width = 2 * width if function == "swiglu" else width
    x = 3 * torch.randn(3, 7, width).to(dtype)
    check(function, x=x, bias=torch.randn(width).to(dtype), **options)


@every_act
def test_more_rows_than_one_step_of_a_block(function, options):
    x = torch.randn(700, 64).bfloat16()
    check(function, x=x, bias=torch.randn(64).bfloat16(), **options)


@every_act
def test_large_values(function, options):
    """Nothing overflows where the activation is flat."""
    x = torch.tensor([-1e4, -90.0, -20.0, -5.0, -1e-6, 0.0, 1e-6, 5.0, 20.0, 1e4]).repeat(2, 2)
    check(function, x=x, **options)


@every_act
@every_dtype
def test_views(function, options, dtype):
    wide = torch.randn(2, 3, 5, 64).to(dtype)
    check(function, x=wide[:, 1, :, 8:40], bias=torch.randn(64)[::2].to(dtype), **options)
    check(function, x=wide[:, 1, :, 1:33], **options)
    check(function, x=wide[0, 0].t()[:, :4], **options)
    check(function, x=wide[..., ::2], **options)


@every_act
def test_a_bias_of_another_dtype(function, options):
    check(function, x=torch.randn(5, 32).bfloat16(), bias=torch.randn(32), **options)


@every_act
def test_a_gradient_of_other_strides(function, options):
    x = torch.randn(3, 4, 16, requires_grad=True)
    y = getattr(ops, function)(x, backend="cuda", **options)
    dy = torch.randn(*y.shape[1::-1], y.shape[2]).transpose(0, 1)
    (got,) = torch.autograd.grad(y, x, dy)
    y = getattr(ops, function)(x, backend="cuda", **options)
    (expected,) = torch.autograd.grad(y, x, dy.contiguous())
    assert torch.equal(got, expected)
    y = getattr(ops, function)(x, backend="cuda", **options)
    (got,) = torch.autograd.grad(y.sum(), x)  # one element, every stride 0
    y = getattr(ops, function)(x, backend="cuda", **options)
    (expected,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(got, expected)


@every_act
@pytest.mark.parametrize("shape", [(0, 4, 16), (4, 0)])
def test_empty(function, options, shape):
    x = torch.randn(shape, requires_grad=True)
    bias = torch.randn(shape[-1], requires_grad=True)
    y = getattr(ops, function)(x, bias, backend="cuda", **options)
    dx, dbias = torch.autograd.grad(y.sum(), (x, bias))
    assert dx.shape == x.shape
    assert torch.equal(dbias, torch.zeros(shape[-1]))


def test_only_what_is_asked_for():
    x, bias = torch.randn(5, 12), torch.randn(12)
    grads = testing.run("gelu_bias", {"x": x, "bias": bias}, backend="cuda").grads
    dy = torch.randn(5, 12, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    for name in ("x", "bias"):
        args = {"x": x, "bias": bias}
        args[name] = args[name].clone().requires_grad_()
        (got,) = torch.autograd.grad(ops.gelu_bias(**args, backend="cuda"), args[name], dy)
        assert torch.equal(got, grads[name])


@every_act
def test_the_order_of_threads_changes_nothing(function, options):
    kwargs = {"x": torch.randn(70, 40).bfloat16(), "bias": torch.randn(40).bfloat16(), **options}
    first = testing.run(function, kwargs, backend="cuda").all()
    try:
        for seed in (1, 2):
            cuda_extension.kernels().set_seed(seed)
            again = testing.run(function, kwargs, backend="cuda").all()
            assert all(torch.equal(first[name], again[name]) for name in first)
    finally:
        cuda_extension.kernels().set_seed(0)


def test_unsupported():
    with pytest.raises(RuntimeError, match="take float32, bfloat16 and float16"):
        ops.gelu_bias(torch.randn(2, 4, dtype=torch.float64), backend="cuda")
    three = torch.randn(4, 8, 8, 8)[:, :3, :3]
    with pytest.raises(RuntimeError, match="fold into two"):
        ops.gelu_bias(three, backend="cuda")
    assert ops.gelu_bias(three).shape == three.shape
    assert (
        backends.load("feed_forward", "cuda").supports(torch.randn(2, 4), None, "gelu-tanh") is None
    )


def test_auto_takes_the_kernel():
    x = torch.randn(2, 8)
    assert backends.select("feed_forward", "auto", (x, None, "gelu-tanh")).__name__.endswith("cuda")


def test_errors_of_a_launch_say_kernel_and_shapes():
    kernels = cuda_extension.kernels()
    x, y = torch.randn(3, 8), torch.empty(3, 8)
    where = cuda_extension.where(x)
    with pytest.raises(RuntimeError, match=r"feed_forward_fwd: .*torch.float64 \[3, 8\]"):
        kernels.feed_forward_fwd(*where, x.double(), None, y, 3, 3, 8, 0, 8, 1, 0)
    too_many = (2**31, 2**31, 8, 0, 8, 1, 0)
    with pytest.raises(RuntimeError, match=r"2147483648 rows of 8 columns .* \[3, 8\]"):
        kernels.feed_forward_fwd(*where, x, None, y, *too_many)
    # told that there are four rows, the kernel leaves the tensor
    message = r"feed_forward_fwd_kernel.*block \(0, 0, 0\), thread .*(past the end of|which belongs to no)"
    with pytest.raises(RuntimeError, match=message):
        kernels.feed_forward_fwd(*where, x, None, y, 4, 4, 8, 0, 8, 1, 0)
    with pytest.raises(TypeError):
        kernels.feed_forward_fwd(*where, "x", None, y, 3, 3, 8, 0, 8, 1, 0)
    kernels.feed_forward_fwd(*where, x, None, y, 3, 3, 8, 0, 8, 1, 0)
    torch.testing.assert_close(y, torch.nn.functional.gelu(x, approximate="tanh"))
