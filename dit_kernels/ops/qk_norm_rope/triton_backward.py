"""The backward kernels of QK-norm and rotary embedding: gradients of q and k with sums, and of the angles.

They recompute from x and the saved statistics; 6X bytes are moved. Weight and bias gradients are one float32
row a program, added by `triton_rows.add_rows`; the gradients of cos and sin, which few models learn, are a
kernel of their own whose programs each own some angles and visit samples and heads in order. Nothing is atomic.
"""

# Triton gives its functions no types
# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from dit_kernels.ops.qk_norm_rope.triton_row import (
    _SIZES,
    _affine,
    _heads,
    _load,
    _load_angles,
    _load_weight,
    _one_row,
    _pairs,
    _part,
    _position,
    _row_sum,
    _same,
    _store,
    _zero_pad,
)


@triton.jit
def _statistics(
    mean_ptr, rstd_ptr, token, live, h0, PARTS: tl.constexpr, H: tl.constexpr, HIDDEN: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """The saved (mean, rstd), [N, heads or 1, 1]."""
    mean = 0.0
    rstd = 1.0
    if NORM != "none":
        if HIDDEN:
            at = token[:, None, None]
            mask = live[:, None, None]
        else:
            h = h0 + tl.arange(0, _heads(PARTS))
            at = (token * H)[:, None, None] + h[None, :, None]
            mask = live[:, None, None] & (h < H)[None, :, None]
        rstd = tl.load(rstd_ptr + at, mask=mask, other=0.0)
        if NORM == "layer":
            mean = tl.load(mean_ptr + at, mask=mask, other=0.0)
    return mean, rstd


@triton.jit
def _normalised(
    x_ptr, rows, live, h0, stride_h, stride_d, mean, rstd, PART: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    SECTIONS: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, UNIT: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    xa, xb = _load(x_ptr, rows, live, h0, stride_h, stride_d, PART, H, D, SECTIONS, R, HALF, UNIT)
    if NORM == "layer":
        xa, xb = _zero_pad(xa - mean, xb - mean, h0, PART, H, D, SECTIONS, R, HALF)
    if NORM != "none":
        xa = xa * rstd
        xb = xb * rstd
    return xa, xb


@triton.jit
def _zero(PART: tl.constexpr, BLOCK_N: tl.constexpr):
    HEADS: tl.constexpr = PART[1]
    PAIRS: tl.constexpr = PART[3]
    return tl.zeros([BLOCK_N, HEADS, PAIRS], tl.float32)


@triton.jit
def _zeros(PARTS: tl.constexpr, BLOCK_N: tl.constexpr):
    values = ()
    for i in tl.static_range(len(PARTS)):
        zero = _zero(_part(PARTS, i), BLOCK_N)
        values = values + (zero, zero)
    return values


@triton.jit
def _store_sums(
    ptr, row, sums, h0, PARTS: tl.constexpr, H: tl.constexpr, D: tl.constexpr, SECTIONS: tl.constexpr,
    R: tl.constexpr, HALF: tl.constexpr, HIDDEN: tl.constexpr,
):  # fmt: skip
    if ptr is not None:
        live = tl.full([1], 1, tl.int1)
        for i in tl.static_range(len(PARTS)):
            sa = tl.sum(sums[2 * i], axis=0, keep_dims=True)
            sb = tl.sum(sums[2 * i + 1], axis=0, keep_dims=True)
            if HIDDEN:
                rows = tl.full([1], row * (H * D), tl.int64)
                _store(ptr, rows, live, h0, sa, sb, _part(PARTS, i), H, D, SECTIONS, R, HALF)
            else:
                sa = tl.sum(sa, axis=1, keep_dims=True)
                sb = tl.sum(sb, axis=1, keep_dims=True)
                rows = tl.full([1], row * D, tl.int64)
                _store(ptr, rows, live, 0, sa, sb, _one_row(PARTS, i), 1, D, SECTIONS, R, HALF)


@triton.jit
def _backward(
    p, dy_ptr, x_ptr, dx_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, weight_sums_ptr, bias_sums_ptr,
    cos_ptr, sin_ptr, N, chunks, chunk,
    stride_b, stride_n, stride_h, stride_d, dy_sb, dy_sn, dy_sh, dy_sd,
    start, length, angle_sb, angle_sn, angle_sh, angle_sr,
    H: tl.constexpr, BLOCKS: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr, VEC: tl.constexpr,
    D: tl.constexpr, SECTIONS: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, UNIT: tl.constexpr,
    DY_VEC: tl.constexpr, DY_UNIT: tl.constexpr,
    A_VEC: tl.constexpr, A_HEADS: tl.constexpr, A_UNIT: tl.constexpr, A_PERIOD: tl.constexpr,
    NORM: tl.constexpr, HIDDEN: tl.constexpr, RELU: tl.constexpr, EAGER: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    SAME: tl.constexpr = _same(DTYPE, weight_ptr, bias_ptr)
    COUNT: tl.constexpr = H * D if HIDDEN else D
    b, n0, n1, h0 = _position(p, N, chunks, chunk, BLOCKS, _heads(PARTS))
    weight = _load_weight(weight_ptr, h0, PARTS, H, D, SECTIONS, R, HALF, HIDDEN)
    if RELU:
        bias = _load_weight(bias_ptr, h0, PARTS, H, D, SECTIONS, R, HALF, HIDDEN)
    if weight_sums_ptr is not None:
        weight_sums = _zeros(PARTS, BLOCK_N)
    if bias_sums_ptr is not None:
        bias_sums = _zeros(PARTS, BLOCK_N)
    for first in tl.range(n0, n1, BLOCK_N, num_stages=2):
        n = first + tl.arange(0, BLOCK_N)
        live = n < n1
        token = b * N + n
        rows = b * (stride_b * VEC) + n * (stride_n * VEC)
        dy_rows = b * (dy_sb * DY_VEC) + n * (dy_sn * DY_VEC)
        mean, rstd = _statistics(mean_ptr, rstd_ptr, token, live, h0, PARTS, H, HIDDEN, NORM)
        window = live & (n >= start) & (n < start + length)
        angle_rows = b * (angle_sb * A_VEC) + (n - start).to(tl.int64) * (angle_sn * A_VEC)
        x = ()
        dn = ()
        for i in tl.static_range(len(PARTS)):
            ga, gb = _load(
                dy_ptr,
                dy_rows,
                live,
                h0,
                dy_sh * DY_VEC,
                dy_sd,
                _part(PARTS, i),
                H,
                D,
                SECTIONS,
                R,
                HALF,
                DY_UNIT,
            )
            if cos_ptr is not None:
                cos, sin, turns = _load_angles(
                    cos_ptr, sin_ptr, angle_rows, window, h0, angle_sh * A_VEC, angle_sr, _part(PARTS, i), H, D, SECTIONS, R,
                    HALF, A_HEADS, A_UNIT, A_PERIOD,
                )  # fmt: skip
                da = tl.where(turns, ga * cos + gb * sin, ga)
                db = tl.where(turns, gb * cos - ga * sin, gb)
            else:
                da = ga
                db = gb
            if NORM != "none" or RELU:
                xa, xb = _normalised(
                    x_ptr, rows, live, h0, stride_h * VEC, stride_d, mean, rstd, _part(PARTS, i), H, D, SECTIONS, R, HALF,
                    UNIT, NORM,
                )  # fmt: skip
                x = x + (xa, xb)
                if RELU:
                    na = _affine(xa, weight, bias, 2 * i, NORM == "rms", DTYPE, SAME, False, EAGER)
                    nb = _affine(
                        xb, weight, bias, 2 * i + 1, NORM == "rms", DTYPE, SAME, False, EAGER
                    )
                    da = tl.where(na > 0.0, da, 0.0)
                    db = tl.where(nb > 0.0, db, 0.0)
            dn = dn + (da, db)
        if weight_sums_ptr is not None:
            new = ()
            for i in tl.static_range(2 * len(PARTS)):
                new = new + (weight_sums[i] + dn[i] * x[i],)
            weight_sums = new
        if bias_sums_ptr is not None:
            new = ()
            for i in tl.static_range(2 * len(PARTS)):
                new = new + (bias_sums[i] + dn[i],)
            bias_sums = new
        if dx_ptr is not None:
            if NORM != "none":
                if weight_ptr is not None:
                    new = ()
                    for i in tl.static_range(2 * len(PARTS)):
                        new = new + (dn[i] * weight[i],)
                    dn = new
                along = _row_sum(dn[0] * x[0] + dn[1] * x[1], HIDDEN)
                for i in tl.static_range(1, len(PARTS)):
                    along += _row_sum(dn[2 * i] * x[2 * i] + dn[2 * i + 1] * x[2 * i + 1], HIDDEN)
                along = along / COUNT
                if NORM == "layer":
                    centre = _row_sum(dn[0] + dn[1], HIDDEN)
                    for i in tl.static_range(1, len(PARTS)):
                        centre += _row_sum(dn[2 * i] + dn[2 * i + 1], HIDDEN)
                    centre = centre / COUNT
            for i in tl.static_range(len(PARTS)):
                da = dn[2 * i]
                db = dn[2 * i + 1]
                if NORM != "none":
                    da = da - x[2 * i] * along
                    db = db - x[2 * i + 1] * along
                    if NORM == "layer":
                        da = da - centre
                        db = db - centre
                    da = da * rstd
                    db = db * rstd
                _store(
                    dx_ptr,
                    token * (H * D),
                    live,
                    h0,
                    da,
                    db,
                    _part(PARTS, i),
                    H,
                    D,
                    SECTIONS,
                    R,
                    HALF,
                )
    if weight_sums_ptr is not None:
        _store_sums(
            weight_sums_ptr, p.to(tl.int64), weight_sums, h0, PARTS, H, D, SECTIONS, R, HALF, HIDDEN
        )
    if bias_sums_ptr is not None:
        _store_sums(
            bias_sums_ptr, p.to(tl.int64), bias_sums, h0, PARTS, H, D, SECTIONS, R, HALF, HIDDEN
        )


@triton.jit(do_not_specialize=_SIZES)
def qk_norm_rope_bwd_kernel(
    dq_out_ptr, dk_out_ptr,  # gradients of the outputs, [B, N, H, D], strided
    q_ptr, k_ptr,  # [B, N, H, D], strided
    dq_ptr, dk_ptr,  # contiguous, or None
    q_mean_ptr, q_rstd_ptr, k_mean_ptr, k_rstd_ptr,  # [B, N, H] or [B, N] float32
    q_weight_ptr, q_bias_ptr, k_weight_ptr, k_bias_ptr,  # [D] or [H * D]
    q_weight_sums_ptr, q_bias_sums_ptr, k_weight_sums_ptr, k_bias_sums_ptr,  # a row a program, or None
    cos_ptr, sin_ptr,  # [1|B, L, 1|H, R] by their strides
    q_programs: tl.int32, q_N: tl.int32, k_N: tl.int32, q_chunks: tl.int32, k_chunks: tl.int32,
    q_chunk: tl.int32, k_chunk: tl.int32,
    q_sb: tl.int64, q_sn: tl.int64, q_sh: tl.int64, q_sd: tl.int64,
    k_sb: tl.int64, k_sn: tl.int64, k_sh: tl.int64, k_sd: tl.int64,
    dq_sb: tl.int64, dq_sn: tl.int64, dq_sh: tl.int64, dq_sd: tl.int64,
    dk_sb: tl.int64, dk_sn: tl.int64, dk_sh: tl.int64, dk_sd: tl.int64,
    start: tl.int32, length: tl.int32, angle_sb: tl.int64, angle_sn: tl.int64, angle_sh: tl.int64, angle_sr: tl.int64,
    Q_HEADS: tl.constexpr, Q_BLOCKS: tl.constexpr, Q_PARTS: tl.constexpr, Q_BLOCK_N: tl.constexpr,
    K_HEADS: tl.constexpr, K_BLOCKS: tl.constexpr, K_PARTS: tl.constexpr, K_BLOCK_N: tl.constexpr,
    VEC: tl.constexpr, D: tl.constexpr, SECTIONS: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr,
    UNIT: tl.constexpr, DY_VEC: tl.constexpr, DY_UNIT: tl.constexpr,
    A_VEC: tl.constexpr, A_HEADS: tl.constexpr, A_UNIT: tl.constexpr, A_PERIOD: tl.constexpr,
    NORM: tl.constexpr, HIDDEN: tl.constexpr, RELU: tl.constexpr, EAGER: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0)
    if p < q_programs:
        if dq_out_ptr is not None:
            _backward(
                p, dq_out_ptr, q_ptr, dq_ptr, q_mean_ptr, q_rstd_ptr, q_weight_ptr, q_bias_ptr, q_weight_sums_ptr,
                q_bias_sums_ptr, cos_ptr, sin_ptr, q_N, q_chunks, q_chunk,
                q_sb, q_sn, q_sh, q_sd, dq_sb, dq_sn, dq_sh, dq_sd,
                start, length, angle_sb, angle_sn, angle_sh, angle_sr, Q_HEADS, Q_BLOCKS, Q_PARTS, Q_BLOCK_N, VEC,
                D, SECTIONS, R, HALF, UNIT, DY_VEC, DY_UNIT, A_VEC, A_HEADS, A_UNIT, A_PERIOD, NORM, HIDDEN, RELU, EAGER,
            )  # fmt: skip
    else:
        if dk_out_ptr is not None:
            _backward(
                p - q_programs, dk_out_ptr, k_ptr, dk_ptr, k_mean_ptr, k_rstd_ptr, k_weight_ptr, k_bias_ptr,
                k_weight_sums_ptr, k_bias_sums_ptr, cos_ptr, sin_ptr, k_N, k_chunks, k_chunk,
                k_sb, k_sn, k_sh, k_sd, dk_sb, dk_sn, dk_sh, dk_sd,
                start, length, angle_sb, angle_sn, angle_sh, angle_sr, K_HEADS, K_BLOCKS, K_PARTS, K_BLOCK_N, VEC,
                D, SECTIONS, R, HALF, UNIT, DY_VEC, DY_UNIT, A_VEC, A_HEADS, A_UNIT, A_PERIOD, NORM, HIDDEN, RELU, EAGER,
            )  # fmt: skip


@triton.jit
def _angle_sums(
    dcos, dsin, dy_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, n, window, b0, b1, first_head, N,
    stride_b, stride_n, stride_h, stride_d, dy_sb, dy_sn, dy_sh, dy_sd,
    H: tl.constexpr, PARTS: tl.constexpr, VEC: tl.constexpr,
    D: tl.constexpr, SECTIONS: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, UNIT: tl.constexpr,
    DY_VEC: tl.constexpr, DY_UNIT: tl.constexpr, A_HEADS: tl.constexpr,
    NORM: tl.constexpr, HIDDEN: tl.constexpr, RELU: tl.constexpr, EAGER: tl.constexpr,
):  # fmt: skip
    """Adds q's or k's share of the angles' gradients, [N, heads, pairs] a part: dcos = ga a + gb b, dsin = gb a - ga b."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    SAME: tl.constexpr = _same(DTYPE, weight_ptr, bias_ptr)
    BLOCKS: tl.constexpr = 1 if A_HEADS else (H + _heads(PARTS) - 1) // _heads(PARTS)
    for visit in range(0, (b1 - b0) * BLOCKS):
        b = (b0 + visit // BLOCKS).to(tl.int64)
        h0 = first_head + visit % BLOCKS * _heads(PARTS)
        token = b * N + n
        rows = b * (stride_b * VEC) + n * (stride_n * VEC)
        dy_rows = b * (dy_sb * DY_VEC) + n * (dy_sn * DY_VEC)
        weight = _load_weight(weight_ptr, h0, PARTS, H, D, SECTIONS, R, HALF, HIDDEN)
        bias = _load_weight(bias_ptr, h0, PARTS, H, D, SECTIONS, R, HALF, HIDDEN)
        mean, rstd = _statistics(mean_ptr, rstd_ptr, token, window, h0, PARTS, H, HIDDEN, NORM)
        new_cos = ()
        new_sin = ()
        for i in tl.static_range(len(PARTS)):
            ga, gb = _load(
                dy_ptr,
                dy_rows,
                window,
                h0,
                dy_sh * DY_VEC,
                dy_sd,
                _part(PARTS, i),
                H,
                D,
                SECTIONS,
                R,
                HALF,
                DY_UNIT,
            )
            xa, xb = _normalised(
                x_ptr, rows, window, h0, stride_h * VEC, stride_d, mean, rstd, _part(PARTS, i), H, D, SECTIONS, R, HALF, UNIT,
                NORM,
            )  # fmt: skip
            xa = _affine(xa, weight, bias, 2 * i, NORM == "rms", DTYPE, SAME, RELU, EAGER)
            xb = _affine(xb, weight, bias, 2 * i + 1, NORM == "rms", DTYPE, SAME, RELU, EAGER)
            new_cos = new_cos + (dcos[i] + (ga * xa + gb * xb),)
            new_sin = new_sin + (dsin[i] + (gb * xa - ga * xb),)
        dcos = new_cos
        dsin = new_sin
    return dcos, dsin


@triton.jit
def _store_angles(
    ptr, sums, rows, window, first_head, PARTS: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    SECTIONS: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, A_HEADS: tl.constexpr,
):  # fmt: skip
    """rows [N]: element offsets of [1 or H, R], contiguous."""
    if ptr is not None:
        for i in tl.static_range(len(PARTS)):
            _, _, _, _, angle, turns = _pairs(_part(PARTS, i), D, SECTIONS, R, HALF)
            at = rows[:, None, None] + angle[None, None, :]
            mask = window[:, None, None] & turns[None, None, :]
            total = sums[i]
            if A_HEADS:
                h = first_head + tl.arange(0, _heads(PARTS))
                at = at + (h * R)[None, :, None]
                mask = mask & (h < H)[None, :, None]
            else:
                total = tl.sum(total, axis=1, keep_dims=True)
            tl.store(ptr + at, total.to(ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def qk_norm_rope_bwd_angles_kernel(
    dq_out_ptr, dk_out_ptr,  # gradients of the outputs, [B, N, H, D], strided, or None
    q_ptr, k_ptr,  # [B, N, H, D], strided
    q_mean_ptr, q_rstd_ptr, k_mean_ptr, k_rstd_ptr,  # [B, N, H] or [B, N] float32
    q_weight_ptr, q_bias_ptr, k_weight_ptr, k_bias_ptr,  # [D] or [H * D]
    dcos_ptr, dsin_ptr,  # [A, L, 1|H, R], contiguous; a program owns BLOCK_N of L, and all heads or some
    q_N: tl.int32, k_N: tl.int32, start: tl.int32, length: tl.int32, samples: tl.int32,
    q_sb: tl.int64, q_sn: tl.int64, q_sh: tl.int64, q_sd: tl.int64,
    k_sb: tl.int64, k_sn: tl.int64, k_sh: tl.int64, k_sd: tl.int64,
    dq_sb: tl.int64, dq_sn: tl.int64, dq_sh: tl.int64, dq_sd: tl.int64,
    dk_sb: tl.int64, dk_sn: tl.int64, dk_sh: tl.int64, dk_sd: tl.int64,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr,
    VEC: tl.constexpr, D: tl.constexpr, SECTIONS: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr,
    UNIT: tl.constexpr, DY_VEC: tl.constexpr, DY_UNIT: tl.constexpr, A_HEADS: tl.constexpr,
    NORM: tl.constexpr, HIDDEN: tl.constexpr, RELU: tl.constexpr, EAGER: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first_head = tl.program_id(1) * _heads(PARTS)
    b0 = tl.program_id(2) * samples
    b1 = b0 + samples
    window = row < length
    n = start + row
    dcos = ()
    for i in tl.static_range(len(PARTS)):
        dcos = dcos + (_zero(_part(PARTS, i), BLOCK_N),)
    dsin = dcos
    if dq_out_ptr is not None:
        dcos, dsin = _angle_sums(
            dcos, dsin, dq_out_ptr, q_ptr, q_mean_ptr, q_rstd_ptr, q_weight_ptr, q_bias_ptr, n, window, b0, b1,
            first_head, q_N, q_sb, q_sn, q_sh, q_sd, dq_sb, dq_sn, dq_sh, dq_sd, Q_HEADS, PARTS, VEC,
            D, SECTIONS, R, HALF, UNIT, DY_VEC, DY_UNIT, A_HEADS, NORM, HIDDEN, RELU, EAGER,
        )  # fmt: skip
    if dk_out_ptr is not None:
        dcos, dsin = _angle_sums(
            dcos, dsin, dk_out_ptr, k_ptr, k_mean_ptr, k_rstd_ptr, k_weight_ptr, k_bias_ptr, n, window, b0, b1,
            first_head, k_N, k_sb, k_sn, k_sh, k_sd, dk_sb, dk_sn, dk_sh, dk_sd, K_HEADS, PARTS, VEC,
            D, SECTIONS, R, HALF, UNIT, DY_VEC, DY_UNIT, A_HEADS, NORM, HIDDEN, RELU, EAGER,
        )  # fmt: skip
    rows = tl.program_id(2).to(tl.int64) * length + row
    rows = rows * (Q_HEADS * R if A_HEADS else R)
    _store_angles(
        dcos_ptr, dcos, rows, window, first_head, PARTS, Q_HEADS, D, SECTIONS, R, HALF, A_HEADS
    )
    _store_angles(
        dsin_ptr, dsin, rows, window, first_head, PARTS, Q_HEADS, D, SECTIONS, R, HALF, A_HEADS
    )
