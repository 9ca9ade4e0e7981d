"""Flash attention backward, without atomics.

    rows      delta = sum(dout * out) - dlse                                    one pass over out and dout
    dk, dv    dv = p^T dout;  ds = p * (dout v^T - delta);  dk = scale * ds^T q    a program a key tile
    dq        dq = scale * ds k                                                 a program a query tile

Each gradient is written once by the one program that owns it, in a fixed order of summation, at the price
of computing p twice.

float32: the rounding of lse alone, about half an eps of it, would be the largest error of p. dq's kernel sees
whole rows of p, which add up to 1 but for that: it divides by their sum, and leaves its inverse for dk and dv.
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
    kept,
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
    hidden_from_queries,
    in_grid,
    lane_bits,
    last_of,
    origin_of,
    patch_tiles,
    place_in,
    seen_by,
    seen_from,
    segments,
    token_of,
)


@triton.jit(do_not_specialize=VARYING)
def attention3d_rows_kernel(
    out_ptr,  # [B, N, H, D]
    dout_ptr,  # [B, N, H, D], any strides but the last
    lse_ptr,  # [B, H, N]
    dlse_ptr,  # [B, H, N] or None
    rows_ptr,  # [B, H, N, 4] float32: lse as `exponential` wants it, delta, 1 / the sum of p, nothing
    do_b, do_n, do_h, queries, heads, tiles,
    D: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    above = (program // tiles).to(tl.int64)
    sample, head = above // heads, above % heads
    token = program % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, WIDTH)
    mask = (token < queries)[:, None] & (d < D)[None, :]
    out_row = (sample * queries + token) * heads + head
    dout_row = (sample * do_b + token.to(tl.int64) * do_n + head * do_h) * UNIT
    out = tl.load(out_ptr + (out_row * D)[:, None] + d[None, :], mask=mask, other=0.0)
    dout = tl.load(dout_ptr + dout_row[:, None] + d[None, :], mask=mask, other=0.0)
    at = above * queries + token
    lse = tl.load(lse_ptr + at, mask=token < queries, other=0.0)

    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + at, mask=token < queries, other=0.0)
    # a query that sees nothing: every p = exp2(s - lse) must be 0
    blind = lse == float("-inf")
    if out_ptr.dtype.element_ty != tl.float32:
        lse = lse * LOG2E
    lse, delta = tl.where(blind, float("inf"), lse), tl.where(blind, 0.0, delta)
    four = tl.arange(0, 4)[None, :]
    row = tl.where(four == 0, lse[:, None], tl.where(four == 1, delta[:, None], 1.0))
    tl.store(rows_ptr + (at * 4)[:, None] + four, row, mask=(token < queries)[:, None])


@triton.jit
def _load_row(base, rows, exists):
    """(lse, delta, 1 / sum) of each query; a lane without one gets the lse for which every p is 0.

    A row takes 16 bytes so that loading it is one asynchronous copy. A vector of BLOCK_M floats counts as
    cheap: the compiler would load it in the layout of the scores, every thread all of its columns.
    """
    four = tl.arange(0, 4)[None, :]
    row = tl.load(base + (rows * 4)[:, None] + four, mask=exists[:, None], other=0.0)
    row = tl.where(exists[:, None], row, tl.where(four == 0, float("inf"), 0.0))
    lse = tl.sum(tl.where(four == 0, row, 0.0), 1)
    delta = tl.sum(tl.where(four == 1, row, 0.0), 1)
    return lse, delta, tl.sum(tl.where(four == 2, row, 0.0), 1)


@triton.jit
def _dkdv_step(k, v, dk, dv, q_base, q_rows, dout_base, dout_rows, row_base, rows, exists, hidden, scale,
               D: tl.constexpr, PARTS: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
               NATURAL: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr):  # fmt: skip
    """One query tile [M] for a key tile [N]: scores are kept as [N, M]."""
    q = load_tile(q_base, q_rows, exists, D, PARTS, STEP, True)
    dout = load_tile(dout_base, dout_rows, exists, D, PARTS, 1, True)
    lse, delta, inverse = _load_row(row_base, rows, exists)
    # the scores' products first and dk before dv: arithmetic on the results of products that has slipped
    # behind the start of another one makes ptxas wait for each on its own (C7514)
    s = products(k, q, PRECISION)
    if DK:
        dp = products(v, dout, PRECISION)
    p = exponential(s, scale, lse[None, :], NATURAL)
    if NATURAL:
        p = p * inverse[None, :]
    if hidden is not None:
        p = tl.where(hidden, 0.0, p)
    if DK:
        ds = p * (dp - delta[None, :])
        dk = added(dk, ds, q, PRECISION)
    if DV:
        dv = added(dv, p, dout, PRECISION)
    return dk, dv


@triton.jit
def _member(step, head_first, steps, GROUPED: tl.constexpr):
    """(query head, step in it) of a step over the heads of a group."""
    if GROUPED:
        return head_first + (step // steps).to(tl.int64), step % steps
    return head_first, step


@triton.jit(do_not_specialize=VARYING)
def attention3d_dkdv_kernel(
    q_ptr,  # [B, N, H, D], any strides
    k_ptr,  # [B, N', H', D]
    v_ptr,
    dout_ptr,  # [B, N, H, D], any strides but the last
    rows_ptr,  # [B, H, N, 4] float32
    dk_ptr,  # [B, N', H', D], or None
    dv_ptr,  # the same; one of the two at least
    text_lens_ptr, kv_lens_ptr, cu_seqlens_ptr, table_ptr,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, do_b, do_n, do_h,
    queries, keys, heads, group, text, text_first, sequences, tiles, scale,
    gt, gh, gw, wt, wh, ww, st, sh, sw, qt, qh, qw, kt, kh, kw,
    D: tl.constexpr, PARTS: tl.constexpr, STEPS: tl.constexpr, UNIT: tl.constexpr,
    GROUPED: tl.constexpr, CUBES: tl.constexpr, CAUSAL: tl.constexpr, TEXT: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    PACKED: tl.constexpr = cu_seqlens_ptr is not None
    NATURAL: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    window, stride, q_cube, k_cube = (wt, wh, ww), (st, sh, sw), (qt, qh, qw), (kt, kh, kw)
    kv_heads = heads // group
    sample, head_k, sequence, tile, start, length, grid = find_program(
        tl.program_id(0), tiles, kv_heads, keys, sequences, cu_seqlens_ptr, table_ptr, gt, gh, gw,
        BLOCK_N, TEXT, CUBES, False,
    )  # fmt: skip
    key_span = segments(length, text, text_first)
    lane, row = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    first, rows, exists, is_text, origin = tile_at(
        tile, lane, key_span, grid, k_cube, BLOCK_N, CUBES, TEXT
    )
    if tile >= patch_tiles(key_span[0], grid, k_cube, BLOCK_N, CUBES) + tl.cdiv(
        key_span[1], BLOCK_N
    ):
        return
    span = key_span
    if not PACKED:
        span = segments(queries, text, text_first)
    patch_end, text_end = key_ends(
        sequence, sequences, length, key_span, text_lens_ptr, kv_lens_ptr, PACKED
    )
    DK: tl.constexpr = dk_ptr is not None
    DV: tl.constexpr = dv_ptr is not None
    valid = exists
    if PACKED or kv_lens_ptr is not None or text_lens_ptr is not None:
        valid = exists & (rows < tl.where(is_text, text_end, patch_end) - first)
    any_valid = tl.max(valid.to(tl.int32), 0)
    head_first = (head_k * group).to(tl.int64)

    sample64, head64, start64 = sample.to(tl.int64), head_k.to(tl.int64), start.to(tl.int64)
    first64 = start64 + first
    k_base = k_ptr + (sample64 * k_b + head64 * k_h + first64 * k_n) * UNIT
    v_base = v_ptr + (sample64 * v_b + head64 * v_h + first64 * v_n) * UNIT
    k = load_tile(k_base, wide(rows, WIDE) * k_n * UNIT, valid, D, PARTS, STEPS[1], True)
    v = load_tile(v_base, wide(rows, WIDE) * v_n * UNIT, valid, D, PARTS, STEPS[2], True)
    dk = zero_tile(BLOCK_N, PARTS)
    dv = zero_tile(BLOCK_N, PARTS)
    scale2 = scale if NATURAL else scale * LOG2E

    patch_first, patch_stop = span[2], span[2] + span[0]
    q_base = q_ptr + (sample64 * q_b + start64 * q_n) * UNIT
    dout_base = dout_ptr + (sample64 * do_b + start64 * do_n) * UNIT
    row_base = rows_ptr + (sample64 * heads * queries + start64) * 4
    group = group * any_valid  # a tile of padding has nothing to do
    # The loops are flat, over the heads of the group and the tiles of each: one pipeline, fewer registers.
    # Each takes a step at least, if an empty one: were there a way past it on which dk and dv are plain
    # zeros, ptxas would wait for every product on its own (C7515).
    if CUBES:
        box, box_end = seen_from(origin, grid, window, stride, k_cube, is_text, CAUSAL)
        corner, count, cubes = cubes_of(box, box_end, q_cube)
        bits = tl.where(is_text, 0, lane_bits(place_in(k_cube, lane), lane, k_cube))
        place = place_in(q_cube, row)
        row_bits = lane_bits(place, row, q_cube)
        row_token = token_of(place, grid)
        q_rows = wide(row_token, WIDE) * q_n * UNIT
        dout_rows = wide(row_token, WIDE) * do_n * UNIT
        a_head = tl.maximum(cubes, 1)
        for step in range(0, tl.maximum(group * cubes, 1)):
            head, index = _member(step, head_first, a_head, GROUPED)
            q_origin = origin_of(index, corner, count, q_cube)
            base = patch_first + token_of(q_origin, grid)
            there = in_grid(row_bits, q_origin, grid, q_cube) & (tl.zeros_like(row_token) < cubes)
            if PACKED:
                there &= row_token < patch_stop - base
            base64 = base.to(tl.int64)
            hidden = hidden_from_queries(
                q_origin, q_cube, row, grid, window, stride, origin, k_cube, CAUSAL
            )
            dk, dv = _dkdv_step(
                k, v, dk, dv, q_base + (base64 * q_n + head * q_h) * UNIT, q_rows,
                dout_base + (base64 * do_n + head * do_h) * UNIT, dout_rows,
                row_base + (head * queries + base64) * 4, row_token, there,
                (hidden[None, :] & bits[:, None]) != 0, scale2,
                D, PARTS, STEPS[0], PRECISION, NATURAL, DK, DV,
            )  # fmt: skip
    if TEXT or not CUBES:
        run = 0
        runs = 0
        if not CUBES:
            runs = tl.cdiv(span[0], BLOCK_M)
            if CAUSAL:  # queries of earlier frames see none of the tile
                frame = tl.maximum(grid[1] * grid[2], 1)
                run = tl.where(is_text, 0, tile * BLOCK_N // frame * frame // BLOCK_M)
        if TEXT:
            runs += tl.cdiv(span[1], BLOCK_M)
        a_head = tl.maximum(runs - run, 1)
        q_rows = wide(row, WIDE) * q_n * UNIT
        dout_rows = wide(row, WIDE) * do_n * UNIT
        patch_runs = 0 if CUBES else tl.cdiv(span[0], BLOCK_M)
        for step in range(0, tl.maximum(group * (runs - run), 1)):
            head, index = _member(step, head_first, a_head, GROUPED)
            base, limit, q_is_text = run_at(
                run + index, patch_runs, span, patch_stop, span[3] + span[1], BLOCK_M, TEXT
            )
            there = row < limit - base
            base64 = base.to(tl.int64)
            hidden = None
            if CAUSAL and not CUBES:
                frame_end = frames_seen(base + row, span, grid, q_is_text)
                seen_lanes = tl.where(is_text, FAR, frame_end - tile * BLOCK_N)
                hidden = lane[:, None] >= seen_lanes[None, :]
            dk, dv = _dkdv_step(
                k, v, dk, dv, q_base + (base64 * q_n + head * q_h) * UNIT, q_rows,
                dout_base + (base64 * do_n + head * do_h) * UNIT, dout_rows,
                row_base + (head * queries + base64) * 4, row, there, hidden, scale2,
                D, PARTS, STEPS[0], PRECISION, NATURAL, DK, DV,
            )  # fmt: skip

    # the rows of padding keys, which may have overflowed, are zero
    base = ((sample64 * keys + first64) * kv_heads + head_k) * D
    if DK:
        dk = kept(scaled(dk, scale), valid[:, None])
        store_tile(dk_ptr + base, wide(rows, WIDE) * kv_heads * D, exists, dk, D, PARTS)
    if DV:
        dv = kept(dv, valid[:, None])
        store_tile(dv_ptr + base, wide(rows, WIDE) * kv_heads * D, exists, dv, D, PARTS)


@triton.jit
def _dq_step(q, dout, dq, total, lse, delta, k_base, k_rows, v_base, v_rows, there, shown, scale, D: tl.constexpr,
             PARTS: tl.constexpr, K_STEP: tl.constexpr, V_STEP: tl.constexpr, PRECISION: tl.constexpr,
             MASKED: tl.constexpr, NATURAL: tl.constexpr):  # fmt: skip
    """One key tile for a query tile; `total` sums the rows of p, in float32 only."""
    k = load_tile(k_base, k_rows, there, D, PARTS, K_STEP, MASKED)
    v = load_tile(v_base, v_rows, there, D, PARTS, V_STEP, MASKED)
    p = exponential(products(q, k, PRECISION), scale, lse[:, None], NATURAL)
    if shown is not None:
        p = tl.where(shown, p, 0.0)
    if NATURAL:
        total += tl.sum(p, 1)
    ds = p * (products(dout, v, PRECISION) - delta[:, None])
    return added(dq, ds, k, PRECISION), total


@triton.jit(do_not_specialize=VARYING)
def attention3d_dq_kernel(
    q_ptr,  # [B, N, H, D], any strides
    k_ptr,  # [B, N', H', D]
    v_ptr,
    dout_ptr,  # [B, N, H, D], any strides but the last
    rows_ptr,  # [B, H, N, 4] float32
    dq_ptr,  # [B, N, H, D], or None: only the sums of p are wanted
    text_lens_ptr, kv_lens_ptr, cu_seqlens_ptr, table_ptr,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, do_b, do_n, do_h,
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
    dout_base = dout_ptr + (sample64 * do_b + head64 * do_h + first64 * do_n) * UNIT
    head_k = (head // group).to(tl.int64)
    k_base = k_ptr + (sample64 * k_b + head_k * k_h + start64 * k_n) * UNIT
    v_base = v_ptr + (sample64 * v_b + head_k * v_h + start64 * v_n) * UNIT
    k_rows = wide(lane, WIDE) * k_n * UNIT
    v_rows = wide(lane, WIDE) * v_n * UNIT

    q = load_tile(q_base, wide(rows, WIDE) * q_n * UNIT, exists, D, PARTS, STEPS[0], True)
    dout = load_tile(dout_base, wide(rows, WIDE) * do_n * UNIT, exists, D, PARTS, 1, True)
    row_base = rows_ptr + ((sample64 * heads + head) * queries + first64) * 4
    lse, delta, _ = _load_row(row_base, rows, exists)
    dq = zero_tile(BLOCK_M, PARTS)
    total = tl.zeros([BLOCK_M], tl.float32)
    scale2 = scale if NATURAL else scale * LOG2E

    runs = 0
    unmasked = 0
    frame_end = tl.full([BLOCK_M], FAR, tl.int32)
    if CUBES:
        place = place_in(q_cube, row)
        at = (origin[0] + place[0], origin[1] + place[1], origin[2] + place[2])
        seen, stop = seen_by(at, grid, window, stride, is_text, CAUSAL)
        low_first, _ = seen_by(origin, grid, window, stride, is_text, CAUSAL)
        _, high_end = seen_by(last_of(origin, grid, q_cube), grid, window, stride, is_text, CAUSAL)
        corner, count, cubes = cubes_of(low_first, high_end, k_cube)
        key_place = place_in(k_cube, lane)
        bits = lane_bits(key_place, lane, k_cube)
        key_token = token_of(key_place, grid)
        k_cube_rows = wide(key_token, WIDE) * k_n * UNIT
        v_cube_rows = wide(key_token, WIDE) * v_n * UNIT
        for j in range(0, cubes):
            key_origin = origin_of(j, corner, count, k_cube)
            base = key_span[2] + token_of(key_origin, grid)
            there = in_grid(bits, key_origin, grid, k_cube)
            key = bits
            if LIMITED:
                there &= key_token < patch_end - base
                key = tl.where(there, bits, NOTHING)
            base64 = base.to(tl.int64)
            hidden = hidden_bits(seen, stop, key_origin, k_cube)
            dq, total = _dq_step(
                q, dout, dq, total, lse, delta,
                k_base + base64 * k_n * UNIT, k_cube_rows, v_base + base64 * v_n * UNIT, v_cube_rows, there,
                (hidden[:, None] & key[None, :]) == 0, scale2,
                D, PARTS, STEPS[1], STEPS[2], PRECISION, True, NATURAL,
            )  # fmt: skip
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
            dq, total = _dq_step(
                q, dout, dq, total, lse, delta, k_base + base64 * k_n * UNIT, k_rows,
                v_base + base64 * v_n * UNIT, v_rows, None, None, scale2, D, PARTS, STEPS[1], STEPS[2], PRECISION, False, NATURAL,
            )  # fmt: skip

    if TEXT or not CUBES:
        texts = tl.cdiv(tl.maximum(text_end - key_span[3], 0), BLOCK_N) if TEXT else 0
        for j in range(unmasked, runs + texts):
            base, limit, key_is_text = run_at(j, runs, key_span, patch_end, text_end, BLOCK_N, TEXT)
            there = lane < limit - base
            base64 = base.to(tl.int64)
            if CAUSAL and not CUBES:
                key = tl.where(key_is_text, 0, base - key_span[2] + lane)
                key = tl.where(there, key, FAR)
                shown = key[None, :] < frame_end[:, None]
            else:
                shown = there[None, :]
            dq, total = _dq_step(
                q, dout, dq, total, lse, delta, k_base + base64 * k_n * UNIT, k_rows,
                v_base + base64 * v_n * UNIT, v_rows, there, shown, scale2, D, PARTS, STEPS[1], STEPS[2], PRECISION, True, NATURAL,
            )  # fmt: skip

    if NATURAL:
        inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
        dq = scaled(dq, inverse[:, None])
        tl.store(row_base + rows * 4 + 2, inverse, mask=exists)
    if dq_ptr is not None:
        dq_base = dq_ptr + ((sample64 * queries + first64) * heads + head) * D
        store_tile(dq_base, wide(rows, WIDE) * heads * D, exists, scaled(dq, scale), D, PARTS)
