"""Tokens to video in Triton: one permutation kernel, run forwards or backwards; each value moves once.

    video[b, c, gt*pt + t, gh*ph + h, gw*pw + w] = tokens[b, (gt, gh, gw), (t, h, w, c)]

A program owns BLOCK_H x BLOCK_W patches of one frame. Its tokens are [BLOCK_H, BLOCK_W, K] with K
contiguous; its pixels are rows [c, t, BLOCK_H, h] of BLOCK_W * pw adjacent ones. Between the two the tile
is reshaped and permuted in registers and shared memory, so that both sides move 16 bytes an access where
their strides allow it. Axes of a patch that are no power of two are padded in the tile, never in memory.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from dit_kernels.ops import triton_launch, triton_rows
from dit_kernels.ops.unpatchify.patches import empty_video

_TILE = 4096


@triton.jit(
    do_not_specialize=[
        "Gt", "Gh", "Gw", "X_vectors", "t_sb", "t_sn", "t_sk", "v_sb", "v_sc", "v_sf", "v_sy", "v_sx",
    ]
)  # fmt: skip
def _unpatchify_kernel(
    tokens_ptr,  # [B, N, K], n = (gt, gh, gw), k = (A0, A1, A2, A3)
    video_ptr,  # [B, C, F, Y, X]
    Gt: tl.int32, Gh: tl.int32, Gw: tl.int32, X_vectors: tl.int32,
    t_sb: tl.int64, t_sn: tl.int64, t_sk: tl.int64,
    v_sb: tl.int64, v_sc: tl.int64, v_sf: tl.int64, v_sy: tl.int64, v_sx: tl.int64,
    A0: tl.constexpr, A1: tl.constexpr, A2: tl.constexpr, A3: tl.constexpr,  # the patch's axes in tokens' order
    P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, P3: tl.constexpr,  # the same, powers of two
    ORDER: tl.constexpr, BACK: tl.constexpr,  # (BH, BW, A0, A1, A2, A3) <-> (c, t, BH, h, BW, w)
    INVERSE: tl.constexpr, T_VEC: tl.constexpr, T_UNIT: tl.constexpr, V_VEC: tl.constexpr,
    V_UNIT: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    SIZES: tl.constexpr = (BLOCK_H, BLOCK_W, A0, A1, A2, A3)
    PADDED: tl.constexpr = (BLOCK_H, BLOCK_W, P0, P1, P2, P3)
    C: tl.constexpr = SIZES[ORDER[0]]
    PT: tl.constexpr = SIZES[ORDER[1]]
    PH: tl.constexpr = SIZES[ORDER[3]]
    PW: tl.constexpr = SIZES[ORDER[5]]
    CP: tl.constexpr = PADDED[ORDER[0]]
    TP: tl.constexpr = PADDED[ORDER[1]]
    HP: tl.constexpr = PADDED[ORDER[3]]
    WP: tl.constexpr = PADDED[ORDER[5]]
    KP: tl.constexpr = P0 * P1 * P2 * P3
    ROWS: tl.constexpr = CP * TP * BLOCK_H * HP
    COLS: tl.constexpr = BLOCK_W * WP

    p = tl.program_id(0)
    gw0 = p % tl.cdiv(Gw, BLOCK_W) * BLOCK_W
    p = p // tl.cdiv(Gw, BLOCK_W)
    gh0 = p % tl.cdiv(Gh, BLOCK_H) * BLOCK_H
    p = p // tl.cdiv(Gh, BLOCK_H)
    gt = p % Gt
    b = (p // Gt).to(tl.int64)

    gh = gh0 + tl.arange(0, BLOCK_H)
    gw = gw0 + tl.arange(0, BLOCK_W)
    n = (gt.to(tl.int64) * Gh + gh)[:, None] * Gw + gw[None, :]
    k = tl.arange(0, KP)
    k_mask = k < A0 * P1 * P2 * P3
    if A1 != P1 or A2 != P2 or A3 != P3:
        a1 = k // (P2 * P3) % P1
        a2 = k // P3 % P2
        a3 = k % P3
        k_mask = k_mask & (a1 < A1) & (a2 < A2) & (a3 < A3)
        k = ((k // (P1 * P2 * P3) * A1 + a1) * A2 + a2) * A3 + a3
    tokens_mask = (gh < Gh)[:, None, None] & (gw < Gw)[None, :, None] & k_mask[None, None, :]
    if T_UNIT:
        k_offsets = k
    else:
        k_offsets = k.to(tl.int64) * t_sk
    tokens_ptrs = (
        tokens_ptr
        + b * (t_sb * T_VEC)
        + (n * (t_sn * T_VEC))[:, :, None]
        + k_offsets[None, None, :]
    )

    row = tl.arange(0, ROWS)
    h = row % HP
    bh = row // HP % BLOCK_H
    t = row // (HP * BLOCK_H) % TP
    c = row // (HP * BLOCK_H * TP)
    col = tl.arange(0, COLS)
    if WP == PW:
        x = gw0 * PW + col
        col_mask = x < X_vectors * V_VEC
    else:
        x = (gw0 + col // WP) * PW + col % WP
        col_mask = (col % WP < PW) & (x < X_vectors * V_VEC)
    row_mask = (h < PH) & (gh0 + bh < Gh) & (t < PT) & (c < C)
    row_offsets = (
        c.to(tl.int64) * (v_sc * V_VEC)
        + (gt * PT + t).to(tl.int64) * (v_sf * V_VEC)
        + ((gh0 + bh) * PH + h).to(tl.int64) * (v_sy * V_VEC)
    )
    if V_UNIT:
        col_offsets = x
    else:
        col_offsets = x.to(tl.int64) * v_sx
    video_mask = row_mask[:, None] & col_mask[None, :]
    video_ptrs = video_ptr + b * (v_sb * V_VEC) + row_offsets[:, None] + col_offsets[None, :]

    if INVERSE:
        tile = tl.load(video_ptrs, mask=video_mask, other=0.0)
        tile = tl.reshape(tile, (CP, TP, BLOCK_H, HP, BLOCK_W, WP))
        tile = tl.permute(tile, BACK[0], BACK[1], BACK[2], BACK[3], BACK[4], BACK[5])
        tile = tl.reshape(tile, (BLOCK_H, BLOCK_W, KP))
        tl.store(tokens_ptrs, tile, mask=tokens_mask)
    else:
        tile = tl.load(tokens_ptrs, mask=tokens_mask, other=0.0)
        tile = tl.reshape(tile, (BLOCK_H, BLOCK_W, P0, P1, P2, P3))
        tile = tl.permute(tile, ORDER[0], ORDER[1], ORDER[2], ORDER[3], ORDER[4], ORDER[5])
        tl.store(video_ptrs, tl.reshape(tile, (ROWS, COLS)), mask=video_mask)


def supports(
    tokens: Tensor, grid: Sequence[int], patch_size: Sequence[int], channels: int, layout: str
) -> str | None:
    padded = _permutation(tuple(patch_size), channels, layout).padded
    if padded[0] * padded[1] * padded[2] * padded[3] > 4 * _TILE:
        return (
            f"a patch may have {4 * _TILE} values; got {tuple(patch_size)} of {channels} channels"
        )
    return triton_launch.unsupported((tokens,))


def forward(
    tokens: Tensor,
    grid: Sequence[int],
    patch_size: Sequence[int],
    channels: int,
    layout: str,
    stats: bool,
) -> list[Tensor]:
    video = empty_video(tokens, grid, patch_size, channels)
    _move(tokens, video, grid, patch_size, channels, layout, False)
    return [video]


def backward(
    grads: list[Tensor | None],
    tokens: Tensor,
    saved: list[Tensor],
    grid: Sequence[int],
    patch_size: Sequence[int],
    channels: int,
    layout: str,
    needs: list[bool],
) -> list[Tensor]:
    if not needs[0]:
        return []
    dtokens = tokens.new_empty(tokens.shape)
    if grads[0] is None:
        return [dtokens.zero_()]
    _move(dtokens, grads[0], grid, patch_size, channels, layout, True)
    return [dtokens]


def _move(
    tokens: Tensor,
    video: Tensor,
    grid: Sequence[int],
    patch_size: Sequence[int],
    channels: int,
    layout: str,
    inverse: bool,
) -> None:
    if tokens.numel() == 0:
        return
    plan = _plans((tokens, video), tuple(grid), tuple(patch_size), channels, layout, inverse)
    triton_launch.run(_unpatchify_kernel, plan, tokens, video)


def _plan(
    tensors: Sequence[Tensor],
    grid: tuple[int, ...],
    patch_size: tuple[int, ...],
    channels: int,
    layout: str,
    inverse: bool,
) -> triton_launch.Plan:
    tokens, video = tensors
    how = _permutation(patch_size, channels, layout)
    block_h, block_w, warps = _configure(how.padded, _bucket(grid[2]))
    t_unit, v_unit = tokens.stride(2) == 1, video.stride(4) == 1
    t_vec = triton_rows.vector(*tokens.stride()[:2]) if t_unit else 1
    v_vec = triton_rows.vector(video.shape[4], *video.stride()[:4]) if v_unit else 1
    programs = (
        tokens.shape[0] * grid[0] * triton.cdiv(grid[1], block_h) * triton.cdiv(grid[2], block_w)
    )
    numbers = (
        *grid, video.shape[4] // v_vec,
        *(s // t_vec for s in tokens.stride()[:2]), tokens.stride(2),
        *(s // v_vec for s in video.stride()[:4]), video.stride(4),
        *how.sizes, *how.padded, how.order, how.back, inverse, t_vec, t_unit, v_vec, v_unit,
        block_h, block_w,
    )  # fmt: skip
    return triton_launch.Plan((programs,), numbers, dict(num_warps=warps), {})


_plans = triton_launch.Plans(_plan)


class _Permutation(NamedTuple):
    sizes: tuple[int, ...]  # of the patch's axes in tokens' order
    padded: tuple[int, ...]
    order: tuple[int, ...]
    back: tuple[int, ...]


@functools.cache
def _permutation(patch_size: tuple[int, ...], channels: int, layout: str) -> _Permutation:
    axes = layout.split()
    length = dict(zip("thwc", (*patch_size, channels), strict=True))
    sizes = tuple(length[axis] for axis in axes)
    t, h, w, c = (2 + axes.index(axis) for axis in "thwc")
    order = (c, t, 0, h, 1, w)
    back = tuple(order.index(i) for i in range(6))
    return _Permutation(sizes, tuple(map(triton_rows.power_of_two, sizes)), order, back)


def _bucket(length: int) -> int:
    """Grids of about one width share a compiled kernel."""
    return 16 if length <= 16 else 32 if length <= 32 else 64


@functools.cache
def _configure(padded: tuple[int, ...], width: int) -> tuple[int, int, int]:
    """(BLOCK_H, BLOCK_W, warps): tiles of 4096 values, wider before higher."""
    values = padded[0] * padded[1] * padded[2] * padded[3]
    block_w = max(1, min(width, _TILE // values))
    block_h = max(1, min(8, _TILE // (values * block_w)))
    return block_h, block_w, 4 if values * block_w * block_h <= _TILE else 8
