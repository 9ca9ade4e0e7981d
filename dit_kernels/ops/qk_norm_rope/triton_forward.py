"""The forward kernel of QK-norm and rotary embedding: one launch for q and k, straight from a packed projection.

    n = act(norm(x) * weight + bias);   (a, b) -> (a cos - b sin, a sin + b cos)

Bytes moved, with X = one token tensor: 4X, q and k read and written.
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
    _part,
    _position,
    _row_sum,
    _same,
    _store,
    _zero_pad,
)


@triton.jit
def _forward(
    p, x_ptr, y_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, cos_ptr, sin_ptr,
    N, chunks, chunk, stride_b, stride_n, stride_h, stride_d,
    start, length, angle_sb, angle_sn, angle_sh, angle_sr, eps,
    H: tl.constexpr, BLOCKS: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr, VEC: tl.constexpr,
    D: tl.constexpr, SECTIONS: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, UNIT: tl.constexpr,
    A_VEC: tl.constexpr, A_HEADS: tl.constexpr, A_UNIT: tl.constexpr, A_PERIOD: tl.constexpr,
    NORM: tl.constexpr, HIDDEN: tl.constexpr, RELU: tl.constexpr, EAGER: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    SAME: tl.constexpr = _same(DTYPE, weight_ptr, bias_ptr)
    COUNT: tl.constexpr = H * D if HIDDEN else D
    b, n0, n1, h0 = _position(p, N, chunks, chunk, BLOCKS, _heads(PARTS))
    weight = _load_weight(weight_ptr, h0, PARTS, H, D, SECTIONS, R, HALF, HIDDEN)
    bias = _load_weight(bias_ptr, h0, PARTS, H, D, SECTIONS, R, HALF, HIDDEN)
    for first in range(n0, n1, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        live = n < n1
        token = b * N + n
        rows = b * (stride_b * VEC) + n * (stride_n * VEC)
        x = ()
        for i in tl.static_range(len(PARTS)):
            xa, xb = _load(
                x_ptr,
                rows,
                live,
                h0,
                stride_h * VEC,
                stride_d,
                _part(PARTS, i),
                H,
                D,
                SECTIONS,
                R,
                HALF,
                UNIT,
            )
            x = x + (xa, xb)

        if NORM != "none":
            if NORM == "layer":
                total = _row_sum(x[0] + x[1], HIDDEN)
                for i in tl.static_range(1, len(PARTS)):
                    total += _row_sum(x[2 * i] + x[2 * i + 1], HIDDEN)
                mean = total / COUNT
                centred = ()
                for i in tl.static_range(len(PARTS)):
                    xa, xb = _zero_pad(
                        x[2 * i] - mean,
                        x[2 * i + 1] - mean,
                        h0,
                        _part(PARTS, i),
                        H,
                        D,
                        SECTIONS,
                        R,
                        HALF,
                    )
                    centred = centred + (xa, xb)
                x = centred
            total = _row_sum(x[0] * x[0] + x[1] * x[1], HIDDEN)
            for i in tl.static_range(1, len(PARTS)):
                total += _row_sum(x[2 * i] * x[2 * i] + x[2 * i + 1] * x[2 * i + 1], HIDDEN)
            rstd = tl.rsqrt(total / COUNT + eps)
            if rstd_ptr is not None:
                if HIDDEN:
                    at = token[:, None, None]
                    mask = live[:, None, None]
                else:
                    h = h0 + tl.arange(0, _heads(PARTS))
                    at = (token * H)[:, None, None] + h[None, :, None]
                    mask = live[:, None, None] & (h < H)[None, :, None]
                tl.store(rstd_ptr + at, rstd, mask=mask)
                if NORM == "layer":
                    tl.store(mean_ptr + at, mean, mask=mask)

        window = live & (n >= start) & (n < start + length)
        angle_rows = b * (angle_sb * A_VEC) + (n - start).to(tl.int64) * (angle_sn * A_VEC)
        for i in tl.static_range(len(PARTS)):
            xa = x[2 * i]
            xb = x[2 * i + 1]
            if NORM != "none":
                xa = xa * rstd
                xb = xb * rstd
            xa = _affine(xa, weight, bias, 2 * i, NORM == "rms", DTYPE, SAME, RELU, EAGER)
            xb = _affine(xb, weight, bias, 2 * i + 1, NORM == "rms", DTYPE, SAME, RELU, EAGER)
            if cos_ptr is not None:
                cos, sin, turns = _load_angles(
                    cos_ptr, sin_ptr, angle_rows, window, h0, angle_sh * A_VEC, angle_sr, _part(PARTS, i), H, D, SECTIONS, R,
                    HALF, A_HEADS, A_UNIT, A_PERIOD,
                )  # fmt: skip
                ya = tl.where(turns, xa * cos - xb * sin, xa)
                yb = tl.where(turns, xa * sin + xb * cos, xb)
            else:
                ya = xa
                yb = xb
            _store(
                y_ptr, token * (H * D), live, h0, ya, yb, _part(PARTS, i), H, D, SECTIONS, R, HALF
            )


@triton.jit(do_not_specialize=_SIZES)
def qk_norm_rope_fwd_kernel(
    q_ptr, k_ptr,  # [B, N, H, D], strided; k may be None
    q_out_ptr, k_out_ptr,  # contiguous
    q_mean_ptr, q_rstd_ptr, k_mean_ptr, k_rstd_ptr,  # [B, N, H] or [B, N] float32, or None
    q_weight_ptr, q_bias_ptr, k_weight_ptr, k_bias_ptr,  # [D] or [H * D]
    cos_ptr, sin_ptr,  # [1|B, L, 1|H, R] by their strides
    q_programs: tl.int32, q_N: tl.int32, k_N: tl.int32, q_chunks: tl.int32, k_chunks: tl.int32,
    q_chunk: tl.int32, k_chunk: tl.int32,
    q_sb: tl.int64, q_sn: tl.int64, q_sh: tl.int64, q_sd: tl.int64,
    k_sb: tl.int64, k_sn: tl.int64, k_sh: tl.int64, k_sd: tl.int64,
    start: tl.int32, length: tl.int32, angle_sb: tl.int64, angle_sn: tl.int64, angle_sh: tl.int64, angle_sr: tl.int64,
    eps: tl.float32,
    Q_HEADS: tl.constexpr, Q_BLOCKS: tl.constexpr, Q_PARTS: tl.constexpr, Q_BLOCK_N: tl.constexpr,
    K_HEADS: tl.constexpr, K_BLOCKS: tl.constexpr, K_PARTS: tl.constexpr, K_BLOCK_N: tl.constexpr,
    VEC: tl.constexpr, D: tl.constexpr, SECTIONS: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr,
    UNIT: tl.constexpr, A_VEC: tl.constexpr, A_HEADS: tl.constexpr, A_UNIT: tl.constexpr, A_PERIOD: tl.constexpr,
    NORM: tl.constexpr, HIDDEN: tl.constexpr, RELU: tl.constexpr, EAGER: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0)
    if p < q_programs:
        _forward(
            p, q_ptr, q_out_ptr, q_mean_ptr, q_rstd_ptr, q_weight_ptr, q_bias_ptr, cos_ptr, sin_ptr,
            q_N, q_chunks, q_chunk, q_sb, q_sn, q_sh, q_sd,
            start, length, angle_sb, angle_sn, angle_sh, angle_sr, eps, Q_HEADS, Q_BLOCKS, Q_PARTS, Q_BLOCK_N, VEC,
            D, SECTIONS, R, HALF, UNIT, A_VEC, A_HEADS, A_UNIT, A_PERIOD, NORM, HIDDEN, RELU, EAGER,
        )  # fmt: skip
    else:
        if k_ptr is not None:
            _forward(
                p - q_programs, k_ptr, k_out_ptr, k_mean_ptr, k_rstd_ptr, k_weight_ptr, k_bias_ptr, cos_ptr, sin_ptr,
                k_N, k_chunks, k_chunk, k_sb, k_sn, k_sh, k_sd,
                start, length, angle_sb, angle_sn, angle_sh, angle_sr, eps, K_HEADS, K_BLOCKS, K_PARTS, K_BLOCK_N, VEC,
                D, SECTIONS, R, HALF, UNIT, A_VEC, A_HEADS, A_UNIT, A_PERIOD, NORM, HIDDEN, RELU, EAGER,
            )  # fmt: skip
