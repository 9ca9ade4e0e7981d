"""Bias and activation of the feed-forward in Triton: one elementwise kernel each way.

    gelu    y = gelu(x + bias)                             reads x, writes y
    swiglu  y = silu(a) * b, (a, b) = halves of x + bias   reads x once, writes half of it

A program owns BLOCK_F columns, whose bias it keeps in registers, and walks over tiles of BLOCK_M rows.
The backward recomputes from x, reads x and dy and writes dx; the bias gradient is the column sum of dx
before its rounding, one float32 row a program and then `triton_rows.add_rows`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import triton
import triton.language as tl
from torch import Tensor

from dit_kernels.ops import gradients, triton_launch, triton_rows, triton_tuning
from dit_kernels.ops.feed_forward import axes
from dit_kernels.ops.strides import adjacent


class _Tiles(NamedTuple):
    """A thread holds block_m * block_f / (32 * num_warps) elements of x."""

    block_m: int
    block_f: int
    num_warps: int


_DEFAULT = _Tiles(4, 512, 4)
_OTHERS = (_Tiles(8, 256, 4), _Tiles(2, 1024, 4), _Tiles(4, 1024, 8), _Tiles(2, 512, 4))


def _candidates(key: triton_tuning.Key, default: _Tiles) -> list[_Tiles]:
    return [default, *_OTHERS]


triton_tuning.CANDIDATES |= {
    "feed_forward.forward": _candidates,
    "feed_forward.backward": _candidates,
}


@triton.jit
def _sigmoid(x):
    """(sigmoid(x), sigmoid(-x)): neither by a difference, and nothing overflows."""
    e = tl.exp(-tl.abs(x))
    near = 1.0 / (1.0 + e)
    far = e * near
    return tl.where(x < 0.0, far, near), tl.where(x < 0.0, near, far)


@triton.jit
def _gelu(z, TANH: tl.constexpr):
    if TANH:
        # (1 + tanh(u)) / 2 = sigmoid(2u), which loses nothing where tanh is near -1
        return z * _sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))[0]
    return 0.5 * z * (1.0 + tl.erf(0.7071067811865476 * z))


@triton.jit
def _dgelu(z, TANH: tl.constexpr):
    if TANH:
        s, t = _sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        return s + z * (s * t) * (1.5957691216057308 * (1.0 + 0.134145 * z * z))
    density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
    return 0.5 * (1.0 + tl.erf(0.7071067811865476 * z)) + z * density


@triton.jit
def _load(ptr, rows, cols, mask, stride_c, UNIT: tl.constexpr):
    if UNIT:
        return tl.load(ptr + rows[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    offsets = rows[:, None] + cols[None, :].to(tl.int64) * stride_c
    return tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_bias(ptr, cols, COLS: tl.constexpr, HALF: tl.constexpr):
    if ptr is None:
        return 0.0
    else:
        return tl.load(ptr + HALF * COLS + cols, mask=cols < COLS, other=0.0).to(tl.float32)[
            None, :
        ]


@triton.jit
def _rows(m, inner, outer_stride, inner_stride, VEC: tl.constexpr):
    """Element offsets of rows m = (outer, inner)."""
    outer = (m // inner).to(tl.int64) * (outer_stride * VEC)
    return outer + (m % inner).to(tl.int64) * (inner_stride * VEC)


@triton.jit(do_not_specialize=["M", "inner", "chunk", "x_so", "x_si", "x_sc"])
def _feed_forward_fwd_kernel(
    x_ptr,  # [M, COLS] or, gated, [M, 2 * COLS]; row m = (outer, inner)
    bias_ptr,  # [COLS] or [2 * COLS], or None
    y_ptr,  # [M, COLS], contiguous
    M: tl.int64, inner: tl.int64, chunk: tl.int64, x_so: tl.int64, x_si: tl.int64, x_sc: tl.int64,
    COLS: tl.constexpr, ACT: tl.constexpr, VEC: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    cols = tl.program_id(0) % tl.cdiv(COLS, BLOCK_F) * BLOCK_F + tl.arange(0, BLOCK_F)
    m0 = (tl.program_id(0) // tl.cdiv(COLS, BLOCK_F)).to(tl.int64) * chunk
    bias = _load_bias(bias_ptr, cols, COLS, 0)
    if ACT == "swiglu-first" or ACT == "swiglu-second":
        bias2 = _load_bias(bias_ptr, cols, COLS, 1)
    for start in range(m0, tl.minimum(m0 + chunk, M), BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        mask = (m < M)[:, None] & (cols < COLS)[None, :]
        rows = _rows(m, inner, x_so, x_si, VEC)
        z = _load(x_ptr, rows, cols, mask, x_sc, UNIT) + bias
        if ACT == "gelu-tanh" or ACT == "gelu-none":
            y = _gelu(z, ACT == "gelu-tanh")
        else:
            z2 = _load(x_ptr, rows, COLS + cols, mask, x_sc, UNIT) + bias2
            if ACT == "swiglu-first":
                y = z * _sigmoid(z)[0] * z2
            else:
                y = z * (z2 * _sigmoid(z2)[0])
        out = m[:, None] * COLS + cols[None, :]
        tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _store_sums(ptr, cols, sums, row, COLS: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr):
    offsets = row * WIDTH + HALF * COLS + cols
    tl.store(ptr + offsets, tl.sum(sums, axis=0), mask=cols < COLS)


@triton.jit(
    do_not_specialize=["M", "inner", "chunk", "x_so", "x_si", "x_sc", "dy_so", "dy_si", "dy_sc"]
)
def _feed_forward_bwd_kernel(
    dy_ptr,  # [M, COLS]; row m = (outer, inner)
    x_ptr,  # [M, COLS] or, gated, [M, 2 * COLS]
    bias_ptr,  # [COLS] or [2 * COLS], or None
    dx_ptr,  # as x, contiguous, or None
    dbias_sums_ptr,  # [programs a column block, COLS or 2 * COLS] float32, or None
    M: tl.int64, inner: tl.int64, chunk: tl.int64, x_so: tl.int64, x_si: tl.int64, x_sc: tl.int64,
    dy_so: tl.int64, dy_si: tl.int64, dy_sc: tl.int64,
    COLS: tl.constexpr, ACT: tl.constexpr, VEC: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    GATED: tl.constexpr = ACT == "swiglu-first" or ACT == "swiglu-second"
    WIDTH: tl.constexpr = 2 * COLS if GATED else COLS
    p = tl.program_id(0) // tl.cdiv(COLS, BLOCK_F)
    cols = tl.program_id(0) % tl.cdiv(COLS, BLOCK_F) * BLOCK_F + tl.arange(0, BLOCK_F)
    m0 = p.to(tl.int64) * chunk
    bias = _load_bias(bias_ptr, cols, COLS, 0)
    sums = tl.zeros([BLOCK_M, BLOCK_F], tl.float32)
    if GATED:
        bias2 = _load_bias(bias_ptr, cols, COLS, 1)
        sums2 = tl.zeros([BLOCK_M, BLOCK_F], tl.float32)
    for start in range(m0, tl.minimum(m0 + chunk, M), BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        mask = (m < M)[:, None] & (cols < COLS)[None, :]
        rows = _rows(m, inner, x_so, x_si, VEC)
        dy = _load(dy_ptr, _rows(m, inner, dy_so, dy_si, VEC), cols, mask, dy_sc, UNIT)
        z = _load(x_ptr, rows, cols, mask, x_sc, UNIT) + bias
        out = m[:, None] * WIDTH + cols[None, :]
        if GATED:
            z2 = _load(x_ptr, rows, COLS + cols, mask, x_sc, UNIT) + bias2
            if ACT == "swiglu-first":
                s, t = _sigmoid(z)
                dz2 = dy * (z * s)
                dz = dy * z2 * (s * (1.0 + z * t))
            else:
                s, t = _sigmoid(z2)
                dz = dy * (z2 * s)
                dz2 = dy * z * (s * (1.0 + z2 * t))
            if dbias_sums_ptr is not None:
                sums2 += dz2
            if dx_ptr is not None:
                tl.store(dx_ptr + COLS + out, dz2.to(dx_ptr.dtype.element_ty), mask=mask)
        else:
            dz = dy * _dgelu(z, ACT == "gelu-tanh")
        if dbias_sums_ptr is not None:
            sums += dz
        if dx_ptr is not None:
            tl.store(dx_ptr + out, dz.to(dx_ptr.dtype.element_ty), mask=mask)
    if dbias_sums_ptr is not None:
        row = p.to(tl.int64)
        _store_sums(dbias_sums_ptr, cols, sums, row, COLS, WIDTH, 0)
        if GATED:
            _store_sums(dbias_sums_ptr, cols, sums2, row, COLS, WIDTH, 1)


def supports(x: Tensor, bias: Tensor | None, act: str) -> str | None:
    return axes.unsupported(x) or triton_launch.unsupported((x, bias))


def forward(x: Tensor, bias: Tensor | None, act: str, stats: bool) -> list[Tensor]:
    columns = x.shape[-1] if act.startswith("gelu") else x.shape[-1] // 2
    y = x.new_empty((*x.shape[:-1], columns))
    if y.numel() == 0:
        return [y]
    bias = adjacent(bias)
    triton_launch.run(_feed_forward_fwd_kernel, _plans((x, bias), act), x, bias, y)
    return [y]


def _plan(tensors: Sequence[Tensor | None], act: str) -> triton_launch.Plan:
    """Of the forward kernel."""
    x = cast(Tensor, tensors[0])
    columns = x.shape[-1] if act.startswith("gelu") else x.shape[-1] // 2
    rows, inner, (x_strides,), vec, unit = _arrange(x)
    tiles = triton_tuning.choose("feed_forward.forward", (columns, act), _DEFAULT)
    blocks = triton.cdiv(columns, tiles.block_f)
    chunk = _chunk(x, rows, blocks, tiles.block_m, 32)
    numbers = (
        rows, inner, chunk, *x_strides, columns, act, vec, unit, tiles.block_m, tiles.block_f
    )  # fmt: skip
    options = dict(num_warps=tiles.num_warps)
    return triton_launch.Plan((triton.cdiv(rows, chunk) * blocks,), numbers, options, {})


_plans = triton_launch.Plans(_plan)


def backward(
    grads: list[Tensor | None],
    x: Tensor,
    bias: Tensor | None,
    saved: list[Tensor],
    act: str,
    needs: list[bool],
) -> list[Tensor]:
    (dy,) = grads
    dx, dbias = results = gradients.empty((x, bias), needs)
    wanted = [t for t in results if t is not None]
    columns = x.shape[-1] if act.startswith("gelu") else x.shape[-1] // 2
    if dy is None or dy.numel() == 0:
        return [t.zero_() for t in wanted]
    x, dy = axes.foldable(x, dy)
    rows, inner, (x_strides, dy_strides), vec, unit = _arrange(x, dy)
    tiles = triton_tuning.choose("feed_forward.backward", (columns, act), _DEFAULT)
    blocks = triton.cdiv(columns, tiles.block_f)
    chunk = _chunk(x, rows, blocks, tiles.block_m, 256)
    programs = triton.cdiv(rows, chunk)
    sums = gradients.partial_sums(dbias, programs)
    triton_launch.launch(
        _feed_forward_bwd_kernel, (programs * blocks,),
        dy, x, adjacent(bias), dx, sums, rows, inner, chunk, *x_strides, *dy_strides,
        columns, act, vec, unit, tiles.block_m, tiles.block_f, num_warps=tiles.num_warps,
    )  # fmt: skip
    if sums is not None:
        triton_rows.add_rows(sums, dbias)
    return wanted


def _arrange(*tensors: Tensor) -> tuple[int, int, list[tuple[int, int, int]], int, bool]:
    """(rows, rows of the inner axis, each tensor's strides, what divides them, whether columns are adjacent)."""
    rows, inner, strides = axes.arrange(*tensors)
    unit = all(column == 1 for _, _, column in strides)
    vec = triton_rows.vector(*(s for step in strides for s in step[:2])) if unit else 1
    return rows, inner, [(o // vec, i // vec, column) for o, i, column in strides], vec, unit


def _chunk(x: Tensor, rows: int, blocks: int, block_m: int, most: int) -> int:
    """Rows of one program: enough programs to fill the GPU several times, not more than `most` rows."""
    slots = 16 * triton_launch.multiprocessors(x)
    chunk = block_m
    while chunk < most and rows * blocks > chunk * slots:
        chunk *= 2
    return chunk
