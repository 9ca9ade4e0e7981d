"""Which tokens a tile holds and which tiles see one another: arithmetic on coordinates, no N x N mask.

A sequence is two segments: its patches, and its text tokens before or after them. A tile holds BLOCK
tokens of one segment. Text is cut into runs. Patches are cut into runs too, or, with a window, into cubes
of (ct, ch, cw) patches, whose tokens are loaded from where they lie:

    token(t, h, w) = (t * Gh + h) * Gw + w = token(origin of the cube) + token(place in the cube)

so a lane's place is computed once a kernel, and a step of the loop adds one scalar.

Along each axis the windows of a cube's queries a..b cover [start(a), start(b) + w), and all of them share
[start(b), start(a) + w): the key cubes of a query cube are a box, and those inside the common part need no
mask. start() never decreases, so the query cubes that see a key cube are a box as well (`seen_from`).

Inside a cube a mask costs two operations a score. A key is three bits, one for its place along each axis; a
query is the set of the places it doesn't see; the key is hidden if the two meet. Bit 31 hides a lane that
holds no key, and a place past the grid is one that no query sees.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
import triton
import triton.language as tl

# a cube's three sides have to fit into the bits 0 to 30
SIDES = 31
NOTHING = tl.constexpr(-(2**31))

# -- in a kernel ---------------------------------------------------------------------------------------


@triton.jit
def find_sequence(tile, cu_seqlens_ptr, table_ptr, sequences, BLOCK: tl.constexpr, SEGMENTS: tl.constexpr, CUBES: tl.constexpr):  # fmt: skip
    """(sequence, number of the tile in it). Sequence `sequences` is the tail that belongs to none.

    Runs need no table of prefix sums: floor(b / BLOCK) - floor(a / BLOCK) + 1 tiles are always enough for
    the tokens a to b, so that sequence s may begin at tile floor(cu_seqlens[s] / BLOCK) + s.
    """
    low = 0
    high = sequences
    while low < high:
        middle = (low + high + 1) // 2
        if CUBES:
            first = tl.load(table_ptr + middle * 4 + 3)
        else:
            first = tl.load(cu_seqlens_ptr + middle) // BLOCK + middle * SEGMENTS
        low = tl.where(first <= tile, middle, low)
        high = tl.where(first <= tile, high, middle - 1)
    if CUBES:
        first = tl.load(table_ptr + low * 4 + 3)
    else:
        first = tl.load(cu_seqlens_ptr + low) // BLOCK + low * SEGMENTS
    return low, tile - first


@triton.jit
def segments(length, text, text_first):
    """(patches, text, first patch token, first text token) of a sequence."""
    text = tl.minimum(text, length)
    patches = length - text
    return patches, text, text * text_first, patches * (1 - text_first)


@triton.jit
def patch_tiles(patches, grid, cube, BLOCK: tl.constexpr, CUBES: tl.constexpr):
    """How many tiles hold the patches."""
    if CUBES:
        n = tl.cdiv(grid[0], cube[0]) * tl.cdiv(grid[1], cube[1]) * tl.cdiv(grid[2], cube[2])
    else:
        n = tl.cdiv(patches, BLOCK)
    return n


@triton.jit
def place_in(cube, lane):
    """(t, h, w) of a lane in its cube."""
    return lane // (cube[1] * cube[2]), lane // cube[2] % cube[1], lane % cube[2]


@triton.jit
def origin_of(index, first, count, cube):
    """(t, h, w) where cube `index` of a box of cubes begins; the box begins at cube `first`."""
    across = tl.maximum(count[2], 1)
    plane = tl.maximum(count[1], 1) * across
    t = (first[0] + index // plane) * cube[0]
    h = (first[1] + index % plane // across) * cube[1]
    w = (first[2] + index % across) * cube[2]
    return t, h, w


@triton.jit
def tile_origin(tile, grid, cube):
    """(t, h, w) where tile `tile` of the whole grid begins."""
    return origin_of(tile, (0, 0, 0), (0, tl.cdiv(grid[1], cube[1]), tl.cdiv(grid[2], cube[2])), cube)  # fmt: skip


@triton.jit
def token_of(place, grid):
    return (place[0] * grid[1] + place[1]) * grid[2] + place[2]


@triton.jit
def window_start(position, length, window, stride):
    """First position that `position` sees along an axis: its group's leader, centred, clamped."""
    leader = tl.minimum(position // stride * stride + stride // 2, length - 1)
    return tl.minimum(tl.maximum(leader - window // 2, 0), length - window)


@triton.jit
def seen_by(position, grid, window, stride, is_text, CAUSAL: tl.constexpr):
    """(first, end), each (t, h, w): the box of patches that a query at `position` sees."""
    t0 = tl.where(is_text, 0, window_start(position[0], grid[0], window[0], stride[0]))
    h0 = tl.where(is_text, 0, window_start(position[1], grid[1], window[1], stride[1]))
    w0 = tl.where(is_text, 0, window_start(position[2], grid[2], window[2], stride[2]))
    t1 = tl.where(is_text, grid[0], t0 + window[0])
    h1 = tl.where(is_text, grid[1], h0 + window[1])
    w1 = tl.where(is_text, grid[2], w0 + window[2])
    if CAUSAL:
        t1 = tl.where(is_text, t1, tl.minimum(t1, position[0] + 1))
    return (t0, h0, w0), (t1, h1, w1)


@triton.jit
def last_of(origin, grid, cube):
    """(t, h, w) of the last patch of a cube."""
    t = tl.minimum(origin[0] + cube[0], grid[0]) - 1
    h = tl.minimum(origin[1] + cube[1], grid[1]) - 1
    w = tl.minimum(origin[2] + cube[2], grid[2]) - 1
    return t, h, w


@triton.jit
def seen_from_axis(first, last, length, window, stride):
    """(first, end) of the positions whose window meets first..last along an axis."""
    need = first - window + 1  # the least start() that still reaches `first`
    low = tl.cdiv(tl.maximum(need + window // 2 - stride // 2, 0), stride) * stride
    low = tl.where(need <= 0, 0, low)
    high = ((last + window // 2 - stride // 2) // stride + 1) * stride
    everyone = (last >= length - window) | (last + window // 2 >= length - 1)
    return low, tl.where(everyone, length, tl.minimum(high, length))


@triton.jit
def seen_from(origin, grid, window, stride, cube, is_text, CAUSAL: tl.constexpr):
    """(first, end), each (t, h, w): the box of queries of which some see a patch of the key cube."""
    last = last_of(origin, grid, cube)
    t0, t1 = seen_from_axis(origin[0], last[0], grid[0], window[0], stride[0])
    h0, h1 = seen_from_axis(origin[1], last[1], grid[1], window[1], stride[1])
    w0, w1 = seen_from_axis(origin[2], last[2], grid[2], window[2], stride[2])
    if CAUSAL:
        t0 = tl.maximum(t0, origin[0])
    t0, t1 = tl.where(is_text, 0, t0), tl.where(is_text, grid[0], t1)
    h0, h1 = tl.where(is_text, 0, h0), tl.where(is_text, grid[1], h1)
    w0, w1 = tl.where(is_text, 0, w0), tl.where(is_text, grid[2], w1)
    return (t0, h0, w0), (t1, h1, w1)


@triton.jit
def cubes_of(first, end, cube):
    """(first cube, cubes along each axis, cubes in all) of the cubes that meet the box first..end."""
    f = (first[0] // cube[0], first[1] // cube[1], first[2] // cube[2])
    t = tl.maximum(tl.cdiv(end[0], cube[0]) - f[0], 0)
    h = tl.maximum(tl.cdiv(end[1], cube[1]) - f[1], 0)
    w = tl.maximum(tl.cdiv(end[2], cube[2]) - f[2], 0)
    return f, (t, h, w), t * h * w


@triton.jit
def inside_box(origin, cube, first, end):
    """Whether the whole cube lies in the box."""
    yes = (origin[0] >= first[0]) & (origin[0] + cube[0] <= end[0])
    yes &= (origin[1] >= first[1]) & (origin[1] + cube[1] <= end[1])
    return yes & (origin[2] >= first[2]) & (origin[2] + cube[2] <= end[2])


@triton.jit
def lane_bits(place, lane, cube):
    """One bit a lane for its place in the cube along each axis; bit 31 for the lanes that the cube doesn't fill."""
    bits = (1 << place[0]) | (1 << (cube[0] + place[1])) | (1 << (cube[0] + cube[1] + place[2]))
    return tl.where(lane < cube[0] * cube[1] * cube[2], bits, NOTHING)


@triton.jit
def in_grid(bits, origin, grid, cube):
    """Which lanes of the cube at `origin` hold a patch of the grid."""
    return (bits & hidden_bits((0, 0, 0), grid, origin, cube)) == 0


@triton.jit
def axis_bits(first, end, origin, side):
    low = tl.minimum(tl.maximum(first - origin, 0), side)
    high = tl.minimum(tl.maximum(end - origin, 0), side)
    return (1 << high) - (1 << low)


@triton.jit
def hidden_bits(first, end, origin, cube):
    """The places of the cube at `origin` that a query with the box first..end doesn't see; and bit 31."""
    t = axis_bits(first[0], end[0], origin[0], cube[0])
    h = axis_bits(first[1], end[1], origin[1], cube[1])
    w = axis_bits(first[2], end[2], origin[2], cube[2])
    return ~(t | (h << cube[0]) | (w << (cube[0] + cube[1])))


@triton.jit
def _by_axis(axis, values):
    return tl.where(
        axis == 0, values[0], tl.where(axis == 1, values[1], tl.where(axis == 2, values[2], 0))
    )


@triton.jit
def hidden_from_queries(
    q_origin, q_cube, rows, grid, window, stride, k_origin, k_cube, CAUSAL: tl.constexpr
):
    """`hidden_bits` of every query of a cube for one key cube.

    The axes are columns of a [BLOCK, 4] tile that is summed at the end: so each thread works out one axis of
    one query. On vectors the compiler would have every thread work out all of its columns of the scores.
    """
    axis = tl.arange(0, 4)[None, :]
    rows = rows[:, None]
    place = _by_axis(axis, place_in(q_cube, rows))
    length, width = _by_axis(axis, grid), _by_axis(axis, window)
    side, origin = _by_axis(axis, k_cube), _by_axis(axis, k_origin)
    position = _by_axis(axis, q_origin) + place
    first = window_start(position, length, width, tl.maximum(_by_axis(axis, stride), 1))
    end = first + width
    if CAUSAL:
        end = tl.where(axis == 0, tl.minimum(end, position + 1), end)
    shift = tl.where(axis == 1, k_cube[0], tl.where(axis == 2, k_cube[0] + k_cube[1], 0))
    return ~tl.sum(axis_bits(first, end, origin, side) << shift, 1)


# -- on the host ---------------------------------------------------------------------------------------

Triple = tuple[int, int, int]


class Cubes(NamedTuple):
    """Sides of the query tiles and of the key tiles."""

    query: Triple
    key: Triple


@functools.lru_cache(maxsize=256)
def choose_cubes(
    grids: tuple[Triple, ...], window: Triple, stride: Triple, block_q: int, block_k: int
) -> Cubes:
    """The sides for which the fewest pairs of tiles are visited."""
    query, key = _sides(grids, block_q), _sides(grids, block_k)
    visits = np.zeros((len(query), len(key)))
    for grid in set(grids[:16]):
        pairs = np.ones_like(visits)
        for axis in range(3):
            counts = _visits(grid[axis], window[axis], stride[axis])
            pairs *= counts[query[:, axis][:, None], key[:, axis][None, :]]
        visits += pairs
    # among equals: whole blocks, whose tiles inside the window need no mask
    visits -= 1e-3 * (query.prod(1) == block_q)[:, None] + 1e-3 * (key.prod(1) == block_k)[None]
    best_q, best_k = np.unravel_index(int(visits.argmin()), visits.shape)
    return Cubes(_triple(query[best_q]), _triple(key[best_k]))


def _triple(sides: np.ndarray) -> Triple:
    t, h, w = (int(side) for side in sides)
    return t, h, w


def _sides(grids: Sequence[Triple], block: int) -> np.ndarray:
    """Every (ct, ch, cw) that fits the block, the bits and the grids, and can't be made longer."""
    most = [max(1, min(SIDES - 2, max(grid[axis] for grid in grids))) for axis in range(3)]
    found = []
    for ct, ch in product(range(1, most[0] + 1), range(1, most[1] + 1)):
        cw = min(block // (ct * ch), SIDES - ct - ch, most[2])
        if cw > 0:
            found.append((ct, ch, cw))
            # a shorter last side may divide the grid
            found += [(ct, ch, w) for w in range(max(1, cw // 2), cw)]
    return np.array(found)


@functools.lru_cache(maxsize=256)
def _visits(length: int, window: int, stride: int) -> np.ndarray:
    """[query side, key side] -> pairs of tiles along one axis that see one another."""
    counts = np.zeros((SIDES, SIDES))
    if not length:
        return counts
    position = np.arange(length)
    leader = np.minimum(position // stride * stride + stride // 2, length - 1)
    start = np.minimum(np.maximum(leader - window // 2, 0), length - window)
    for side in range(1, SIDES):
        first = start[::side]
        end = start[np.minimum(np.arange(0, length, side) + side, length) - 1] + window
        for other in range(1, SIDES):
            counts[side, other] = (-(-end // other) - first // other).sum()
    return counts


def count_tiles(grid: Triple, cube: Triple) -> int:
    t, h, w = (-(-length // side) for length, side in zip(grid, cube, strict=True))
    return t * h * w
