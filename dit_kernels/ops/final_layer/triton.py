"""The DiT's last layer in Triton: norm, modulation, projection and unpatchify in one kernel.

    video = unpatchify(y @ weight^T + bias),    y = norm(x) * (1 + scale) + shift

A program owns BLOCK_M tokens of a sample and walks over their channels twice: for mean and rstd (merged
block by block, after Chan et al.), then, out of the L2 cache, for y and its product with the weight. A
16-bit y would be rounded before the tensor cores: it is given to them as the sum of two 16-bit numbers,
which keeps float32's accuracy and costs a second small product. The values of a patch are computed in the
video's order (c, t, h, w), whatever the layout of the weight's rows; so w is adjacent, and the tile is
turned until tokens are adjacent too. Bytes moved: x and the weight read, the video written.

Backward: one kernel walks over tokens as the forward does and writes dx and a compact dvideo [B * N, K]
in the video's order (the workspace); a second owns BLOCK_C channels and a range of tokens and gives the
sums of dweight, dbias, dshift and dscale in float32, which `triton_rows.add_rows` adds in fixed order.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_kernels.ops import triton_launch, triton_rows, triton_tuning

# fewer tokens than this a modulation row, and its gradient is computed a token at a time
_LEAST_GROUP = 16
_MOST_VALUES = 256


@triton.jit
def _values(k, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr):
    """(c, t, h, w) of value k of a patch in the video's order."""
    return k // (PT * PH * PW), k // (PH * PW) % PT, k // PW % PH, k % PW


@triton.jit
def _weight_rows(k, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, ROWS: tl.constexpr):
    """The weight's row of value k: ROWS are the steps of (c, t, h, w) in its layout."""
    c, t, h, w = _values(k, PT, PH, PW)
    return c * ROWS[0] + t * ROWS[1] + h * ROWS[2] + w * ROWS[3]


