"""Flash attention forward.

    s = scale * q k^T;  p = exp(s - lse);  out = p v        online softmax, for 16-bit inputs in base 2

Reads q once, and k and v once a query tile; writes out and lse once.
"""

# Triton gives its functions no types
# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from dit_kernels.ops.attention3d.triton_program import (
    FAR,
    LOG2E,
    VARYING,
    added,
    exponential,
    find_program,
    frames_seen,
    key_ends,
    load_tile,
    products,
    run_at,
    scaled,
    store_tile,
    tile_at,
    wide,
    zero_tile,
)
from dit_kernels.ops.attention3d.triton_tiles import (
    NOTHING,
    cubes_of,
    hidden_bits,
    in_grid,
    inside_box,
    lane_bits,
    last_of,
    origin_of,
    patch_tiles,
    place_in,
    seen_by,
    segments,
    token_of,
)

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _softmax_step(s, v, acc, peak, total, scale, PRECISION: tl.constexpr, MASKED: tl.constexpr, NATURAL: tl.constexpr):  # fmt: skip
    """One key tile of the online softmax."""
    top = tl.maximum(peak, tl.max(s, 1) * scale)
    base = top
    if MASKED:  # a row that has seen nothing yet
        base = tl.where(top == float("-inf"), 0.0, top)
    p = exponential(s, scale, base[:, None], NATURAL)
    fade = exponential(peak, 1.0, base, NATURAL)
    total = total * fade + tl.sum(p, 1)
    acc = added(scaled(acc, fade[:, None]), p, v, PRECISION)
    return acc, top, total


