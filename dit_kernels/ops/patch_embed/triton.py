"""Patch embedding in Triton: a matrix product whose left operand is gathered from the video, never stored.

    tokens[m, c] = sum_k A[m, k] weight[c, k] + bias[c] + pos[n, c],    A[m, k] = video[patch m, value k]

m = (b, gt, gh, gw) counts patches, k = (channel, t, h, w) the values of one. The address of A[m, k] is a
sum of an offset of m and one of k, so that any strides of the video serve; where its channels are adjacent
(channels last) k is walked with the channel fastest. Bytes moved: the video and the weight are read, tokens
written once; the position table is read once a sample.

Backward, each a kernel: dvideo = dtokens @ weight scattered to its place (no two patches overlap);
dweight = dtokens^T @ A and dbias, cut along m into one float32 result a program, added in order by
`triton_rows.add_rows`; dpos, the sum over samples. Nothing is atomic.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from dit_kernels.ops import gradients, triton_launch, triton_rows, triton_tuning
from dit_kernels.ops.strides import adjacent


@triton.jit
def _values(
    k, CIN: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, LAST: tl.constexpr
):
    """(channel, t, h, w) of value k of a patch; LAST: the channel is fastest."""
    if LAST:
        return k % CIN, k // (CIN * PW * PH), k // (CIN * PW) % PH, k // CIN % PW
    return k // (PT * PH * PW), k // (PH * PW) % PT, k // PW % PH, k % PW


@triton.jit
def _value_offsets(
    k, s_c, s_t, s_h, s_w, CIN: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    LAST: tl.constexpr, VEC: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Element offset of value k in its patch. UNIT: the fastest axis is adjacent, the others are in vectors."""
    c, t, h, w = _values(k, CIN, PT, PH, PW, LAST)
    outer = t.to(tl.int64) * (s_t * VEC) + h.to(tl.int64) * (s_h * VEC)
    if not UNIT:
        return outer + c.to(tl.int64) * s_c + w.to(tl.int64) * s_w
    if LAST:
        return outer + w.to(tl.int64) * (s_w * VEC) + c
    return outer + c.to(tl.int64) * (s_c * VEC) + w