@triton.jit
def _video_offsets(
    n, k, Gh, Gw, s_c, s_t, s_h, s_w, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr
):
    """Of token n and value k, shaped to broadcast against each other."""
    c, t, h, w = _values(k, PT, PH, PW)
    offsets = c.to(tl.int64) * s_c + (n // (Gh * Gw) * PT + t).to(tl.int64) * s_t
    offsets += (n // Gw % Gh * PH + h).to(tl.int64) * s_h
    return offsets + (n % Gw * PW + w).to(tl.int64) * s_w


@triton.constexpr_function
def _joined(PW, BLOCK_K):
    """How many values of a patch stay together when a tile is turned: w, where it divides the tile."""
    return PW if PW & (PW - 1) == 0 and PW <= BLOCK_K else 1


@triton.jit
def _turned(n0, k0, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, PW: tl.constexpr):
    """(n [1, BLOCK_M * J], k [BLOCK_K / J, BLOCK_M * J]) of a tile turned so that tokens are adjacent."""
    J: tl.constexpr = _joined(PW, BLOCK_K)
    col = tl.arange(0, BLOCK_M * J)
    row = tl.arange(0, BLOCK_K // J)
    return (n0 + col // J)[None, :], k0 + row[:, None] * J + (col % J)[None, :]


@triton.jit
def _load_x(ptr, rows, c, live, stride_c, C: tl.constexpr, UNIT: tl.constexpr):
    mask = live[:, None] & (c < C)[None, :]
    if UNIT:
        return tl.load(ptr + rows[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
    return tl.load(
        ptr + rows[:, None] + (c.to(tl.int64) * stride_c)[None, :], mask=mask, other=0.0
    ).to(tl.float32)


@triton.jit
def _load_modulation(
    ptr, b, n, live, c, s_b, s_g, s_c, length, C: tl.constexpr, FORM: tl.constexpr, VEC: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """shift or scale: [1, BLOCK_C] of one row, that of the first token, or [BLOCK_M, BLOCK_C]; 0 of None."""
    if FORM == "none":
        return 0.0
    else:
        if FORM == "row":
            group = (tl.min(n, axis=0) // length).to(tl.int64)
            rows = tl.full([1], b * (s_b * VEC) + group * (s_g * VEC), tl.int64)
            mask = (c < C)[None, :]
        else:
            rows = b * (s_b * VEC) + (n // length).to(tl.int64) * (s_g * VEC)
            mask = live[:, None] & (c < C)[None, :]
        if UNIT:
            offsets = c
        else:
            offsets = c.to(tl.int64) * s_c
        return tl.load(ptr + rows[:, None] + offsets[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_weight(
    ptr, k, c, s_k, s_c, K: tl.constexpr, C: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    ROWS: tl.constexpr, W_UNIT: tl.constexpr,
):  # fmt: skip
    """k and c shaped to broadcast against each other; W_UNIT: [K, C] contiguous."""
    rows = _weight_rows(k, PT, PH, PW, ROWS)
    if W_UNIT:
        offsets = rows * C + c
    else:
        offsets = rows.to(tl.int64) * s_k + c.to(tl.int64) * s_c
    return tl.load(ptr + offsets, mask=(k < K) & (c < C), other=0.0)


@triton.jit
def _dot_exact(a, b, total, NATIVE: tl.constexpr, PRECISION: tl.constexpr):
    """total + a @ b for a in float32, b as loaded."""
    if NATIVE:
        high = a.to(b.dtype)
        low = (a - high.to(tl.float32)).to(b.dtype)
        return tl.dot(high, b, tl.dot(low, b, total))
    return tl.dot(a, b.to(tl.float32), total, input_precision=PRECISION)


_SIZES = [
    "N", "Gh", "Gw", "eps", "shift_len", "scale_len", "chunks", "chunk", "pieces", "per_range", "segment",
    *(f"{t}_s{axis}" for t in ("x", "shift", "scale", "w", "v") for axis in "bnckgfyx"),
]  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def _final_layer_fwd_kernel(
    x_ptr,  # [B, N, C], strided
    shift_ptr, scale_ptr,  # [B, 1|G|N, C], strided, or None
    weight_ptr,  # [K, C]
    bias_ptr,  # [K] or None
    video_ptr,  # [B, K / (PT * PH * PW), F, Y, X], contiguous
    mean_ptr, rstd_ptr,  # [B, N] float32, or None
    N: tl.int32, Gh: tl.int32, Gw: tl.int32, eps: tl.float32,
    x_sb: tl.int64, x_sn: tl.int64, x_sc: tl.int64,
    shift_sb: tl.int64, shift_sg: tl.int64, shift_sc: tl.int64, shift_len: tl.int32,
    scale_sb: tl.int64, scale_sg: tl.int64, scale_sc: tl.int64, scale_len: tl.int32,
    w_sk: tl.int64, w_sc: tl.int64,
    v_sb: tl.int64, v_sc: tl.int64, v_sf: tl.int64, v_sy: tl.int64, v_sx: tl.int64,
    C: tl.constexpr, K: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, ROWS: tl.constexpr,
    LAYER: tl.constexpr, VEC: tl.constexpr, UNIT: tl.constexpr, M_VEC: tl.constexpr, M_UNIT: tl.constexpr,
    W_UNIT: tl.constexpr, SHIFT: tl.constexpr, SCALE: tl.constexpr, NATIVE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) // tl.cdiv(N, BLOCK_M)).to(tl.int64)
    n0 = tl.program_id(0) % tl.cdiv(N, BLOCK_M) * BLOCK_M
    n = n0 + tl.arange(0, BLOCK_M)
    live = n < N
    rows = b * (x_sb * VEC) + n * (x_sn * VEC)

    mean = tl.zeros([BLOCK_M], tl.float32)
    squares = tl.zeros([BLOCK_M], tl.float32)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        x = _load_x(x_ptr, rows, c, live, x_sc, C, UNIT)
        if LAYER:
            count = tl.minimum(BLOCK_C, C - c0) + 0.0
            seen = c0 + count
            block_mean = tl.sum(x, axis=1) / count
            centred = tl.where((c < C)[None, :], x - block_mean[:, None], 0.0)
            delta = block_mean - mean
            mean += delta * (count / seen)
            squares += tl.sum(centred * centred, axis=1) + delta * delta * (c0 * (count / seen))
        else:
            squares += tl.sum(x * x, axis=1)
    rstd = tl.rsqrt(squares / C + eps)
    if rstd_ptr is not None:
        if tl.program_id(1) == 0:
            tl.store(rstd_ptr + b * N + n, rstd, mask=live)
            if LAYER:
                tl.store(mean_ptr + b * N + n, mean, mask=live)

    k0 = tl.program_id(1) * BLOCK_K
    k = k0 + tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        x = _load_x(x_ptr, rows, c, live, x_sc, C, UNIT)
        scale = _load_modulation(
            scale_ptr,
            b,
            n,
            live,
            c,
            scale_sb,
            scale_sg,
            scale_sc,
            scale_len,
            C,
            SCALE,
            M_VEC,
            M_UNIT,
        )
        shift = _load_modulation(
            shift_ptr,
            b,
            n,
            live,
            c,
            shift_sb,
            shift_sg,
            shift_sc,
            shift_len,
            C,
            SHIFT,
            M_VEC,
            M_UNIT,
        )
        y = (x - mean[:, None]) * rstd[:, None] * (1.0 + scale) + shift
        w = _load_weight(
            weight_ptr, k[None, :], c[:, None], w_sk, w_sc, K, C, PT, PH, PW, ROWS, W_UNIT
        )
        total = _dot_exact(y, w, total, NATIVE, PRECISION)
    if bias_ptr is not None:
        at = _weight_rows(k, PT, PH, PW, ROWS)
        total += tl.load(bias_ptr + at, mask=k < K, other=0.0).to(tl.float32)[None, :]

    J: tl.constexpr = _joined(PW, BLOCK_K)
    total = total.to(video_ptr.dtype.element_ty)
    total = tl.permute(tl.reshape(total, (BLOCK_M, BLOCK_K // J, J)), (1, 0, 2))
    total = tl.reshape(total, (BLOCK_K // J, BLOCK_M * J))
    n, k = _turned(n0, k0, BLOCK_M, BLOCK_K, PW)
    offsets = b * v_sb + _video_offsets(n, k, Gh, Gw, v_sc, v_sf, v_sy, v_sx, PT, PH, PW)
    tl.store(video_ptr + offsets, total, mask=(n < N) & (k < K))


@triton.jit(do_not_specialize=_SIZES)
def _final_layer_bwd_x_kernel(
    dvideo_ptr,  # [B, K / (PT * PH * PW), F, Y, X], strided
    x_ptr,  # [B, N, C], strided
    scale_ptr,  # [B, 1|G|N, C], strided, or None
    weight_ptr,  # [K, C]
    mean_ptr, rstd_ptr,  # [B, N] float32
    dx_ptr,  # [B, N, C], contiguous, or None
    compact_ptr,  # [B * N, K]: dvideo in the video's order (c, t, h, w) of each patch, or None
    N: tl.int32, Gh: tl.int32, Gw: tl.int32,
    x_sb: tl.int64, x_sn: tl.int64, x_sc: tl.int64,
    scale_sb: tl.int64, scale_sg: tl.int64, scale_sc: tl.int64, scale_len: tl.int32,
    w_sk: tl.int64, w_sc: tl.int64,
    v_sb: tl.int64, v_sc: tl.int64, v_sf: tl.int64, v_sy: tl.int64, v_sx: tl.int64,
    C: tl.constexpr, K: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, ROWS: tl.constexpr,
    LAYER: tl.constexpr, VEC: tl.constexpr, UNIT: tl.constexpr, M_VEC: tl.constexpr, M_UNIT: tl.constexpr,
    W_UNIT: tl.constexpr, SCALE: tl.constexpr, NATIVE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) // tl.cdiv(N, BLOCK_M)).to(tl.int64)
    n0 = tl.program_id(0) % tl.cdiv(N, BLOCK_M) * BLOCK_M
    n = n0 + tl.arange(0, BLOCK_M)
    live = n < N
    k = tl.arange(0, BLOCK_K)

    J: tl.constexpr = _joined(PW, BLOCK_K)
    n_turned, k_turned = _turned(n0, 0, BLOCK_M, BLOCK_K, PW)
    offsets = b * v_sb + _video_offsets(
        n_turned, k_turned, Gh, Gw, v_sc, v_sf, v_sy, v_sx, PT, PH, PW
    )
    g = tl.load(dvideo_ptr + offsets, mask=(n_turned < N) & (k_turned < K), other=0.0)
    g = tl.permute(tl.reshape(g, (BLOCK_K // J, BLOCK_M, J)), (1, 0, 2))
    g = tl.reshape(g, (BLOCK_M, BLOCK_K))
    if compact_ptr is not None:
        at = (b * N + n)[:, None] * K + k[None, :]
        tl.store(compact_ptr + at, g, mask=live[:, None] & (k < K)[None, :])

    if dx_ptr is not None:
        rows = b * (x_sb * VEC) + n * (x_sn * VEC)
        rstd = tl.load(rstd_ptr + b * N + n, mask=live, other=0.0)
        mean = tl.zeros([BLOCK_M], tl.float32)
        if LAYER:
            mean = tl.load(mean_ptr + b * N + n, mask=live, other=0.0)
        # dxhat = dy * (1 + scale);  dx = rstd * (dxhat - xhat * <dxhat xhat> - <dxhat>)
        along = tl.zeros([BLOCK_M], tl.float32)
        centre = tl.zeros([BLOCK_M], tl.float32)
        for step in range(0, 2 * tl.cdiv(C, BLOCK_C)):
            c0 = step % tl.cdiv(C, BLOCK_C) * BLOCK_C
            c = c0 + tl.arange(0, BLOCK_C)
            w = _load_weight(
                weight_ptr, k[:, None], c[None, :], w_sk, w_sc, K, C, PT, PH, PW, ROWS, W_UNIT
            )
            if NATIVE:
                dy = tl.dot(g, w)
            else:
                dy = tl.dot(g.to(tl.float32), w.to(tl.float32), input_precision=PRECISION)
            x = _load_x(x_ptr, rows, c, live, x_sc, C, UNIT)
            scale = _load_modulation(
                scale_ptr,
                b,
                n,
                live,
                c,
                scale_sb,
                scale_sg,
                scale_sc,
                scale_len,
                C,
                SCALE,
                M_VEC,
                M_UNIT,
            )
            xhat = (x - mean[:, None]) * rstd[:, None]
            dxhat = dy * (1.0 + scale)  # 0 past C, where the weight is
            if step < tl.cdiv(C, BLOCK_C):
                along += tl.sum(dxhat * xhat, axis=1) / C
                if LAYER:
                    centre += tl.sum(dxhat, axis=1) / C
            else:
                dx = (dxhat - xhat * along[:, None] - centre[:, None]) * rstd[:, None]
                cells = (b * N + n)[:, None] * C + c[None, :]
                tl.store(
                    dx_ptr + cells,
                    dx.to(dx_ptr.dtype.element_ty),
                    mask=live[:, None] & (c < C)[None, :],
                )


@triton.jit(do_not_specialize=_SIZES)
def _final_layer_bwd_sums_kernel(
    compact_ptr,  # [B * N, K]: dvideo in the video's order
    x_ptr,  # [B, N, C], strided
    shift_ptr, scale_ptr,  # [B, 1|G|N, C], strided, or None
    weight_ptr,  # [K, C]
    mean_ptr, rstd_ptr,  # [B, N] float32
    weight_sums_ptr,  # [ranges, K, C] float32, or None
    bias_sums_ptr,  # [ranges, K] float32, or None
    shift_sums_ptr, scale_sums_ptr,  # [chunks, C] float32; of a token a row [B * N, C]; or None
    N: tl.int32, segment: tl.int32, pieces: tl.int32, chunk: tl.int32, chunks: tl.int32, per_range: tl.int32,
    x_sb: tl.int64, x_sn: tl.int64, x_sc: tl.int64,
    shift_sb: tl.int64, shift_sg: tl.int64, shift_sc: tl.int64, shift_len: tl.int32,
    scale_sb: tl.int64, scale_sg: tl.int64, scale_sc: tl.int64, scale_len: tl.int32,
    w_sk: tl.int64, w_sc: tl.int64,
    C: tl.constexpr, K: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, ROWS: tl.constexpr,
    LAYER: tl.constexpr, VEC: tl.constexpr, UNIT: tl.constexpr, M_VEC: tl.constexpr, M_UNIT: tl.constexpr,
    W_UNIT: tl.constexpr, SHIFT: tl.constexpr, SCALE: tl.constexpr, NATIVE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    k = tl.arange(0, BLOCK_K)
    part = tl.program_id(1).to(tl.int64)
    w = _load_weight(weight_ptr, k[:, None], c[None, :], w_sk, w_sc, K, C, PT, PH, PW, ROWS, W_UNIT)
    weight_sums = tl.zeros([BLOCK_C, BLOCK_K], tl.float32)
    bias_sums = tl.zeros([BLOCK_K], tl.float32)
    for i in range(part * per_range, tl.minimum(part * per_range + per_range, chunks)):
        # chunk i: piece i % pieces of a segment, a run of tokens that share their modulation rows
        first = i // pieces * segment
        b = first // N
        start = (first % N).to(tl.int32)
        begin = (i % pieces * chunk).to(tl.int32)
        n1 = start + tl.minimum(begin + chunk, segment)
        shift_sums = tl.zeros([BLOCK_C], tl.float32)
        scale_sums = tl.zeros([BLOCK_C], tl.float32)
        for n0 in range(start + begin, n1, BLOCK_M):
            n = n0 + tl.arange(0, BLOCK_M)
            live = n < n1
            token = b * N + n
            mask = live[:, None] & (k < K)[None, :]
            g = tl.load(compact_ptr + token[:, None] * K + k[None, :], mask=mask, other=0.0)
            # tiles are [BLOCK_C, BLOCK_M]: y is then the left operand of its product as it is
            if weight_sums_ptr is not None or scale_sums_ptr is not None:
                rstd = tl.load(rstd_ptr + token, mask=live, other=0.0)
                x = _load_x(x_ptr, b * (x_sb * VEC) + n * (x_sn * VEC), c, live, x_sc, C, UNIT)
                x = tl.trans(x)
                if LAYER:
                    x = x - tl.load(mean_ptr + token, mask=live, other=0.0)[None, :]
                xhat = x * rstd[None, :]
            if shift_sums_ptr is not None or scale_sums_ptr is not None:
                if NATIVE:
                    dy = tl.dot(tl.trans(w), tl.trans(g))
                else:
                    dy = tl.dot(
                        tl.trans(w).to(tl.float32),
                        tl.trans(g).to(tl.float32),
                        input_precision=PRECISION,
                    )
                cells = token[None, :] * C + c[:, None]
                inside = live[None, :] & (c < C)[:, None]
                if shift_sums_ptr is not None:
                    if SHIFT == "token":
                        tl.store(
                            shift_sums_ptr + cells,
                            dy.to(shift_sums_ptr.dtype.element_ty),
                            mask=inside,
                        )
                    else:
                        shift_sums += tl.sum(dy, axis=1)
                if scale_sums_ptr is not None:
                    dscale = dy * xhat
                    if SCALE == "token":
                        tl.store(
                            scale_sums_ptr + cells,
                            dscale.to(scale_sums_ptr.dtype.element_ty),
                            mask=inside,
                        )
                    else:
                        scale_sums += tl.sum(dscale, axis=1)
            if weight_sums_ptr is not None:
                y = xhat
                if SCALE != "none":
                    scale = _load_modulation(
                        scale_ptr,
                        b,
                        n,
                        live,
                        c,
                        scale_sb,
                        scale_sg,
                        scale_sc,
                        scale_len,
                        C,
                        SCALE,
                        M_VEC,
                        M_UNIT,
                    )
                    y = y * (1.0 + tl.trans(scale))
                if SHIFT != "none":
                    shift = _load_modulation(
                        shift_ptr,
                        b,
                        n,
                        live,
                        c,
                        shift_sb,
                        shift_sg,
                        shift_sc,
                        shift_len,
                        C,
                        SHIFT,
                        M_VEC,
                        M_UNIT,
                    )
                    y = y + tl.trans(shift)
                weight_sums = _dot_exact(y, g, weight_sums, NATIVE, PRECISION)
            if bias_sums_ptr is not None:
                bias_sums += tl.sum(g.to(tl.float32), axis=0)
        row = i * C + c
        if shift_sums_ptr is not None and SHIFT != "token":
            tl.store(shift_sums_ptr + row, shift_sums, mask=c < C)
        if scale_sums_ptr is not None and SCALE != "token":
            tl.store(scale_sums_ptr + row, scale_sums, mask=c < C)

    rows = part * K + _weight_rows(k, PT, PH, PW, ROWS)
    if weight_sums_ptr is not None:
        cells = rows[None, :] * C + c[:, None]
        tl.store(weight_sums_ptr + cells, weight_sums, mask=(c < C)[:, None] & (k < K)[None, :])
    if bias_sums_ptr is not None:
        if tl.program_id(0) == 0:
            tl.store(bias_sums_ptr + rows, bias_sums, mask=k < K)


def supports(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *statics: object,
) -> str | None:
    if x.shape[2] == 0:
        return "x has no channels"
    if not 0 < weight.shape[0] <= _MOST_VALUES:
        return f"a patch may have 1 to {_MOST_VALUES} values; got {weight.shape[0]}"
    return triton_launch.unsupported((x, shift, scale, weight, bias))


def forward(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    grid: Sequence[int],
    patch_size: Sequence[int],
    channels: int,
    layout: str,
    norm: str,
    eps: float,
    stats: bool,
) -> list[Tensor]:
    size = [g * p for g, p in zip(grid, patch_size, strict=True)]
    video = x.new_empty((x.shape[0], channels, *size))
    saved = []
    if stats:
        count = 2 if norm == "layer" else 1
        saved = [x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(count)]
    if x.numel() == 0:
        return [video, *saved]
    mean, rstd = _statistics(saved, norm)
    tensors = (x, shift, scale, weight, _vector(bias), video)
    native, precision = _dot(x, weight)
    plan = _plans(
        tensors, tuple(grid), tuple(patch_size), channels, layout, norm, eps, stats, native, precision
    )  # fmt: skip
    triton_launch.run(_final_layer_fwd_kernel, plan, *tensors, mean, rstd)
    return [video, *saved]


def _plan(
    tensors: Sequence[Tensor | None],
    grid: tuple[int, ...],
    patch_size: tuple[int, ...],
    channels: int,
    layout: str,
    norm: str,
    eps: float,
    stats: bool,
    native: bool,
    precision: str,
) -> triton_launch.Plan:
    """Of the forward kernel."""
    x, shift, scale, weight, _, video = tensors
    x, weight, video = cast(Tensor, x), cast(Tensor, weight), cast(Tensor, video)
    call = _arrange(x, shift, scale, weight, _LEAST_GROUP + x.shape[1])
    key = (x.shape[2], weight.shape[0], native)
    tiles = triton_tuning.choose("final_layer.forward", key, _NATIVE if native else _FLOAT32)
    block_k = max(16, min(128, triton_rows.power_of_two(weight.shape[0])))
    programs = (
        x.shape[0] * triton.cdiv(x.shape[1], tiles.block_m),
        triton.cdiv(weight.shape[0], block_k),
    )
    numbers = (
        x.shape[1], grid[1], grid[2], eps, *call.x, *call.shift, *call.scale, *weight.stride(), *video.stride(),
        x.shape[2], weight.shape[0], *patch_size, _rows(patch_size, channels, layout), norm == "layer",
        *call.access, weight.is_contiguous(), call.shift_form, call.scale_form, native, precision,
        tiles.block_m, tiles.block_c, block_k,
    )  # fmt: skip
    options = dict(num_warps=tiles.num_warps, num_stages=tiles.num_stages)
    return triton_launch.Plan(programs, numbers, options, {})


_plans = triton_launch.Plans(_plan)


class _Tiles(NamedTuple):
    """Tokens and channels a tile of the forward, warps, and stages of the load pipeline."""

    block_m: int
    block_c: int
    num_warps: int
    num_stages: int


_NATIVE, _FLOAT32 = _Tiles(64, 128, 8, 2), _Tiles(32, 32, 4, 2)


def _candidates(key: triton_tuning.Key, default: _Tiles) -> list[_Tiles]:
    """Narrower and wider tiles, fewer warps, a stage more."""
    block_m, block_c, warps, stages = default
    return [
        default, _Tiles(block_m, block_c // 2, warps // 2, stages), _Tiles(2 * block_m, block_c // 2, warps, stages),
        _Tiles(block_m, block_c // 2, warps, stages + 1), _Tiles(block_m, block_c, warps, stages + 1),
    ]  # fmt: skip


triton_tuning.CANDIDATES["final_layer.forward"] = _candidates


def backward(
    grads: list[Tensor | None],
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    saved: list[Tensor],
    grid: Sequence[int],
    patch_size: Sequence[int],
    channels: int,
    layout: str,
    norm: str,
    eps: float,
    needs: list[bool],
) -> list[Tensor]:
    dx, dshift, dscale, dweight, dbias = results = [
        t.new_empty(t.shape) if t is not None and need else None
        for t, need in zip((x, shift, scale, weight, bias), needs, strict=True)
    ]
    (dvideo,) = grads
    if dvideo is None or x.numel() == 0:
        return [t.zero_() for t in results if t is not None]
    samples, tokens, width = x.shape
    values = weight.shape[0]
    mean, rstd = _statistics(saved, norm)
    native, precision = _dot(x, weight)
    block_m, block_c = (64, 64) if native else (32, 32)
    block_k = max(16, triton_rows.power_of_two(values))
    rows = _rows(tuple(patch_size), channels, layout)
    compact = None
    if any(t is not None for t in results[1:]):
        compact = x.new_empty((samples * tokens, values))

    call = _arrange(x, shift, scale, weight, _LEAST_GROUP + tokens)
    triton_launch.launch(
        _final_layer_bwd_x_kernel, (samples * triton.cdiv(tokens, block_m),),
        dvideo, x, scale, weight, mean, rstd, dx, compact,
        tokens, grid[1], grid[2], *call.x, *call.scale, *weight.stride(), *dvideo.stride(),
        width, values, *patch_size, rows, norm == "layer", *call.access, weight.is_contiguous(), call.scale_form,
        native, precision, block_m, block_c, block_k, num_warps=8 if native else 4, num_stages=3,
    )  # fmt: skip
    if compact is None:
        return [t for t in results if t is not None]

    call = _arrange(x, shift, scale, weight, _LEAST_GROUP)
    architecture = triton_launch.architecture(x.device)
    if block_k > (64 if architecture in ("sm_90", "sm_100") else 32):
        block_m = 32  # its sums [BLOCK_C, BLOCK_K] fill the registers
    # on AMD a thread of eight warps has half the registers of one of four
    warps = 4 if not native or (architecture == "amd" and block_k > 16) else 8
    segment = call.segment
    pieces = triton.cdiv(segment, 256)
    chunk = triton.cdiv(triton.cdiv(segment, pieces), block_m) * block_m
    pieces = triton.cdiv(segment, chunk)
    chunks = samples * tokens // segment * pieces
    columns = triton.cdiv(width, block_c)
    ranges = max(1, min(chunks, 4 * triton_launch.multiprocessors(x) // columns))
    per_range = triton.cdiv(chunks, ranges)
    ranges = triton.cdiv(chunks, per_range)

    def sums_of(gradient: Tensor | None, *shape: int) -> Tensor | None:
        return None if gradient is None else x.new_empty(shape, dtype=torch.float32)

    def rows_of(gradient: Tensor | None, form: str) -> Tensor | None:
        """What the modulation's gradient is added from; itself where each token has a row of its own."""
        if gradient is not None and form == "token" and gradient.numel() == x.numel():
            return gradient
        return sums_of(gradient, samples * tokens if form == "token" else chunks, width)

    weight_sums = sums_of(dweight, ranges, values, width)
    bias_sums = sums_of(dbias, ranges, values)
    shift_sums, scale_sums = rows_of(dshift, call.shift_form), rows_of(dscale, call.scale_form)
    triton_launch.launch(
        _final_layer_bwd_sums_kernel, (columns, ranges),
        compact, x, shift, scale, weight, mean, rstd, weight_sums, bias_sums, shift_sums, scale_sums,
        tokens, segment, pieces, chunk, chunks, per_range, *call.x, *call.shift, *call.scale, *weight.stride(),
        width, values, *patch_size, rows, norm == "layer", *call.access, weight.is_contiguous(),
        call.shift_form, call.scale_form, native, precision, block_m, block_c, block_k, num_warps=warps, num_stages=2,
    )  # fmt: skip
    for sums, gradient in ((weight_sums, dweight), (bias_sums, dbias)):
        if gradient is not None:
            triton_rows.add_rows(sums, gradient)
    for sums, gradient in ((shift_sums, dshift), (scale_sums, dscale)):
        if gradient is not None and sums is not gradient:
            triton_rows.add_rows(sums, gradient, gradient.numel() // width)
    return [t for t in results if t is not None]


class _Call(NamedTuple):
    """Strides, outer ones in vectors, and forms of the modulations: "none", "row" or "token"."""

    x: tuple[int, int, int]
    shift: tuple[int, int, int, int]  # of sample, group and channel; tokens a group
    scale: tuple[int, int, int, int]
    access: tuple[int, bool, int, bool]  # VEC, UNIT of x; M_VEC, M_UNIT of the modulations
    shift_form: str
    scale_form: str
    segment: int  # tokens that share every row of form "row"


def _arrange(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, weight: Tensor, least: int
) -> _Call:
    """`least`: tokens of a group from which on its row is loaded once a tile (one row a sample always is)."""
    unit = x.stride(2) == 1
    vec = triton_rows.vector(*x.stride()[:2]) if unit else 1
    segment = x.shape[1]
    found = []
    for m in (shift, scale):
        if m is None:
            found.append(("none", 0, 0, 1, 1))
            continue
        groups = m.shape[1] if m.dim() == 3 else 1
        length = x.shape[1] // groups
        form = "row" if groups == 1 or length >= least else "token"
        if form == "row":
            segment = math.gcd(segment, length)
        group = m.stride(1) if m.dim() == 3 and groups > 1 else 0
        found.append((form, m.stride(0), group, m.stride(-1), length))
    m_unit = all(f[3] == 1 for f in found)
    m_vec = triton_rows.vector(*(s for f in found for s in f[1:3])) if m_unit else 1
    shift_of, scale_of = ((f[1] // m_vec, f[2] // m_vec, f[3], f[4]) for f in found)
    strides = (x.stride(0) // vec, x.stride(1) // vec, x.stride(2))
    access = (vec, unit, m_vec, m_unit)
    return _Call(strides, shift_of, scale_of, access, found[0][0], found[1][0], segment)


def _dot(x: Tensor, weight: Tensor) -> tuple[bool, str]:
    """(whether products are of 16-bit numbers, the precision of float32 ones)."""
    native = x.dtype == weight.dtype and x.dtype != torch.float32
    return native, "ieee" if native else triton_launch.float32_precision()


@functools.cache
def _rows(patch_size: tuple[int, ...], channels: int, layout: str) -> tuple[int, ...]:
    """Steps of (c, t, h, w) among the weight's rows."""
    sizes = dict(zip("thwc", (*patch_size, channels), strict=True))
    axes = layout.split()
    return tuple(math.prod(sizes[a] for a in axes[axes.index(axis) + 1 :]) for axis in "cthw")


def _statistics(saved: list[Tensor], norm: str) -> tuple[Tensor | None, Tensor | None]:
    if not saved:
        return None, None
    return (saved[0], saved[1]) if norm == "layer" else (None, saved[0])


def _vector(bias: Tensor | None) -> Tensor | None:
    """[K], nothing next to x."""
    return bias if bias is None or bias.stride(0) == 1 else bias.contiguous()