@triton.jit(do_not_specialize=VARYING)
def attention3d_fwd_kernel(
    q_ptr,  # [B, N, H, D], any strides
    k_ptr,  # [B, N', H', D]
    v_ptr,
    out_ptr,  # [B, N, H, D]
    lse_ptr,  # [B, H, N] float32, or None
    text_lens_ptr, kv_lens_ptr, cu_seqlens_ptr, table_ptr,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h,
    queries, keys, heads, group, text, text_first, sequences, tiles, scale,
    gt, gh, gw, wt, wh, ww, st, sh, sw, qt, qh, qw, kt, kh, kw,
    D: tl.constexpr, PARTS: tl.constexpr, STEPS: tl.constexpr, UNIT: tl.constexpr,
    CUBES: tl.constexpr, CAUSAL: tl.constexpr, TEXT: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    PACKED: tl.constexpr = cu_seqlens_ptr is not None
    LIMITED: tl.constexpr = PACKED or kv_lens_ptr is not None
    NATURAL: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    window, stride, q_cube, k_cube = (wt, wh, ww), (st, sh, sw), (qt, qh, qw), (kt, kh, kw)
    sample, head, sequence, tile, start, length, grid = find_program(
        tl.program_id(0), tiles, heads, queries, sequences, cu_seqlens_ptr, table_ptr, gt, gh, gw,
        BLOCK_M, TEXT, CUBES, CAUSAL,
    )  # fmt: skip
    span = segments(length, text, text_first)
    row, lane = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    first, rows, exists, is_text, origin = tile_at(
        tile, row, span, grid, q_cube, BLOCK_M, CUBES, TEXT
    )
    if tile >= patch_tiles(span[0], grid, q_cube, BLOCK_M, CUBES) + tl.cdiv(span[1], BLOCK_M):
        return
    key_span = span
    if not PACKED:
        key_span = segments(keys, text, text_first)
    key_length = length if PACKED else keys
    patch_end, text_end = key_ends(
        sequence, sequences, key_length, key_span, text_lens_ptr, kv_lens_ptr, PACKED
    )

    sample64, head64, start64 = sample.to(tl.int64), head.to(tl.int64), start.to(tl.int64)
    first64 = start64 + first
    q_base = q_ptr + (sample64 * q_b + head64 * q_h + first64 * q_n) * UNIT
    head_k = (head // group).to(tl.int64)
    k_base = k_ptr + (sample64 * k_b + head_k * k_h + start64 * k_n) * UNIT
    v_base = v_ptr + (sample64 * v_b + head_k * v_h + start64 * v_n) * UNIT
    k_rows = wide(lane, WIDE) * k_n * UNIT
    v_rows = wide(lane, WIDE) * v_n * UNIT

    q = load_tile(q_base, wide(rows, WIDE) * q_n * UNIT, exists, D, PARTS, STEPS[0], True)
    acc = zero_tile(BLOCK_M, PARTS)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if not NATURAL:
        scale = scale * LOG2E

    runs = 0  # of patch keys
    unmasked = 0
    frame_end = tl.full([BLOCK_M], FAR, tl.int32)
    if CUBES:
        place = place_in(q_cube, row)
        at = (origin[0] + place[0], origin[1] + place[1], origin[2] + place[2])
        seen, stop = seen_by(at, grid, window, stride, is_text, CAUSAL)
        low_first, low_end = seen_by(origin, grid, window, stride, is_text, CAUSAL)
        high_first, high_end = seen_by(
            last_of(origin, grid, q_cube), grid, window, stride, is_text, CAUSAL
        )
        corner, count, cubes = cubes_of(low_first, high_end, k_cube)
        key_place = place_in(k_cube, lane)
        bits = lane_bits(key_place, lane, k_cube)
        key_token = token_of(key_place, grid)
        k_cube_rows = wide(key_token, WIDE) * k_n * UNIT
        v_cube_rows = wide(key_token, WIDE) * v_n * UNIT
        full = k_cube[0] * k_cube[1] * k_cube[2] == BLOCK_N
        furthest = token_of((k_cube[0] - 1, k_cube[1] - 1, k_cube[2] - 1), grid)
        for j in range(0, cubes):
            key_origin = origin_of(j, corner, count, k_cube)
            base = key_span[2] + token_of(key_origin, grid)
            there = in_grid(bits, key_origin, grid, k_cube)
            key = bits
            if LIMITED:
                there &= key_token < patch_end - base
                key = tl.where(there, bits, NOTHING)
            base64 = base.to(tl.int64)
            k = load_tile(
                k_base + base64 * k_n * UNIT, k_cube_rows, there, D, PARTS, STEPS[1], True
            )
            v = load_tile(
                v_base + base64 * v_n * UNIT, v_cube_rows, there, D, PARTS, STEPS[2], True
            )
            s = products(q, k, PRECISION)
            clear = full & inside_box(key_origin, k_cube, high_first, low_end)
            clear &= base + furthest < patch_end
            if not clear:
                hidden = hidden_bits(seen, stop, key_origin, k_cube)
                s = tl.where((hidden[:, None] & key[None, :]) != 0, float("-inf"), s)
            acc, peak, total = _softmax_step(
                s, v, acc, peak, total, scale, PRECISION, True, NATURAL
            )
    else:
        keys_seen = tl.maximum(patch_end - key_span[2], 0)
        unmasked = keys_seen
        if CAUSAL:
            frame_end = frames_seen(first + rows, span, grid, is_text)
            unmasked = tl.minimum(keys_seen, frames_seen(first, span, grid, is_text))
            final = tl.minimum(first + BLOCK_M, span[2] + span[0]) - 1
            keys_seen = tl.minimum(keys_seen, frames_seen(final, span, grid, is_text))
        runs = tl.cdiv(keys_seen, BLOCK_N)
        unmasked = unmasked // BLOCK_N
        patch64 = key_span[2].to(tl.int64)
        for j in range(0, unmasked):
            base64 = patch64 + j * BLOCK_N
            k = load_tile(k_base + base64 * k_n * UNIT, k_rows, None, D, PARTS, STEPS[1], False)
            v = load_tile(v_base + base64 * v_n * UNIT, v_rows, None, D, PARTS, STEPS[2], False)
            s = products(q, k, PRECISION)
            acc, peak, total = _softmax_step(
                s, v, acc, peak, total, scale, PRECISION, False, NATURAL
            )

    if TEXT or not CUBES:  # the runs that are cut: by a length, by a frame; and text
        texts = tl.cdiv(tl.maximum(text_end - key_span[3], 0), BLOCK_N) if TEXT else 0
        for j in range(unmasked, runs + texts):
            base, limit, key_is_text = run_at(j, runs, key_span, patch_end, text_end, BLOCK_N, TEXT)
            there = lane < limit - base
            base64 = base.to(tl.int64)
            k = load_tile(k_base + base64 * k_n * UNIT, k_rows, there, D, PARTS, STEPS[1], True)
            v = load_tile(v_base + base64 * v_n * UNIT, v_rows, there, D, PARTS, STEPS[2], True)
            s = products(q, k, PRECISION)
            if CAUSAL and not CUBES:
                key = tl.where(key_is_text, 0, base - key_span[2] + lane)
                key = tl.where(there, key, FAR)
                s = tl.where(key[None, :] < frame_end[:, None], s, float("-inf"))
            else:
                s = tl.where(there[None, :], s, float("-inf"))
            acc, peak, total = _softmax_step(
                s, v, acc, peak, total, scale, PRECISION, True, NATURAL
            )

    blind = total == 0.0
    acc = scaled(acc, (1.0 / tl.where(blind, 1.0, total))[:, None])
    if lse_ptr is not None:
        if NATURAL:
            lse = peak + tl.log(tl.where(blind, 1.0, total))
        else:
            lse = (peak + tl.log2(tl.where(blind, 1.0, total))) * LN2
        lse = tl.where(blind, float("-inf"), lse)
    out_base = out_ptr + ((sample64 * queries + first64) * heads + head) * D
    store_tile(out_base, wide(rows, WIDE) * heads * D, exists, acc, D, PARTS)
    if lse_ptr is not None:
        tl.store(lse_ptr + (sample64 * heads + head) * queries + first64 + rows, lse, mask=exists)
