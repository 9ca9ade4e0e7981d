"""What the attention kernels share: tiles of a head dim in parts, and what a program works on.

A head dim that is no power of two is a tuple of parts that are (72 = 64 + 16, the second half empty):
scores add up over the parts, and every part has its own accumulator.

Strides come in units of UNIT elements, 16 bytes where all of them divide, so that the compiler sees it.
"""

# Triton gives its functions no types
# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from dit_kernels.ops.attention3d.triton_tiles import (
    find_sequence,
    in_grid,
    lane_bits,
    patch_tiles,
    place_in,
    tile_origin,
    token_of,
)

LOG2E = tl.constexpr(1.4426950408889634)
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
def load_tile(base, rows, exists, D: tl.constexpr, PARTS: tl.constexpr, STEP: tl.constexpr, MASK: tl.constexpr):  # fmt: skip
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
def store_tile(base, rows, exists, x, D: tl.constexpr, PARTS: tl.constexpr):
    _store_part(base, rows, exists, x[0], 0, PARTS[0], D)
    if len(PARTS) > 1:
        _store_part(base, rows, exists, x[1], PARTS[0], PARTS[1], D)
    if len(PARTS) > 2:
        _store_part(base, rows, exists, x[2], PARTS[0] + PARTS[1], PARTS[2], D)


@triton.jit
def _zero_part(ROWS: tl.constexpr, WIDTH: tl.constexpr):
    return tl.zeros([ROWS, WIDTH], tl.float32)


@triton.jit
def zero_tile(ROWS: tl.constexpr, PARTS: tl.constexpr):
    x = (_zero_part(ROWS, PARTS[0]),)
    if len(PARTS) > 1:
        x = x + (_zero_part(ROWS, PARTS[1]),)
    if len(PARTS) > 2:
        x = x + (_zero_part(ROWS, PARTS[2]),)
    return x


@triton.jit
def scaled(x, factor):
    """Every row times its factor."""
    y = (x[0] * factor,)
    if len(x) > 1:
        y = y + (x[1] * factor,)
    if len(x) > 2:
        y = y + (x[2] * factor,)
    return y


@triton.jit
def kept(x, rows):
    """Zero but in the given rows."""
    y = (tl.where(rows, x[0], 0.0),)
    if len(x) > 1:
        y = y + (tl.where(rows, x[1], 0.0),)
    if len(x) > 2:
        y = y + (tl.where(rows, x[2], 0.0),)
    return y


@triton.jit
def products(a, b, PRECISION: tl.constexpr):
    """a b^T [M, N] of tiles [M, D] and [N, D]."""
    s = tl.dot(a[0], tl.trans(b[0]), input_precision=PRECISION)
    if len(a) > 1:
        s = tl.dot(a[1], tl.trans(b[1]), s, input_precision=PRECISION)
    if len(a) > 2:
        s = tl.dot(a[2], tl.trans(b[2]), s, input_precision=PRECISION)
    return s


@triton.jit
def added(acc, weights, x, PRECISION: tl.constexpr):
    """acc + weights x, [M, D] of [M, N] and [N, D]."""
    weights = weights.to(x[0].dtype)
    y = (tl.dot(weights, x[0], acc[0], input_precision=PRECISION),)
    if len(x) > 1:
        y = y + (tl.dot(weights, x[1], acc[1], input_precision=PRECISION),)
    if len(x) > 2:
        y = y + (tl.dot(weights, x[2], acc[2], input_precision=PRECISION),)
    return y


@triton.jit
def wide(lane, WIDE: tl.constexpr):
    """Offsets inside one tile: 32 bits take half the registers, where the host knows that they do."""
    return lane.to(tl.int64) if WIDE else lane


# -- what a program works on ---------------------------------------------------------------------------


@triton.jit
def find_program(program, tiles, heads, queries, sequences, cu_seqlens_ptr, table_ptr, gt, gh, gw,
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
def key_ends(sequence, sequences, length, span, text_lens_ptr, kv_lens_ptr, PACKED: tl.constexpr):
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
def tile_at(tile, lane, span, grid, cube, BLOCK: tl.constexpr, CUBES: tl.constexpr, TEXT: tl.constexpr):  # fmt: skip
    """(first token, lanes' tokens past it, which exist, is the tile text, (t, h, w) where a cube begins)."""
    patches, text, first_patch, first_text = span
    count = patch_tiles(patches, grid, cube, BLOCK, CUBES)
    origin = (0, 0, 0)
    if CUBES:
        origin = tile_origin(tile, grid, cube)
        place = place_in(cube, lane)
        base = first_patch + token_of(origin, grid)
        rows = token_of(place, grid)
        exists = in_grid(lane_bits(place, lane, cube), origin, grid, cube)
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
def run_at(j, count, span, patch_end, text_end, BLOCK: tl.constexpr, TEXT: tl.constexpr):
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
def frames_seen(token, span, grid, is_text):
    """One past the last patch that a query sees with causal_time, counted in patches."""
    frame = tl.maximum(grid[1] * grid[2], 1)
    end = tl.minimum(((token - span[2]) // frame + 1) * frame, span[0])
    return tl.where(is_text, span[0], end)


@triton.jit
def exponential(s, scale, base, NATURAL: tl.constexpr):
    """exp of scale * s - base. 16-bit inputs: in base 2, with log2(e) inside the scale and the base.

    float32: in base e, where numbers are smaller and so is the error of their difference.
    """
    x = s * scale - base
    if NATURAL:
        x = x * LOG2E
    return tl.exp2(x)
