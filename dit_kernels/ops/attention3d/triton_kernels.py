"""Flash attention over the tiles of `triton_tiles.py`: forward, and backward without atomics.

    forward    s = scale * q k^T;  p = exp(s - lse);  out = p v          online softmax, in base 2
    rows       delta = sum(dout * out) - dlse                            one pass over out and dout
    dk, dv     dv = p^T dout;  ds = p * (dout v^T - delta);  dk = scale * ds^T q    a program a key tile
    dq         dq = scale * ds k                                         a program a query tile

Forward reads q once, and k and v once a query tile. Each gradient is written once by the one program that
owns it, in a fixed order of summation, at the price of computing p twice.

A head dim that is no power of two is a tuple of parts that are (72 = 64 + 16, the second half empty):
scores add up over the parts, and every part has its own accumulator.

Strides come in units of UNIT elements, 16 bytes where all of them divide, so that the compiler sees it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dit_kernels.ops.attention3d.triton_tiles import (
    NOTHING,
    cubes_of,
    find_sequence,
    hidden_bits,
    in_cube,
    inside_box,
    key_bits,
    last_of,
    origin_of,
    patch_tiles,
    place_in,
    seen_by,
    seen_from,
    segments,
    tile_origin,
    token_of,
)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
FAR = tl.constexpr(2**31 - 1)

# sizes that change from call to call: a kernel compiled for one serves all
VARYING = (
    "q_b", "q_n", "q_h", "k_b", "k_n", "k_h", "v_b", "v_n", "v_h", "do_b", "do_n", "do_h",
    "queries", "keys", "heads", "group", "text", "text_first", "sequences", "tiles", "scale",
    "gt", "gh", "gw", "wt", "wh", "ww", "st", "sh", "sw", "qt", "qh", "qw", "kt", "kh", "kw",
)  # fmt: skip


# -- head dims in parts --------------------------------------------------------------------------------


@triton.jit
def _load_part(base, rows, exists, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, STEP: tl.constexpr, MASK: tl.constexpr):  # fmt: skip
    d = FIRST + tl.arange(0, WIDTH)
    if STEP == 1:
        at = base + (rows[:, None] + d[None, :])
    else:
        at = base + (rows[:, None] + (d.to(tl.int64) * STEP)[None, :])
    if FIRST + WIDTH > D:
        if MASK:
            x = tl.load(at, mask=exists[:, None] & (d < D)[None, :], other=0.0)
        else:
            x = tl.load(at, mask=(d < D)[None, :], other=0.0)
    else:
        if MASK:
            x = tl.load(at, mask=exists[:, None], other=0.0)
        else:
            x = tl.load(at)
    return x


@triton.jit
def _load(base, rows, exists, D: tl.constexpr, PARTS: tl.constexpr, STEP: tl.constexpr, MASK: tl.constexpr):  # fmt: skip
    """A [BLOCK, D] tile whose rows begin `rows` elements past `base`, a tuple of its parts."""
    x = (_load_part(base, rows, exists, 0, PARTS[0], D, STEP, MASK),)
    if len(PARTS) > 1:
        x = x + (_load_part(base, rows, exists, PARTS[0], PARTS[1], D, STEP, MASK),)
    if len(PARTS) > 2:
        x = x + (_load_part(base, rows, exists, PARTS[0] + PARTS[1], PARTS[2], D, STEP, MASK),)
    return x


@triton.jit
def _store_part(base, rows, exists, x, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    d = FIRST + tl.arange(0, WIDTH)
    mask = exists[:, None]
    if FIRST + WIDTH > D:
        mask = mask & (d < D)[None, :]
    tl.store(base + (rows[:, None] + d[None, :]), x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _store(base, rows, exists, x, D: tl.constexpr, PARTS: tl.constexpr):
    _store_part(base, rows, exists, x[0], 0, PARTS[0], D)
    if len(PARTS) > 1:
        _store_part(base, rows, exists, x[1], PARTS[0], PARTS[1], D)
    if len(PARTS) > 2:
        _store_part(base, rows, exists, x[2], PARTS[0] + PARTS[1], PARTS[2], D)


@triton.jit
def _zero_part(ROWS: tl.constexpr, WIDTH: tl.constexpr):
    return tl.zeros([ROWS, WIDTH], tl.float32)


@triton.jit
def _zeros(ROWS: tl.constexpr, PARTS: tl.constexpr):
    x = (_zero_part(ROWS, PARTS[0]),)
    if len(PARTS) > 1:
        x = x + (_zero_part(ROWS, PARTS[1]),)
    if len(PARTS) > 2:
        x = x + (_zero_part(ROWS, PARTS[2]),)
    return x


@triton.jit
def _scaled(x, factor):
    """Every row times its factor."""
    y = (x[0] * factor,)
    if len(x) > 1:
        y = y + (x[1] * factor,)
    if len(x) > 2:
        y = y + (x[2] * factor,)
    return y


@triton.jit
def _kept(x, rows):
    """Zero but in the given rows."""
    y = (tl.where(rows, x[0], 0.0),)
    if len(x) > 1:
        y = y + (tl.where(rows, x[1], 0.0),)
    if len(x) > 2:
        y = y + (tl.where(rows, x[2], 0.0),)
    return y


@triton.jit
def _products(a, b, PRECISION: tl.constexpr):
    """a b^T [M, N] of tiles [M, D] and [N, D]."""
    s = tl.dot(a[0], tl.trans(b[0]), input_precision=PRECISION)
    if len(a) > 1:
        s = tl.dot(a[1], tl.trans(b[1]), s, input_precision=PRECISION)
    if len(a) > 2:
        s = tl.dot(a[2], tl.trans(b[2]), s, input_precision=PRECISION)
    return s


@triton.jit
def _added(acc, weights, x, PRECISION: tl.constexpr):
    """acc + weights x, [M, D] of [M, N] and [N, D]."""
    weights = weights.to(x[0].dtype)
    y = (tl.dot(weights, x[0], acc[0], input_precision=PRECISION),)
    if len(x) > 1:
        y = y + (tl.dot(weights, x[1], acc[1], input_precision=PRECISION),)
    if len(x) > 2:
        y = y + (tl.dot(weights, x[2], acc[2], input_precision=PRECISION),)
    return y


@triton.jit
def _wide(lane, WIDE: tl.constexpr):
    """Offsets inside one tile: 32 bits take half the registers, where the host knows that they do."""
    return lane.to(tl.int64) if WIDE else lane


# -- what a program works on ---------------------------------------------------------------------------


@triton.jit
def _sequence(program, tiles, heads, queries, sequences, cu_seqlens_ptr, table_ptr, gt, gh, gw,
              BLOCK: tl.constexpr, TEXT: tl.constexpr, CUBES: tl.constexpr, REVERSED: tl.constexpr):  # fmt: skip
    """(sample, head, sequence, tile in it, first token, tokens, grid) of a program."""
    tile = program % tiles
    if REVERSED:
        tile = tiles - 1 - tile
    above = program // tiles
    head = above % heads
    sample = above // heads
    sequence = sample
    start = tl.zeros([], tl.int32)
    length = queries
    grid = (gt, gh, gw)
    if cu_seqlens_ptr is not None:
        sequence, tile = find_sequence(
            tile, cu_seqlens_ptr, table_ptr, sequences, BLOCK, 2 if TEXT else 1, CUBES
        )
        start = tl.load(cu_seqlens_ptr + sequence)
        tail = sequence >= sequences
        end = tl.load(cu_seqlens_ptr + sequence + 1, mask=sequence < sequences, other=0)
        length = tl.where(tail, queries, end) - start
        if table_ptr is not None:
            at = table_ptr + sequence * 4
            grid = (tl.load(at), tl.load(at + 1), tl.load(at + 2))
    return sample, head, sequence, tile, start, length, grid


@triton.jit
def _key_ends(sequence, sequences, length, span, text_lens_ptr, kv_lens_ptr, PACKED: tl.constexpr):
    """(end of the patch keys, end of the text keys), in tokens of the sequence."""
    patches, text, first_patch, first_text = span
    if text_lens_ptr is not None:
        known = sequence < sequences if PACKED else sequence >= 0
        text = tl.minimum(text, tl.load(text_lens_ptr + sequence, mask=known, other=0))
    if kv_lens_ptr is not None:
        length = tl.minimum(length, tl.load(kv_lens_ptr + sequence))
    if PACKED:
        length = tl.where(sequence < sequences, length, 0)
    return tl.minimum(first_patch + patches, length), tl.minimum(first_text + text, length)


@triton.jit
def _tile(tile, lane, span, grid, cube, BLOCK: tl.constexpr, CUBES: tl.constexpr, TEXT: tl.constexpr):  # fmt: skip
    """(first token, lanes' tokens past it, which exist, is the tile text, (t, h, w) where a cube begins)."""
    patches, text, first_patch, first_text = span
    count = patch_tiles(patches, grid, cube, BLOCK, CUBES)
    origin = (0, 0, 0)
    if CUBES:
        origin = tile_origin(tile, grid, cube)
        place = place_in(cube, lane)
        base = first_patch + token_of(origin, grid)
        rows = token_of(place, grid)
        exists = in_cube(origin, place, lane, grid, cube)
    else:
        base = first_patch + tile * BLOCK
        rows = lane
        exists = lane < patches - tile * BLOCK
    is_text = tile >= count
    if TEXT:
        index = (tile - count) * BLOCK
        base = tl.where(is_text, first_text + index, base)
        rows = tl.where(is_text, lane, rows)
        exists = tl.where(is_text, lane < text - index, exists)
    return base, rows, exists, is_text, origin


@triton.jit
def _run(j, count, span, patch_end, text_end, BLOCK: tl.constexpr, TEXT: tl.constexpr):
    """(first token, end token, is it text) of run j: `count` runs of patches, then the text's."""
    first = span[2] + j * BLOCK
    end = patch_end
    is_text = False
    if TEXT:
        is_text = j >= count
        first = tl.where(is_text, span[3] + (j - count) * BLOCK, first)
        end = tl.where(is_text, text_end, end)
    return first, end, is_text


@triton.jit
def _frame_end(token, span, grid, is_text):
    """One past the last patch that a query sees with causal_time, counted in patches."""
    frame = tl.maximum(grid[1] * grid[2], 1)
    end = tl.minimum(((token - span[2]) // frame + 1) * frame, span[0])
    return tl.where(is_text, span[0], end)


@triton.jit
def _exponential(s, scale, base, NATURAL: tl.constexpr):
    """exp of scale * s - base. 16-bit inputs: in base 2, with log2(e) inside the scale and the base.

    float32: in base e, where numbers are smaller and so is the error of their difference.
    """
    x = s * scale - base
    if NATURAL:
        x = x * LOG2E
    return tl.exp2(x)


@triton.jit
def _softmax_step(s, v, acc, peak, total, scale, PRECISION: tl.constexpr, MASKED: tl.constexpr, NATURAL: tl.constexpr):  # fmt: skip
    """One key tile of the online softmax."""
    top = tl.maximum(peak, tl.max(s, 1) * scale)
    base = top
    if MASKED:  # a row that has seen nothing yet
        base = tl.where(top == float("-inf"), 0.0, top)
    p = _exponential(s, scale, base[:, None], NATURAL)
    fade = _exponential(peak, 1.0, base, NATURAL)
    total = total * fade + tl.sum(p, 1)
    acc = _added(_scaled(acc, fade[:, None]), p, v, PRECISION)
    return acc, top, total


# -- forward -------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=VARYING)
def attention3d_fwd_kernel(
    q_ptr,  # [B, N, H, D], any strides
    k_ptr,  # [B, N', H', D]
    v_ptr,
    out_ptr,  # [B, N, H, D]
    lse_ptr,  # [B, H, N] float32
    text_lens_ptr, kv_lens_ptr, cu_seqlens_ptr, table_ptr,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h,
    queries, keys, heads, group, text, text_first, sequences, tiles, scale,
    gt, gh, gw, wt, wh, ww, st, sh, sw, qt, qh, qw, kt, kh, kw,
    D: tl.constexpr, PARTS: tl.constexpr, STEPS: tl.constexpr, UNIT: tl.constexpr,
    CUBES: tl.constexpr, CAUSAL: tl.constexpr, TEXT: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    PACKED: tl.constexpr = cu_seqlens_ptr is not None
    NATURAL: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    window, stride, q_cube, k_cube = (wt, wh, ww), (st, sh, sw), (qt, qh, qw), (kt, kh, kw)
    sample, head, sequence, tile, start, length, grid = _sequence(
        tl.program_id(0), tiles, heads, queries, sequences, cu_seqlens_ptr, table_ptr, gt, gh, gw,
        BLOCK_M, TEXT, CUBES, CAUSAL,
    )  # fmt: skip
    span = segments(length, text, text_first)
    row, lane = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    first, rows, exists, is_text, origin = _tile(
        tile, row, span, grid, q_cube, BLOCK_M, CUBES, TEXT
    )
    if tile >= patch_tiles(span[0], grid, q_cube, BLOCK_M, CUBES) + tl.cdiv(span[1], BLOCK_M):
        return
    key_span = span
    if not PACKED:
        key_span = segments(keys, text, text_first)
    key_length = length if PACKED else keys
    patch_end, text_end = _key_ends(
        sequence, sequences, key_length, key_span, text_lens_ptr, kv_lens_ptr, PACKED
    )

    sample64, head64, start64 = sample.to(tl.int64), head.to(tl.int64), start.to(tl.int64)
    first64 = start64 + first
    q_base = q_ptr + (sample64 * q_b + head64 * q_h + first64 * q_n) * UNIT
    head_k = (head // group).to(tl.int64)
    k_base = k_ptr + (sample64 * k_b + head_k * k_h + start64 * k_n) * UNIT
    v_base = v_ptr + (sample64 * v_b + head_k * v_h + start64 * v_n) * UNIT
    k_rows = _wide(lane, WIDE) * k_n * UNIT
    v_rows = _wide(lane, WIDE) * v_n * UNIT

    q = _load(q_base, _wide(rows, WIDE) * q_n * UNIT, exists, D, PARTS, STEPS[0], True)
    acc = _zeros(BLOCK_M, PARTS)
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
        bits = key_bits(key_place, k_cube)
        key_token = token_of(key_place, grid)
        k_cube_rows = _wide(key_token, WIDE) * k_n * UNIT
        v_cube_rows = _wide(key_token, WIDE) * v_n * UNIT
        full = k_cube[0] * k_cube[1] * k_cube[2] == BLOCK_N
        furthest = token_of((k_cube[0] - 1, k_cube[1] - 1, k_cube[2] - 1), grid)
        for j in range(0, cubes):
            key_origin = origin_of(j, corner, count, k_cube)
            base = key_span[2] + token_of(key_origin, grid)
            there = in_cube(key_origin, key_place, lane, grid, k_cube)
            there &= key_token < patch_end - base
            base64 = base.to(tl.int64)
            k = _load(k_base + base64 * k_n * UNIT, k_cube_rows, there, D, PARTS, STEPS[1], True)
            v = _load(v_base + base64 * v_n * UNIT, v_cube_rows, there, D, PARTS, STEPS[2], True)
            s = _products(q, k, PRECISION)
            clear = full & inside_box(key_origin, k_cube, high_first, low_end)
            clear &= base + furthest < patch_end
            if not clear:
                key = tl.where(there, bits, NOTHING)
                hidden = hidden_bits(seen, stop, key_origin, k_cube)
                s = tl.where((hidden[:, None] & key[None, :]) != 0, float("-inf"), s)
            acc, peak, total = _softmax_step(
                s, v, acc, peak, total, scale, PRECISION, True, NATURAL
            )
    else:
        keys_seen = tl.maximum(patch_end - key_span[2], 0)
        unmasked = keys_seen
        if CAUSAL:
            frame_end = _frame_end(first + rows, span, grid, is_text)
            unmasked = tl.minimum(keys_seen, _frame_end(first, span, grid, is_text))
            final = tl.minimum(first + BLOCK_M, span[2] + span[0]) - 1
            keys_seen = tl.minimum(keys_seen, _frame_end(final, span, grid, is_text))
        runs = tl.cdiv(keys_seen, BLOCK_N)
        unmasked = unmasked // BLOCK_N
        patch64 = key_span[2].to(tl.int64)
        for j in range(0, unmasked):
            base64 = patch64 + j * BLOCK_N
            k = _load(k_base + base64 * k_n * UNIT, k_rows, None, D, PARTS, STEPS[1], False)
            v = _load(v_base + base64 * v_n * UNIT, v_rows, None, D, PARTS, STEPS[2], False)
            s = _products(q, k, PRECISION)
            acc, peak, total = _softmax_step(
                s, v, acc, peak, total, scale, PRECISION, False, NATURAL
            )

    if TEXT or not CUBES:  # the runs that are cut: by a length, by a frame; and text
        texts = tl.cdiv(tl.maximum(text_end - key_span[3], 0), BLOCK_N) if TEXT else 0
        for j in range(unmasked, runs + texts):
            base, limit, key_is_text = _run(j, runs, key_span, patch_end, text_end, BLOCK_N, TEXT)
            there = lane < limit - base
            base64 = base.to(tl.int64)
            k = _load(k_base + base64 * k_n * UNIT, k_rows, there, D, PARTS, STEPS[1], True)
            v = _load(v_base + base64 * v_n * UNIT, v_rows, there, D, PARTS, STEPS[2], True)
            s = _products(q, k, PRECISION)
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
    acc = _scaled(acc, (1.0 / tl.where(blind, 1.0, total))[:, None])
    if NATURAL:
        lse = peak + tl.log(tl.where(blind, 1.0, total))
    else:
        lse = (peak + tl.log2(tl.where(blind, 1.0, total))) * LN2
    lse = tl.where(blind, float("-inf"), lse)
    out_base = out_ptr + ((sample64 * queries + first64) * heads + head) * D
    _store(out_base, _wide(rows, WIDE) * heads * D, exists, acc, D, PARTS)
    tl.store(lse_ptr + (sample64 * heads + head) * queries + first64 + rows, lse, mask=exists)


# -- backward ------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=VARYING)
def attention3d_rows_kernel(
    out_ptr,  # [B, N, H, D]
    dout_ptr,  # [B, N, H, D], any strides but the last
    lse_ptr,  # [B, H, N]
    dlse_ptr,  # [B, H, N] or None
    rows_ptr,  # [B, H, N, 4] float32: lse as `_exponential` wants it, delta, and nothing twice
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
    row = tl.where(four == 0, lse[:, None], tl.where(four == 1, delta[:, None], 0.0))
    tl.store(rows_ptr + (at * 4)[:, None] + four, row, mask=(token < queries)[:, None])


@triton.jit
def _load_row(base, rows, exists):
    """(lse, delta) of each query; a lane without one gets the lse for which every p is 0.

    A row takes 16 bytes so that loading it is one asynchronous copy. A vector of BLOCK_M floats counts as
    cheap: the compiler would load it in the layout of the scores, every thread all of its columns.
    """
    four = tl.arange(0, 4)[None, :]
    row = tl.load(base + (rows * 4)[:, None] + four, mask=exists[:, None], other=0.0)
    lse = tl.sum(tl.where(four == 0, row, 0.0), 1)
    delta = tl.sum(tl.where(four == 1, row, 0.0), 1)
    return tl.where(exists, lse, float("inf")), delta


@triton.jit
def _dkdv_step(k, v, dk, dv, q_base, q_rows, dout_base, dout_rows, row_base, rows, exists, hidden, scale,
               D: tl.constexpr, PARTS: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
               NATURAL: tl.constexpr):  # fmt: skip
    """One query tile [M] for a key tile [N]: scores are kept as [N, M]."""
    q = _load(q_base, q_rows, exists, D, PARTS, STEP, True)
    dout = _load(dout_base, dout_rows, exists, D, PARTS, 1, True)
    lse, delta = _load_row(row_base, rows, exists)
    # the scores' products first and dk before dv: arithmetic on the results of products that has slipped
    # behind the start of another one makes ptxas wait for each on its own (C7514)
    s = _products(k, q, PRECISION)
    dp = _products(v, dout, PRECISION)
    p = _exponential(s, scale, lse[None, :], NATURAL)
    if hidden is not None:
        p = tl.where(hidden, 0.0, p)
    ds = p * (dp - delta[None, :])
    dk = _added(dk, ds, q, PRECISION)
    return dk, _added(dv, p, dout, PRECISION)


@triton.jit(do_not_specialize=VARYING)
def attention3d_dkdv_kernel(
    q_ptr,  # [B, N, H, D], any strides
    k_ptr,  # [B, N', H', D]
    v_ptr,
    dout_ptr,  # [B, N, H, D], any strides but the last
    rows_ptr,  # [B, H, N, 4] float32
    dk_ptr,  # [B, N', H', D]
    dv_ptr,
    text_lens_ptr, kv_lens_ptr, cu_seqlens_ptr, table_ptr,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, do_b, do_n, do_h,
    queries, keys, heads, group, text, text_first, sequences, tiles, scale,
    gt, gh, gw, wt, wh, ww, st, sh, sw, qt, qh, qw, kt, kh, kw,
    D: tl.constexpr, PARTS: tl.constexpr, STEPS: tl.constexpr, UNIT: tl.constexpr,
    CUBES: tl.constexpr, CAUSAL: tl.constexpr, TEXT: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    PACKED: tl.constexpr = cu_seqlens_ptr is not None
    NATURAL: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    window, stride, q_cube, k_cube = (wt, wh, ww), (st, sh, sw), (qt, qh, qw), (kt, kh, kw)
    kv_heads = heads // group
    sample, head_k, sequence, tile, start, length, grid = _sequence(
        tl.program_id(0), tiles, kv_heads, keys, sequences, cu_seqlens_ptr, table_ptr, gt, gh, gw,
        BLOCK_N, TEXT, CUBES, False,
    )  # fmt: skip
    key_span = segments(length, text, text_first)
    lane, row = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    first, rows, exists, is_text, origin = _tile(
        tile, lane, key_span, grid, k_cube, BLOCK_N, CUBES, TEXT
    )
    if tile >= patch_tiles(key_span[0], grid, k_cube, BLOCK_N, CUBES) + tl.cdiv(
        key_span[1], BLOCK_N
    ):
        return
    span = key_span
    if not PACKED:
        span = segments(queries, text, text_first)
    patch_end, text_end = _key_ends(
        sequence, sequences, length, key_span, text_lens_ptr, kv_lens_ptr, PACKED
    )
    valid = exists & (rows < tl.where(is_text, text_end, patch_end) - first)
    any_valid = tl.max(valid.to(tl.int32), 0)
    head_first = (head_k * group).to(tl.int64)

    sample64, head64, start64 = sample.to(tl.int64), head_k.to(tl.int64), start.to(tl.int64)
    first64 = start64 + first
    k_base = k_ptr + (sample64 * k_b + head64 * k_h + first64 * k_n) * UNIT
    v_base = v_ptr + (sample64 * v_b + head64 * v_h + first64 * v_n) * UNIT
    k = _load(k_base, _wide(rows, WIDE) * k_n * UNIT, valid, D, PARTS, STEPS[1], True)
    v = _load(v_base, _wide(rows, WIDE) * v_n * UNIT, valid, D, PARTS, STEPS[2], True)
    dk = _zeros(BLOCK_N, PARTS)
    dv = _zeros(BLOCK_N, PARTS)
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
        bits = tl.where(is_text, 0, key_bits(place_in(k_cube, lane), k_cube))
        place = place_in(q_cube, row)
        row_token = token_of(place, grid)
        q_rows = _wide(row_token, WIDE) * q_n * UNIT
        dout_rows = _wide(row_token, WIDE) * do_n * UNIT
        a_head = tl.maximum(cubes, 1)
        for step in range(0, tl.maximum(group * cubes, 1)):
            head = head_first + (step // a_head).to(tl.int64)
            q_origin = origin_of(step % a_head, corner, count, q_cube)
            base = patch_first + token_of(q_origin, grid)
            there = in_cube(q_origin, place, row, grid, q_cube)
            there &= (row_token < patch_stop - base) & (cubes > 0)
            base64 = base.to(tl.int64)
            position = (q_origin[0] + place[0], q_origin[1] + place[1], q_origin[2] + place[2])
            seen, stop = seen_by(position, grid, window, stride, False, CAUSAL)
            hidden = hidden_bits(seen, stop, origin, k_cube)
            dk, dv = _dkdv_step(
                k, v, dk, dv, q_base + (base64 * q_n + head * q_h) * UNIT, q_rows,
                dout_base + (base64 * do_n + head * do_h) * UNIT, dout_rows,
                row_base + (head * queries + base64) * 4, row_token, there,
                (hidden[None, :] & bits[:, None]) != 0, scale2,
                D, PARTS, STEPS[0], PRECISION, NATURAL,
            )  # fmt: skip
    if TEXT or not CUBES:
        run = 0
        runs = 0
        if not CUBES:
            runs = tl.cdiv(span[0], BLOCK_M)
            if CAUSAL:  # queries of earlier frames see none of the tile
                frame = tl.maximum(grid[1] * grid[2], 1)
                run = tl.where(is_text, 0, tile * BLOCK_N // frame * frame // BLOCK_M)
                key = tl.where(is_text, 0, tile * BLOCK_N + lane)
        if TEXT:
            runs += tl.cdiv(span[1], BLOCK_M)
        a_head = tl.maximum(runs - run, 1)
        q_rows = _wide(row, WIDE) * q_n * UNIT
        dout_rows = _wide(row, WIDE) * do_n * UNIT
        patch_runs = 0 if CUBES else tl.cdiv(span[0], BLOCK_M)
        for step in range(0, tl.maximum(group * (runs - run), 1)):
            head = head_first + (step // a_head).to(tl.int64)
            base, limit, q_is_text = _run(
                run + step % a_head, patch_runs, span, patch_stop, span[3] + span[1], BLOCK_M, TEXT
            )
            there = row < limit - base
            base64 = base.to(tl.int64)
            hidden = None
            if CAUSAL and not CUBES:
                frame_end = _frame_end(base + row, span, grid, q_is_text)
                hidden = key[:, None] >= frame_end[None, :]
            dk, dv = _dkdv_step(
                k, v, dk, dv, q_base + (base64 * q_n + head * q_h) * UNIT, q_rows,
                dout_base + (base64 * do_n + head * do_h) * UNIT, dout_rows,
                row_base + (head * queries + base64) * 4, row, there, hidden, scale2,
                D, PARTS, STEPS[0], PRECISION, NATURAL,
            )  # fmt: skip

    # the rows of padding keys, which may have overflowed, are zero
    dk = _kept(_scaled(dk, scale), valid[:, None])
    dv = _kept(dv, valid[:, None])
    base = ((sample64 * keys + first64) * kv_heads + head_k) * D
    _store(dk_ptr + base, _wide(rows, WIDE) * kv_heads * D, exists, dk, D, PARTS)
    _store(dv_ptr + base, _wide(rows, WIDE) * kv_heads * D, exists, dv, D, PARTS)


@triton.jit
def _dq_step(q, dout, dq, lse, delta, k_base, k_rows, v_base, v_rows, there, shown, scale, D: tl.constexpr,
             PARTS: tl.constexpr, K_STEP: tl.constexpr, V_STEP: tl.constexpr, PRECISION: tl.constexpr,
             MASKED: tl.constexpr, NATURAL: tl.constexpr):  # fmt: skip
    """One key tile for a query tile."""
    k = _load(k_base, k_rows, there, D, PARTS, K_STEP, MASKED)
    v = _load(v_base, v_rows, there, D, PARTS, V_STEP, MASKED)
    p = _exponential(_products(q, k, PRECISION), scale, lse[:, None], NATURAL)
    if shown is not None:
        p = tl.where(shown, p, 0.0)
    ds = p * (_products(dout, v, PRECISION) - delta[:, None])
    return _added(dq, ds, k, PRECISION)


@triton.jit(do_not_specialize=VARYING)
def attention3d_dq_kernel(
    q_ptr,  # [B, N, H, D], any strides
    k_ptr,  # [B, N', H', D]
    v_ptr,
    dout_ptr,  # [B, N, H, D], any strides but the last
    rows_ptr,  # [B, H, N, 4] float32
    dq_ptr,  # [B, N, H, D]
    text_lens_ptr, kv_lens_ptr, cu_seqlens_ptr, table_ptr,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, do_b, do_n, do_h,
    queries, keys, heads, group, text, text_first, sequences, tiles, scale,
    gt, gh, gw, wt, wh, ww, st, sh, sw, qt, qh, qw, kt, kh, kw,
    D: tl.constexpr, PARTS: tl.constexpr, STEPS: tl.constexpr, UNIT: tl.constexpr,
    CUBES: tl.constexpr, CAUSAL: tl.constexpr, TEXT: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    PACKED: tl.constexpr = cu_seqlens_ptr is not None
    NATURAL: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    window, stride, q_cube, k_cube = (wt, wh, ww), (st, sh, sw), (qt, qh, qw), (kt, kh, kw)
    sample, head, sequence, tile, start, length, grid = _sequence(
        tl.program_id(0), tiles, heads, queries, sequences, cu_seqlens_ptr, table_ptr, gt, gh, gw,
        BLOCK_M, TEXT, CUBES, CAUSAL,
    )  # fmt: skip
    span = segments(length, text, text_first)
    row, lane = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    first, rows, exists, is_text, origin = _tile(
        tile, row, span, grid, q_cube, BLOCK_M, CUBES, TEXT
    )
    if tile >= patch_tiles(span[0], grid, q_cube, BLOCK_M, CUBES) + tl.cdiv(span[1], BLOCK_M):
        return
    key_span = span
    if not PACKED:
        key_span = segments(keys, text, text_first)
    key_length = length if PACKED else keys
    patch_end, text_end = _key_ends(
        sequence, sequences, key_length, key_span, text_lens_ptr, kv_lens_ptr, PACKED
    )

    sample64, head64, start64 = sample.to(tl.int64), head.to(tl.int64), start.to(tl.int64)
    first64 = start64 + first
    q_base = q_ptr + (sample64 * q_b + head64 * q_h + first64 * q_n) * UNIT
    dout_base = dout_ptr + (sample64 * do_b + head64 * do_h + first64 * do_n) * UNIT
    head_k = (head // group).to(tl.int64)
    k_base = k_ptr + (sample64 * k_b + head_k * k_h + start64 * k_n) * UNIT
    v_base = v_ptr + (sample64 * v_b + head_k * v_h + start64 * v_n) * UNIT
    k_rows = _wide(lane, WIDE) * k_n * UNIT
    v_rows = _wide(lane, WIDE) * v_n * UNIT

    q = _load(q_base, _wide(rows, WIDE) * q_n * UNIT, exists, D, PARTS, STEPS[0], True)
    dout = _load(dout_base, _wide(rows, WIDE) * do_n * UNIT, exists, D, PARTS, 1, True)
    row_base = rows_ptr + ((sample64 * heads + head) * queries + first64) * 4
    lse, delta = _load_row(row_base, rows, exists)
    dq = _zeros(BLOCK_M, PARTS)
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
        bits = key_bits(key_place, k_cube)
        key_token = token_of(key_place, grid)
        k_cube_rows = _wide(key_token, WIDE) * k_n * UNIT
        v_cube_rows = _wide(key_token, WIDE) * v_n * UNIT
        for j in range(0, cubes):
            key_origin = origin_of(j, corner, count, k_cube)
            base = key_span[2] + token_of(key_origin, grid)
            there = in_cube(key_origin, key_place, lane, grid, k_cube)
            there &= key_token < patch_end - base
            base64 = base.to(tl.int64)
            hidden = hidden_bits(seen, stop, key_origin, k_cube)
            key = tl.where(there, bits, NOTHING)
            dq = _dq_step(
                q, dout, dq, lse, delta,
                k_base + base64 * k_n * UNIT, k_cube_rows, v_base + base64 * v_n * UNIT, v_cube_rows, there,
                (hidden[:, None] & key[None, :]) == 0, scale2,
                D, PARTS, STEPS[1], STEPS[2], PRECISION, True, NATURAL,
            )  # fmt: skip
    else:
        keys_seen = tl.maximum(patch_end - key_span[2], 0)
        unmasked = keys_seen
        if CAUSAL:
            frame_end = _frame_end(first + rows, span, grid, is_text)
            unmasked = tl.minimum(keys_seen, _frame_end(first, span, grid, is_text))
            final = tl.minimum(first + BLOCK_M, span[2] + span[0]) - 1
            keys_seen = tl.minimum(keys_seen, _frame_end(final, span, grid, is_text))
        runs = tl.cdiv(keys_seen, BLOCK_N)
        unmasked = unmasked // BLOCK_N
        patch64 = key_span[2].to(tl.int64)
        for j in range(0, unmasked):
            base64 = patch64 + j * BLOCK_N
            dq = _dq_step(
                q, dout, dq, lse, delta, k_base + base64 * k_n * UNIT, k_rows,
                v_base + base64 * v_n * UNIT, v_rows, None, None, scale2, D, PARTS, STEPS[1], STEPS[2], PRECISION, False, NATURAL,
            )  # fmt: skip

    if TEXT or not CUBES:
        texts = tl.cdiv(tl.maximum(text_end - key_span[3], 0), BLOCK_N) if TEXT else 0
        for j in range(unmasked, runs + texts):
            base, limit, key_is_text = _run(j, runs, key_span, patch_end, text_end, BLOCK_N, TEXT)
            there = lane < limit - base
            base64 = base.to(tl.int64)
            if CAUSAL and not CUBES:
                key = tl.where(key_is_text, 0, base - key_span[2] + lane)
                key = tl.where(there, key, FAR)
                shown = key[None, :] < frame_end[:, None]
            else:
                shown = there[None, :]
            dq = _dq_step(
                q, dout, dq, lse, delta, k_base + base64 * k_n * UNIT, k_rows,
                v_base + base64 * v_n * UNIT, v_rows, there, shown, scale2, D, PARTS, STEPS[1], STEPS[2], PRECISION, True, NATURAL,
            )  # fmt: skip

    dq_base = dq_ptr + ((sample64 * queries + first64) * heads + head) * D
    _store(dq_base, _wide(rows, WIDE) * heads * D, exists, _scaled(dq, scale), D, PARTS)
