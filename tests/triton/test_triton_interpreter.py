"""Interpreted bfloat16, bit for bit; int64."""

import pytest
import torch
import triton
import triton.language as tl

from dit_kernels.ops import triton_interpreter


@triton.jit
def _round_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offsets, tl.load(x_ptr + offsets))


@triton.jit
def _through_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets).to(tl.bfloat16)
    tl.store(y_ptr + offsets, x.to(tl.float32))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, c_ptr, M: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    m, k, n = tl.arange(0, M), tl.arange(0, K), tl.arange(0, N)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] * N + n[None, :])
    tl.store(c_ptr + m[:, None] * N + n[None, :], tl.dot(a, b))


@triton.jit
def _product_kernel(x_ptr, y_ptr, HOW: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    if HOW == "add":
        tl.store(y_ptr + offsets, x + x)
    elif HOW == "product":
        tl.store(y_ptr + offsets, x * x)
    elif HOW == "compare":
        tl.store(y_ptr + offsets, (x < x).to(tl.float32))
    elif HOW == "sum":
        tl.store(y_ptr, tl.sum(x, axis=0))
    elif HOW == "fma":
        tl.store(y_ptr + offsets, tl.fma(x, x, x))
    elif HOW == "select":
        tl.store(y_ptr + offsets, tl.where(offsets < 4, x, tl.zeros_like(x)))
    elif HOW == "atomic":
        tl.atomic_add(y_ptr + offsets, x)


@triton.jit
def _first_largest(a, i, b, j):
    larger = (b > a) | ((b == a) & (j < i))
    return tl.where(larger, b, a), tl.where(larger, j, i)


@triton.jit
def _reduce_kernel(x_ptr, value_ptr, index_ptr, M: tl.constexpr, N: tl.constexpr):
    m, n = tl.arange(0, M), tl.arange(0, N)
    x = tl.load(x_ptr + m[:, None] * N + n[None, :])
    value, index = tl.reduce((x, n[None, :] + tl.zeros_like(x).to(tl.int32)), 1, _first_largest)
    tl.store(value_ptr + m, value)
    tl.store(index_ptr + m, index)


@triton.jit
def _twice(x):
    return x + x


@triton.jit
def _calling_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    x = _twice(_twice(tl.load(x_ptr + tl.arange(0, BLOCK))))
    tl.store(y_ptr + tl.program_id(0), tl.sum(x, axis=0))


def every_high_half() -> torch.Tensor:
    """Each of the 65,536 upper halves of a float32 with lower halves around the tie."""
    high = torch.arange(1 << 16, dtype=torch.int64)[:, None] << 16
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    return (high | low).flatten().to(torch.int32).view(torch.float32)


def same_bits(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """NaNs are equal to one another whatever their payload."""
    number = {2: torch.int16, 4: torch.int32}[expected.element_size()]
    equal = got.view(number) == expected.view(number)
    return bool((equal | (got.isnan() & expected.isnan())).all())


def test_float32_is_rounded_to_nearest_even():
    x = every_high_half()
    y = torch.empty_like(x, dtype=torch.bfloat16)
    _round_kernel[(6,)](x, y, BLOCK=1 << 16)
    assert same_bits(y, x.to(torch.bfloat16))


def test_bfloat16_is_widened():
    x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    y = torch.empty_like(x, dtype=torch.float32)
    _round_kernel[(1,)](x, y, BLOCK=1 << 16)
    assert same_bits(y, x.float())


def test_explicit_conversion_in_a_kernel():
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    y = torch.empty_like(x)
    _through_kernel[(1,)](x, y, BLOCK=4096)
    assert same_bits(y, x.to(torch.bfloat16).float())


def test_dot_multiplies_values():
    generator = torch.Generator().manual_seed(0)
    # small whole numbers: their products and sums are exact in any order
    a = torch.randint(-8, 9, (16, 32), generator=generator).to(torch.bfloat16)
    b = torch.randint(-8, 9, (32, 16), generator=generator).to(torch.bfloat16)
    c = torch.empty(16, 16)
    _dot_kernel[(1,)](a, b, c, M=16, K=32, N=16)
    assert torch.equal(c, a.float() @ b.float())


@pytest.mark.parametrize("how", ["add", "product", "compare", "sum", "fma", "atomic"])
def test_other_arithmetic_is_an_error(how):
    x = torch.ones(16, dtype=torch.bfloat16)
    y = torch.zeros(16, dtype=torch.bfloat16 if how == "atomic" else torch.float32)
    with pytest.raises(Exception, match="no bfloat16 for"):
        _product_kernel[(1,)](x, y, HOW=how, BLOCK=16)


def test_select_moves_bits():
    x = torch.randn(16, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = torch.empty_like(x)
    _product_kernel[(1,)](x, y, HOW="select", BLOCK=16)
    assert torch.equal(y, torch.where(torch.arange(16) < 4, x, 0))


def test_reduce_with_a_function_of_two_tensors():
    x = torch.randint(0, 9, (8, 32), generator=torch.Generator().manual_seed(0)).float()
    value, index = torch.empty(8), torch.empty(8, dtype=torch.int32)
    _reduce_kernel[(1,)](x, value, index, M=8, N=32)
    assert torch.equal(value, x.amax(1))
    assert torch.equal(index, (x == x.amax(1, keepdim=True)).int().argmax(1).int())


def test_the_language_is_patched_once_a_launch(monkeypatch):
    """However many functions a kernel calls; and it is itself again afterwards, also where a kernel fails."""
    upstream, patched = triton_interpreter._upstream_patch_lang, []
    monkeypatch.setattr(
        triton_interpreter, "_upstream_patch_lang", lambda f: patched.append(f) or upstream(f)
    )
    x, y = torch.ones(16), torch.zeros(3)
    for launches in (1, 2):
        with pytest.raises(Exception, match="no bfloat16 for"):
            _product_kernel[(1,)](x.bfloat16(), y, HOW="add", BLOCK=16)
        _calling_kernel[(3,)](x, y, BLOCK=16)
        assert y.tolist() == [64.0] * 3
        assert len(patched) == 2 * launches
        assert all(tl.core.is_builtin(f) for f in (tl.load, tl.core.load, tl.tensor.__add__))


@triton.jit
def _product_of_sizes_kernel(y_ptr, one: tl.int64, other, FACTOR: tl.constexpr):
    tl.store(y_ptr, one * FACTOR)
    tl.store(y_ptr + 1, other.to(tl.int64) * FACTOR)
    tl.store(y_ptr + 2, one * other)


def test_a_number_declared_as_int64_is_one():
    product = torch.zeros(3, dtype=torch.int64)
    _product_of_sizes_kernel[(1,)](product, 1 << 28, 1 << 28, FACTOR=8)
    assert product.tolist() == [1 << 31, 1 << 31, 1 << 56]
    _product_of_sizes_kernel[(1,)](product, other=3, one=-(1 << 30), FACTOR=4)
    assert product.tolist() == [-(1 << 32), 12, -3 * (1 << 30)]