@triton.jit
def _patch_offsets(
    m, N, Gh, Gw, s_b, s_t, s_h, s_w, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, LAST: tl.constexpr,
    VEC: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Element offset of patch m in the video."""
    n = (m % N).to(tl.int32)
    offsets = (m // N) * (s_b * VEC)
    offsets += (n // (Gh * Gw) * PT).to(tl.int64) * (s_t * VEC)
    offsets += (n // Gw % Gh * PH).to(tl.int64) * (s_h * VEC)
    w = (n % Gw * PW).to(tl.int64)
    if UNIT and not LAST:
        return offsets + w
    return offsets + w * (s_w * VEC)


@triton.jit
def _dot(a, b, total, NATIVE: tl.constexpr, PRECISION: tl.constexpr):
    if NATIVE:
        return tl.dot(a, b, total)
    return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision=PRECISION)


@triton.jit
def _load_weight(
    ptr, c, k, s_o, s_c, s_t, s_h, s_w, C: tl.constexpr, CIN: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr,
    PW: tl.constexpr, LAST: tl.constexpr, W_UNIT: tl.constexpr,
):  # fmt: skip
    """c and k shaped to broadcast against each other -> their tile; W_UNIT: [C, CIN, PT, PH, PW] contiguous."""
    K: tl.constexpr = CIN * PT * PH * PW
    mask = (c < C) & (k < K)
    if W_UNIT:
        if LAST:
            ci, t, h, w = _values(k, CIN, PT, PH, PW, LAST)
            offsets = c * K + ((ci * PT + t) * PH + h) * PW + w
        else:
            offsets = c * K + k
    else:
        offsets = c.to(tl.int64) * s_o
        offsets += _value_offsets(k, s_c, s_t, s_h, s_w, CIN, PT, PH, PW, LAST, 1, False)
    return tl.load(ptr + offsets, mask=mask, other=0.0)


@triton.jit(
    do_not_specialize=[
        "M", "N", "Gh", "Gw", "v_sb", "v_sc", "v_sf", "v_sy", "v_sx", "w_so", "w_sc", "w_st", "w_sh", "w_sw",
        "p_sn", "p_sc",
    ]
)  # fmt: skip
def _patch_embed_fwd_kernel(
    video_ptr,  # [B, CIN, F, Y, X], strided
    weight_ptr,  # [C, CIN, PT, PH, PW]
    bias_ptr,  # [C] or None
    pos_ptr,  # [N, C] or None, strided
    out_ptr,  # [M = B * N, C], contiguous
    M: tl.int64, N: tl.int32, Gh: tl.int32, Gw: tl.int32,
    v_sb: tl.int64, v_sc: tl.int64, v_sf: tl.int64, v_sy: tl.int64, v_sx: tl.int64,
    w_so: tl.int64, w_sc: tl.int64, w_st: tl.int64, w_sh: tl.int64, w_sw: tl.int64,
    p_sn: tl.int64, p_sc: tl.int64,
    C: tl.constexpr, CIN: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    LAST: tl.constexpr, VEC: tl.constexpr, UNIT: tl.constexpr, W_UNIT: tl.constexpr, P_VEC: tl.constexpr,
    P_UNIT: tl.constexpr, NATIVE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = CIN * PT * PH * PW
    COLUMNS: tl.constexpr = STEPS * BLOCK_C
    m = (tl.program_id(0) // tl.cdiv(C, COLUMNS)).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(0) % tl.cdiv(C, COLUMNS) * COLUMNS
    live = m < M
    patches = _patch_offsets(m, N, Gh, Gw, v_sb, v_sf, v_sy, v_sx, PT, PH, PW, LAST, VEC, UNIT)
    if K <= BLOCK_K:
        k = tl.arange(0, BLOCK_K)
        values = _value_offsets(k, v_sc, v_sf, v_sy, v_sx, CIN, PT, PH, PW, LAST, VEC, UNIT)
        mask = live[:, None] & (k < K)[None, :]
        a = tl.load(video_ptr + patches[:, None] + values[None, :], mask=mask, other=0.0)
    for c0 in range(first, tl.minimum(first + COLUMNS, C), BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        if K <= BLOCK_K:
            w = _load_weight(
                weight_ptr, c[None, :], k[:, None], w_so, w_sc, w_st, w_sh, w_sw, C, CIN, PT, PH, PW, LAST, W_UNIT
            )  # fmt: skip
            total = _dot(a, w, total, NATIVE, PRECISION)
        else:
            for k0 in range(0, K, BLOCK_K):
                ks = k0 + tl.arange(0, BLOCK_K)
                values = _value_offsets(
                    ks, v_sc, v_sf, v_sy, v_sx, CIN, PT, PH, PW, LAST, VEC, UNIT
                )
                mask = live[:, None] & (ks < K)[None, :]
                part = tl.load(video_ptr + patches[:, None] + values[None, :], mask=mask, other=0.0)
                w = _load_weight(
                    weight_ptr, c[None, :], ks[:, None], w_so, w_sc, w_st, w_sh, w_sw, C, CIN, PT, PH, PW, LAST,
                    W_UNIT,
                )  # fmt: skip
                total = _dot(part, w, total, NATIVE, PRECISION)

        if bias_ptr is not None:
            total += tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
        cells = live[:, None] & (c < C)[None, :]
        if pos_ptr is not None:
            n = m % N
            if P_UNIT:
                at = (n * (p_sn * P_VEC))[:, None] + c[None, :]
            else:
                at = (n * p_sn)[:, None] + (c.to(tl.int64) * p_sc)[None, :]
            total += tl.load(pos_ptr + at, mask=cells, other=0.0).to(tl.float32)
        tl.store(
            out_ptr + m[:, None] * C + c[None, :], total.to(out_ptr.dtype.element_ty), mask=cells
        )


@triton.jit
def _load_gradient(
    ptr, m, c, N, live, s_b, s_n, s_c, C: tl.constexpr, VEC: tl.constexpr, UNIT: tl.constexpr
):  # fmt: skip
    """dtokens [BLOCK_M, BLOCK_C]"""
    rows = (m // N) * (s_b * VEC) + (m % N) * (s_n * VEC)
    mask = live[:, None] & (c < C)[None, :]
    if UNIT:
        return tl.load(ptr + rows[:, None] + c[None, :], mask=mask, other=0.0)
    return tl.load(ptr + rows[:, None] + (c.to(tl.int64) * s_c)[None, :], mask=mask, other=0.0)


@triton.jit(
    do_not_specialize=[
        "M", "N", "Gh", "Gw", "g_sb", "g_sn", "g_sc", "v_sb", "v_sc", "v_sf", "v_sy", "v_sx",
        "w_so", "w_sc", "w_st", "w_sh", "w_sw",
    ]
)  # fmt: skip
def _patch_embed_bwd_video_kernel(
    dtokens_ptr,  # [B, N, C], strided
    weight_ptr,  # [C, CIN, PT, PH, PW]
    dvideo_ptr,  # [B, CIN, F, Y, X]
    M: tl.int64, N: tl.int32, Gh: tl.int32, Gw: tl.int32,
    g_sb: tl.int64, g_sn: tl.int64, g_sc: tl.int64,
    v_sb: tl.int64, v_sc: tl.int64, v_sf: tl.int64, v_sy: tl.int64, v_sx: tl.int64,
    w_so: tl.int64, w_sc: tl.int64, w_st: tl.int64, w_sh: tl.int64, w_sw: tl.int64,
    C: tl.constexpr, CIN: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    G_VEC: tl.constexpr, G_UNIT: tl.constexpr, W_UNIT: tl.constexpr,
    NATIVE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = CIN * PT * PH * PW
    m = (tl.program_id(0) // tl.cdiv(K, BLOCK_K)).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(0) % tl.cdiv(K, BLOCK_K) * BLOCK_K + tl.arange(0, BLOCK_K)
    live = m < M
    total = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        g = _load_gradient(dtokens_ptr, m, c, N, live, g_sb, g_sn, g_sc, C, G_VEC, G_UNIT)
        w = _load_weight(
            weight_ptr, c[:, None], k[None, :], w_so, w_sc, w_st, w_sh, w_sw, C, CIN, PT, PH, PW, False, W_UNIT
        )  # fmt: skip
        total = _dot(g, w, total, NATIVE, PRECISION)
    patches = _patch_offsets(m, N, Gh, Gw, v_sb, v_sf, v_sy, v_sx, PT, PH, PW, False, 1, True)
    values = _value_offsets(k, v_sc, v_sf, v_sy, v_sx, CIN, PT, PH, PW, False, 1, True)
    # neighbours in memory are neighbouring patches: they go to neighbouring threads
    total = tl.trans(total).to(dvideo_ptr.dtype.element_ty)
    mask = (k < K)[:, None] & live[None, :]
    tl.store(dvideo_ptr + values[:, None] + patches[None, :], total, mask=mask)


@triton.jit(
    do_not_specialize=[
        "M", "N", "Gh", "Gw", "chunk", "g_sb", "g_sn", "g_sc", "v_sb", "v_sc", "v_sf", "v_sy", "v_sx",
    ]
)  # fmt: skip
def _patch_embed_bwd_weight_kernel(
    dtokens_ptr,  # [B, N, C], strided
    video_ptr,  # [B, CIN, F, Y, X], strided
    weight_sums_ptr,  # [chunks, C, CIN, PT, PH, PW] float32, or None
    bias_sums_ptr,  # [chunks, C] float32, or None
    M: tl.int64, N: tl.int32, Gh: tl.int32, Gw: tl.int32, chunk: tl.int32,
    g_sb: tl.int64, g_sn: tl.int64, g_sc: tl.int64,
    v_sb: tl.int64, v_sc: tl.int64, v_sf: tl.int64, v_sy: tl.int64, v_sx: tl.int64,
    C: tl.constexpr, CIN: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    G_VEC: tl.constexpr, G_UNIT: tl.constexpr, LAST: tl.constexpr, VEC: tl.constexpr, UNIT: tl.constexpr,
    NATIVE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = CIN * PT * PH * PW
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    row = tl.program_id(2).to(tl.int64)
    values = _value_offsets(k, v_sc, v_sf, v_sy, v_sx, CIN, PT, PH, PW, LAST, VEC, UNIT)
    weight_sums = tl.zeros([BLOCK_C, BLOCK_K], tl.float32)
    bias_sums = tl.zeros([BLOCK_C], tl.float32)
    for m0 in range(row * chunk, tl.minimum(row * chunk + chunk, M), BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        live = m < M
        g = _load_gradient(dtokens_ptr, m, c, N, live, g_sb, g_sn, g_sc, C, G_VEC, G_UNIT)
        if weight_sums_ptr is not None:
            patches = _patch_offsets(
                m, N, Gh, Gw, v_sb, v_sf, v_sy, v_sx, PT, PH, PW, LAST, VEC, UNIT
            )
            mask = live[:, None] & (k < K)[None, :]
            a = tl.load(video_ptr + patches[:, None] + values[None, :], mask=mask, other=0.0)
            weight_sums = _dot(tl.trans(g), a, weight_sums, NATIVE, PRECISION)
        if bias_sums_ptr is not None:
            bias_sums += tl.sum(g.to(tl.float32), axis=0)
    if weight_sums_ptr is not None:
        ci, t, h, w = _values(k, CIN, PT, PH, PW, LAST)
        at = (row * C + c)[:, None] * K + (((ci * PT + t) * PH + h) * PW + w)[None, :]
        tl.store(weight_sums_ptr + at, weight_sums, mask=(c < C)[:, None] & (k < K)[None, :])
    if bias_sums_ptr is not None:
        if tl.program_id(1) == 0:
            tl.store(bias_sums_ptr + row * C + c, bias_sums, mask=c < C)


@triton.jit(do_not_specialize=["B", "N", "g_sb", "g_sn", "g_sc"])
def _patch_embed_bwd_pos_kernel(
    dtokens_ptr,  # [B, N, C], strided
    dpos_ptr,  # [N, C], contiguous
    B: tl.int32, N: tl.int32, g_sb: tl.int64, g_sn: tl.int64, g_sc: tl.int64,
    C: tl.constexpr, G_VEC: tl.constexpr, G_UNIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) // tl.cdiv(C, BLOCK_C)).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.program_id(0) % tl.cdiv(C, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for b in range(B):
        m = b * N.to(tl.int64) + n
        total += _load_gradient(dtokens_ptr, m, c, N, n < N, g_sb, g_sn, g_sc, C, G_VEC, G_UNIT).to(
            tl.float32
        )
    mask = (n < N)[:, None] & (c < C)[None, :]
    tl.store(dpos_ptr + n[:, None] * C + c[None, :], total.to(dpos_ptr.dtype.element_ty), mask=mask)


def supports(
    video: Tensor, weight: Tensor, bias: Tensor | None, pos_embed: Tensor | None
) -> str | None:
    if 0 in weight.shape:
        return f"weight has no elements: {list(weight.shape)}"
    return triton_launch.unsupported((video, weight, bias, pos_embed))


def forward(
    video: Tensor, weight: Tensor, bias: Tensor | None, pos_embed: Tensor | None, stats: bool
) -> list[Tensor]:
    grid = _grid(video, weight)
    tokens = grid[0] * grid[1] * grid[2]
    channels = weight.shape[0]
    out = video.new_empty((video.shape[0], tokens, channels))
    if out.numel() == 0:
        return [out]
    tensors = (video, weight, adjacent(bias), pos_embed)
    plan = _plans(tensors, *_products(video.dtype, weight.dtype))
    triton_launch.run(_patch_embed_fwd_kernel, plan, *tensors, out)
    return [out]


def _plan(tensors: Sequence[Tensor | None], native: bool, precision: str) -> triton_launch.Plan:
    """Of the forward kernel."""
    video, weight = cast(Tensor, tensors[0]), cast(Tensor, tensors[1])
    pos_embed = tensors[3]
    grid = _grid(video, weight)
    tokens = grid[0] * grid[1] * grid[2]
    channels = weight.shape[0]
    gather = _gather(video, weight)
    volume = weight[0].numel()
    config = _configure(channels, volume, native)
    config = triton_tuning.choose("patch_embed.forward", (channels, volume, native), config)
    pos_strides, pos_vec, pos_unit = (0, 0), 1, True
    if pos_embed is not None:
        pos_unit = pos_embed.stride(1) == 1
        pos_vec = triton_rows.vector(pos_embed.stride(0)) if pos_unit else 1
        pos_strides = (pos_embed.stride(0) // pos_vec, pos_embed.stride(1))
    rows = video.shape[0] * tokens
    columns = triton.cdiv(channels, config.steps * config.block_c)
    numbers = (
        rows, tokens, grid[1], grid[2], *gather.strides, *weight.stride(), *pos_strides,
        *weight.shape, gather.last, gather.vec, gather.unit, weight.is_contiguous(), pos_vec, pos_unit,
        native, precision, *config,
    )  # fmt: skip
    options = dict(num_warps=8 if native else 4, num_stages=2)
    return triton_launch.Plan((triton.cdiv(rows, config.block_m) * columns,), numbers, options, {})


_plans = triton_launch.Plans(_plan)


def backward(
    grads: list[Tensor | None],
    video: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    saved: list[Tensor],
    needs: list[bool],
) -> list[Tensor]:
    results = gradients.empty((video, weight, bias, pos_embed), needs)
    dvideo, dweight, dbias, dpos = results
    (dtokens,) = grads
    if dtokens is None or dtokens.numel() == 0:
        return [t.zero_() for t in results if t is not None]
    grid = _grid(video, weight)
    tokens = grid[0] * grid[1] * grid[2]
    sizes = (video.shape[0] * tokens, tokens, grid[1], grid[2])
    channels = weight.shape[0]
    volume = weight[0].numel()
    g_unit = dtokens.stride(2) == 1
    g_vec = triton_rows.vector(*dtokens.stride()[:2]) if g_unit else 1
    g_strides = (dtokens.stride(0) // g_vec, dtokens.stride(1) // g_vec, dtokens.stride(2))

    if dvideo is not None:
        native, precision = _products(dtokens.dtype, weight.dtype)
        block_k = max(16, min(64, triton_rows.power_of_two(volume)))
        triton_launch.launch(
            _patch_embed_bwd_video_kernel, (triton.cdiv(sizes[0], 64) * triton.cdiv(volume, block_k),),
            dtokens, weight, dvideo, *sizes, *g_strides, *dvideo.stride(), *weight.stride(),
            *weight.shape, g_vec, g_unit, weight.is_contiguous(), native, precision,
            64, 64 if native else 32, block_k, num_warps=8, num_stages=3,
        )  # fmt: skip
    if dweight is not None or dbias is not None:
        gather = _gather(video, weight)
        native, precision = _products(dtokens.dtype, video.dtype)
        block_c = max(16, min(128 if native else 64, triton_rows.power_of_two(channels)))
        block_k = max(16, min(64, triton_rows.power_of_two(volume)))
        columns, depth = triton.cdiv(channels, block_c), triton.cdiv(volume, block_k)
        if dweight is None:
            depth = 1
        block_m = 64 if native else 32
        slots = 2 * triton_launch.multiprocessors(video)
        chunk = gradients.rows_of_a_program(sizes[0], columns * depth, slots, block_m)
        chunks = triton.cdiv(sizes[0], chunk)
        weight_sums = gradients.partial_sums(dweight, chunks)
        bias_sums = gradients.partial_sums(dbias, chunks)
        triton_launch.launch(
            _patch_embed_bwd_weight_kernel, (columns, depth, chunks),
            dtokens, video, weight_sums, bias_sums, *sizes, chunk, *g_strides, *gather.strides,
            *weight.shape, g_vec, g_unit, gather.last, gather.vec, gather.unit, native, precision,
            block_m, block_c, block_k, num_warps=8, num_stages=3,
        )  # fmt: skip
        if dweight is not None:
            triton_rows.add_rows(weight_sums, dweight)
        if dbias is not None:
            triton_rows.add_rows(bias_sums, dbias)
    if dpos is not None:
        triton_launch.launch(
            _patch_embed_bwd_pos_kernel, (triton.cdiv(tokens, 4) * triton.cdiv(channels, 512),),
            dtokens, dpos, video.shape[0], tokens, *g_strides, channels, g_vec, g_unit, 4, 512, num_warps=4,
        )  # fmt: skip
    return [t for t in results if t is not None]


def _grid(video: Tensor, weight: Tensor) -> tuple[int, int, int]:
    gt, gh, gw = (
        size // patch for size, patch in zip(video.shape[2:], weight.shape[2:], strict=True)
    )
    return gt, gh, gw


class _Gather(NamedTuple):
    """How the video is read: strides in vectors but those of adjacent elements, and which axis is fastest."""

    strides: tuple[int, ...]
    last: bool
    vec: int
    unit: bool


def _gather(video: Tensor, weight: Tensor) -> _Gather:
    sample, channel, frame, line, pixel = video.stride()
    last = channel == 1 and pixel != 1 and video.shape[1] > 1
    unit = last or pixel == 1
    if not unit:
        return _Gather((sample, channel, frame, line, pixel), False, 1, False)
    if last:
        vec = triton_rows.vector(sample, frame, line, pixel)
        return _Gather((sample // vec, 1, frame // vec, line // vec, pixel // vec), True, vec, True)
    vec = triton_rows.vector(sample, channel, frame, line)
    return _Gather((sample // vec, channel // vec, frame // vec, line // vec, 1), False, vec, True)


def _products(left: torch.dtype, right: torch.dtype) -> tuple[bool, str]:
    """(whether the operands are multiplied as they come, in 16 bits; the precision of float32 products)."""
    native = left == right and left != torch.float32
    return native, "ieee" if native else triton_launch.float32_precision()


class _Config(NamedTuple):
    block_m: int
    block_c: int
    block_k: int
    steps: int  # column blocks of a program, which keeps its patches


@functools.cache
def _configure(channels: int, volume: int, native: bool) -> _Config:
    block_c = max(16, min(64, triton_rows.power_of_two(channels)))
    block_k = max(16, min(64 if native else 32, triton_rows.power_of_two(volume)))
    return _Config(128 if native else 64, block_c, block_k, 4)


def _candidates(key: triton_tuning.Key, default: _Config) -> list[_Config]:
    """Other runs of patches, other numbers of column blocks."""
    sizes = itertools.product((default.block_m, default.block_m // 2), (default.steps, 1, 8))
    return [default._replace(block_m=m, steps=steps) for m, steps in sizes]


triton_tuning.CANDIDATES["patch_embed.forward"] = _candidates
