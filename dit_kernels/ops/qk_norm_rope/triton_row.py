"""A row of q or k in the Triton kernels: its pairs of channels, how they are loaded, stored and normed.

A row is held as the pairs (a, b) that turn together, so that norm, activation and rotation stay in
registers: with adjacent pairs a tile [BLOCK_N, heads, 2 P] is loaded 16 bytes a thread and split, with
halves a and b are two such loads. PARTS cuts heads and pairs into powers of two (72 = 64 + 8), each as
(first head, heads, first pair, pairs). A program owns some tokens of some heads (over="head") or all heads
(over="hidden") and walks over tiles of BLOCK_N tokens.
"""

# Triton gives its functions no types
# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

_SIZES = [
    "q_programs", "q_N", "k_N", "q_chunks", "k_chunks", "q_chunk", "k_chunk", "start", "length", "samples", "eps",
    *(f"{t}_s{axis}" for t in ("q", "k", "dq", "dk", "angle") for axis in "bnhdr"),
]  # fmt: skip

# The geometry of a row, the same in every function below: D channels in SECTIONS parts, of each of which
# the first 2R / SECTIONS channels turn; pairs are adjacent, or with HALF they are (i, i + R / SECTIONS).


@triton.constexpr_function
def _part(PARTS, i):
    return PARTS[i]


@triton.constexpr_function
def _one_row(PARTS, i):
    """The same pairs of a single head."""
    return (0, 1, *PARTS[i][2:])


@triton.constexpr_function
def _heads(PARTS):
    return PARTS[0][1]


@triton.jit
def _pairs(
    PART: tl.constexpr, D: tl.constexpr, SECTIONS: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr
):
    """Of each pair of a part: the channels a and b and whether they exist, its angle and whether it turns."""
    W: tl.constexpr = D // SECTIONS
    TURN: tl.constexpr = R // SECTIONS
    EACH: tl.constexpr = (W + 1) // 2
    p = PART[2] + tl.arange(0, PART[3])
    a_live = p < SECTIONS * EACH
    if SECTIONS == 1:
        first = 0
        i = p
    else:
        first = p // EACH * W
        i = p % EACH
    if not HALF:
        a = first + 2 * i
        b = a + 1
    elif 2 * TURN == W:
        a = first + i
        b = a + TURN
    else:
        # the channels that do not turn are paired too, at the distance that covers them
        a = first + tl.where(i < TURN, i, i + TURN)
        b = first + tl.where(i < TURN, i + TURN, i + EACH)
    b_live = a_live
    if W % 2 == 1:
        b_live = a_live & (b < first + W)
    if TURN == EACH:
        return a, b, a_live, b_live, p, a_live
    return a, b, a_live, b_live, p // EACH * TURN + i, a_live & (i < TURN)


@triton.constexpr_function
def _adjacent(D, SECTIONS, HALF):
    return not HALF and D // SECTIONS % 2 == 0


@triton.constexpr_function
def _full(PART, H, D, SECTIONS):
    """Whether a part has no padding."""
    W = D // SECTIONS
    return (PART[0] + PART[1] <= H) and (PART[2] + PART[3] <= SECTIONS * W // 2) and W % 2 == 0


@triton.jit
def _split(x):
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1], x.shape[2] // 2, 2)))


@triton.jit
def _load(
    ptr, rows, live, h0, stride_h, stride_d, PART: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    SECTIONS: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """rows [N]: element offsets -> (a, b) [N, heads, pairs] float32, 0 where there is nothing."""
    h = h0 + PART[0] + tl.arange(0, PART[1])
    at = rows[:, None, None] + (h.to(tl.int64) * stride_h)[None, :, None]
    mask = live[:, None, None] & (h < H)[None, :, None]
    if UNIT and _adjacent(D, SECTIONS, HALF):
        c = 2 * PART[2] + tl.arange(0, 2 * PART[3])
        if 2 * (PART[2] + PART[3]) > D:
            mask = mask & (c < D)[None, None, :]
        return _split(tl.load(ptr + at + c[None, None, :], mask=mask, other=0.0).to(tl.float32))
    else:
        a, b, a_live, b_live, _, _ = _pairs(PART, D, SECTIONS, R, HALF)
        if not UNIT:
            a = a.to(tl.int64) * stride_d
            b = b.to(tl.int64) * stride_d
        xa = tl.load(ptr + at + a[None, None, :], mask=mask & a_live[None, None, :], other=0.0)
        xb = tl.load(ptr + at + b[None, None, :], mask=mask & b_live[None, None, :], other=0.0)
        return xa.to(tl.float32), xb.to(tl.float32)


@triton.jit
def _store(
    ptr, rows, live, h0, xa, xb, PART: tl.constexpr, H: tl.constexpr, D: tl.constexpr, SECTIONS: tl.constexpr,
    R: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """rows [N]: element offsets; heads [H, D] contiguous."""
    dtype = ptr.dtype.element_ty
    h = h0 + PART[0] + tl.arange(0, PART[1])
    at = rows[:, None, None] + (h * D)[None, :, None]
    mask = live[:, None, None] & (h < H)[None, :, None]
    if _adjacent(D, SECTIONS, HALF):
        c = 2 * PART[2] + tl.arange(0, 2 * PART[3])
        if 2 * (PART[2] + PART[3]) > D:
            mask = mask & (c < D)[None, None, :]
        x = tl.reshape(tl.join(xa, xb), (xa.shape[0], xa.shape[1], 2 * xa.shape[2]))
        tl.store(ptr + at + c[None, None, :], x.to(dtype), mask=mask)
    else:
        a, b, a_live, b_live, _, _ = _pairs(PART, D, SECTIONS, R, HALF)
        tl.store(ptr + at + a[None, None, :], xa.to(dtype), mask=mask & a_live[None, None, :])
        tl.store(ptr + at + b[None, None, :], xb.to(dtype), mask=mask & b_live[None, None, :])


@triton.jit
def _load_weight(
    ptr, h0, PARTS: tl.constexpr, H: tl.constexpr, D: tl.constexpr, SECTIONS: tl.constexpr, R: tl.constexpr,
    HALF: tl.constexpr, HIDDEN: tl.constexpr,
):  # fmt: skip
    """[D] -> [1, 1, pairs], or [H * D] -> [1, heads, pairs]: a, b of part i at 2i and 2i + 1; () of None."""
    values = ()
    if ptr is not None:
        rows = tl.zeros([1], tl.int64)
        live = tl.full([1], 1, tl.int1)
        for i in tl.static_range(len(PARTS)):
            if HIDDEN:
                a, b = _load(
                    ptr, rows, live, h0, D, 1, _part(PARTS, i), H, D, SECTIONS, R, HALF, True
                )
            else:
                a, b = _load(
                    ptr, rows, live, 0, 0, 1, _one_row(PARTS, i), 1, D, SECTIONS, R, HALF, True
                )
            values = values + (a, b)
    return values


@triton.jit
def _load_angles(
    cos_ptr, sin_ptr, rows, live, h0, stride_h, stride_r, PART: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    SECTIONS: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, UNIT: tl.constexpr,
    PERIOD: tl.constexpr,
):  # fmt: skip
    """cos and sin [N, 1 or heads, pairs] float32, and where they turn."""
    _, _, _, _, angle, turns = _pairs(PART, D, SECTIONS, R, HALF)
    if PERIOD != R:
        angle = angle % PERIOD
    mask = live[:, None, None] & turns[None, None, :]
    if not UNIT:
        angle = angle.to(tl.int64) * stride_r
    at = rows[:, None, None] + angle[None, None, :]
    if HEADS:
        h = h0 + PART[0] + tl.arange(0, PART[1])
        at = at + (h.to(tl.int64) * stride_h)[None, :, None]
        mask = mask & (h < H)[None, :, None]
    cos = tl.load(cos_ptr + at, mask=mask, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + at, mask=mask, other=0.0).to(tl.float32)
    return cos, sin, mask


@triton.jit
def _row_sum(x, HIDDEN: tl.constexpr):
    """[N, heads, pairs] -> [N, heads or 1, 1]"""
    x = tl.sum(x, axis=2, keep_dims=True)
    if HIDDEN:
        x = tl.sum(x, axis=1, keep_dims=True)
    return x


@triton.jit
def _zero_pad(
    xa, xb, h0, PART: tl.constexpr, H: tl.constexpr, D: tl.constexpr, SECTIONS: tl.constexpr, R: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    if _full(PART, H, D, SECTIONS):
        return xa, xb
    else:
        _, _, a_live, b_live, _, _ = _pairs(PART, D, SECTIONS, R, HALF)
        h_live = (h0 + PART[0] + tl.arange(0, PART[1]) < H)[None, :, None]
        xa = tl.where(h_live & a_live[None, None, :], xa, 0.0)
        return xa, tl.where(h_live & b_live[None, None, :], xb, 0.0)


@triton.jit
def _rounded(x, DTYPE: tl.constexpr, EAGER: tl.constexpr):
    if EAGER:
        return x.to(DTYPE).to(tl.float32)
    return x


@triton.jit
def _affine(
    x, weight, bias, i: tl.constexpr, RMS: tl.constexpr, DTYPE: tl.constexpr, SAME: tl.constexpr,
    RELU: tl.constexpr, EAGER: tl.constexpr,
):  # fmt: skip
    """What follows the normalisation; SAME: weight and bias have x's dtype."""
    if len(weight) > 0:
        x = x * weight[i]
    if len(bias) > 0:
        if RMS and SAME:
            x = _rounded(x, DTYPE, EAGER)  # torch's rms_norm has no bias: two ops
        x = x + bias[i]
    x = _rounded(x, DTYPE, EAGER)
    if RELU:
        x = tl.where(x < 0.0, 0.0, x)
    return x


@triton.constexpr_function
def _same(dtype, weight_ptr, bias_ptr):
    return all(p is None or p.dtype.element_ty == dtype for p in (weight_ptr, bias_ptr))


@triton.jit
def _position(p, N, chunks, chunk, BLOCKS: tl.constexpr, HEADS: tl.constexpr):
    """Program p: its sample, first and last token, first head."""
    rest = p // BLOCKS
    n0 = rest % chunks * chunk
    return (rest // chunks).to(tl.int64), n0, tl.minimum(n0 + chunk, N), p % BLOCKS * HEADS
