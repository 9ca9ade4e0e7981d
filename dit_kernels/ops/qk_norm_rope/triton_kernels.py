"""QK-norm and rotary embedding in Triton: one launch for q and k, straight from a packed projection.

    n = act(norm(x) * weight + bias);   (a, b) -> (a cos - b sin, a sin + b cos)

Bytes moved, with X = one token tensor: forward 4X (q and k read and written), backward 6X.

A row is held as the pairs (a, b) that turn together, so that norm, activation and rotation stay in
registers: with adjacent pairs a tile [BLOCK_N, heads, 2 P] is loaded 16 bytes a thread and split, with
halves a and b are two such loads. PARTS cuts heads and pairs into powers of two (72 = 64 + 8), each as
(first head, heads, first pair, pairs). A program owns some tokens of some heads (over="head") or all heads
(over="hidden") and walks over tiles of BLOCK_N tokens.

The backward recomputes from x and the saved statistics. Weight and bias gradients are one float32 row a
program, added by `triton_rows.add_rows`; the gradients of cos and sin, which few models learn, are a kernel
of their own whose programs each own some angles and visit samples and heads in order. Nothing is atomic.
"""

from __future__ import annotations

import triton
import triton.language as tl

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


_SIZES = [
    "q_programs", "q_N", "k_N", "q_chunks", "k_chunks", "q_chunk", "k_chunk", "start", "length", "samples", "eps",
    *(f"{t}_s{axis}" for t in ("q", "k", "dq", "dk", "angle") for axis in "bnhdr"),
]  # fmt: skip


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


@triton.jit
def _statistics(
    mean_ptr, rstd_ptr, token, live, h0, PARTS: tl.constexpr, H: tl.constexpr, HIDDEN: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """The saved (mean, rstd), [N, heads or 1, 1]."""
    mean = 0.0
    rstd = 1.0
    if NORM != "none":
        if HIDDEN:
            at = token[:, None, None]
            mask = live[:, None, None]
        else:
            h = h0 + tl.arange(0, _heads(PARTS))
            at = (token * H)[:, None, None] + h[None, :, None]
            mask = live[:, None, None] & (h < H)[None, :, None]
        rstd = tl.load(rstd_ptr + at, mask=mask, other=0.0)
        if NORM == "layer":
            mean = tl.load(mean_ptr + at, mask=mask, other=0.0)
    return mean, rstd


@triton.jit
def _normalised(
    x_ptr, rows, live, h0, stride_h, stride_d, mean, rstd, PART: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    SECTIONS: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, UNIT: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    xa, xb = _load(x_ptr, rows, live, h0, stride_h, stride_d, PART, H, D, SECTIONS, R, HALF, UNIT)
    if NORM == "layer":
        xa, xb = _zero_pad(xa - mean, xb - mean, h0, PART, H, D, SECTIONS, R, HALF)
    if NORM != "none":
        xa = xa * rstd
        xb = xb * rstd
    return xa, xb


@triton.jit
def _zero(PART: tl.constexpr, BLOCK_N: tl.constexpr):
    HEADS: tl.constexpr = PART[1]
    PAIRS: tl.constexpr = PART[3]
    return tl.zeros([BLOCK_N, HEADS, PAIRS], tl.float32)


@triton.jit
def _zeros(PARTS: tl.constexpr, BLOCK_N: tl.constexpr):
    values = ()
    for i in tl.static_range(len(PARTS)):
        zero = _zero(_part(PARTS, i), BLOCK_N)
        values = values + (zero, zero)
    return values


@triton.jit
def _store_sums(
    ptr, row, sums, h0, PARTS: tl.constexpr, H: tl.constexpr, D: tl.constexpr, SECTIONS: tl.constexpr,
    R: tl.constexpr, HALF: tl.constexpr, HIDDEN: tl.constexpr,
):  # fmt: skip
    if ptr is not None:
        live = tl.full([1], 1, tl.int1)
        for i in tl.static_range(len(PARTS)):
            sa = tl.sum(sums[2 * i], axis=0, keep_dims=True)
            sb = tl.sum(sums[2 * i + 1], axis=0, keep_dims=True)
            if HIDDEN:
                rows = tl.full([1], row * (H * D), tl.int64)
                _store(ptr, rows, live, h0, sa, sb, _part(PARTS, i), H, D, SECTIONS, R, HALF)
            else:
                sa = tl.sum(sa, axis=1, keep_dims=True)
                sb = tl.sum(sb, axis=1, keep_dims=True)
                rows = tl.full([1], row * D, tl.int64)
                _store(ptr, rows, live, 0, sa, sb, _one_row(PARTS, i), 1, D, SECTIONS, R, HALF)


@triton.jit
def _backward(
    p, dy_ptr, x_ptr, dx_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, weight_sums_ptr, bias_sums_ptr,
    cos_ptr, sin_ptr, N, chunks, chunk,
    stride_b, stride_n, stride_h, stride_d, dy_sb, dy_sn, dy_sh, dy_sd,
    start, length, angle_sb, angle_sn, angle_sh, angle_sr,
    H: tl.constexpr, BLOCKS: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr, VEC: tl.constexpr,
    D: tl.constexpr, SECTIONS: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, UNIT: tl.constexpr,
    DY_VEC: tl.constexpr, DY_UNIT: tl.constexpr,
    A_VEC: tl.constexpr, A_HEADS: tl.constexpr, A_UNIT: tl.constexpr, A_PERIOD: tl.constexpr,
    NORM: tl.constexpr, HIDDEN: tl.constexpr, RELU: tl.constexpr, EAGER: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    SAME: tl.constexpr = _same(DTYPE, weight_ptr, bias_ptr)
    COUNT: tl.constexpr = H * D if HIDDEN else D
    b, n0, n1, h0 = _position(p, N, chunks, chunk, BLOCKS, _heads(PARTS))
    weight = _load_weight(weight_ptr, h0, PARTS, H, D, SECTIONS, R, HALF, HIDDEN)
    if RELU:
        bias = _load_weight(bias_ptr, h0, PARTS, H, D, SECTIONS, R, HALF, HIDDEN)
    if weight_sums_ptr is not None:
        weight_sums = _zeros(PARTS, BLOCK_N)
    if bias_sums_ptr is not None:
        bias_sums = _zeros(PARTS, BLOCK_N)
    for first in tl.range(n0, n1, BLOCK_N, num_stages=2):
        n = first + tl.arange(0, BLOCK_N)
        live = n < n1
        token = b * N + n
        rows = b * (stride_b * VEC) + n * (stride_n * VEC)
        dy_rows = b * (dy_sb * DY_VEC) + n * (dy_sn * DY_VEC)
        mean, rstd = _statistics(mean_ptr, rstd_ptr, token, live, h0, PARTS, H, HIDDEN, NORM)
        window = live & (n >= start) & (n < start + length)
        angle_rows = b * (angle_sb * A_VEC) + (n - start).to(tl.int64) * (angle_sn * A_VEC)
        x = ()
        dn = ()
        for i in tl.static_range(len(PARTS)):
            ga, gb = _load(
                dy_ptr,
                dy_rows,
                live,
                h0,
                dy_sh * DY_VEC,
                dy_sd,
                _part(PARTS, i),
                H,
                D,
                SECTIONS,
                R,
                HALF,
                DY_UNIT,
            )
            if cos_ptr is not None:
                cos, sin, turns = _load_angles(
                    cos_ptr, sin_ptr, angle_rows, window, h0, angle_sh * A_VEC, angle_sr, _part(PARTS, i), H, D, SECTIONS, R,
                    HALF, A_HEADS, A_UNIT, A_PERIOD,
                )  # fmt: skip
                da = tl.where(turns, ga * cos + gb * sin, ga)
                db = tl.where(turns, gb * cos - ga * sin, gb)
            else:
                da = ga
                db = gb
            if NORM != "none" or RELU:
                xa, xb = _normalised(
                    x_ptr, rows, live, h0, stride_h * VEC, stride_d, mean, rstd, _part(PARTS, i), H, D, SECTIONS, R, HALF,
                    UNIT, NORM,
                )  # fmt: skip
                x = x + (xa, xb)
                if RELU:
                    na = _affine(xa, weight, bias, 2 * i, NORM == "rms", DTYPE, SAME, False, EAGER)
                    nb = _affine(
                        xb, weight, bias, 2 * i + 1, NORM == "rms", DTYPE, SAME, False, EAGER
                    )
                    da = tl.where(na > 0.0, da, 0.0)
                    db = tl.where(nb > 0.0, db, 0.0)
            dn = dn + (da, db)
        if weight_sums_ptr is not None:
            new = ()
            for i in tl.static_range(2 * len(PARTS)):
                new = new + (weight_sums[i] + dn[i] * x[i],)
            weight_sums = new
        if bias_sums_ptr is not None:
            new = ()
            for i in tl.static_range(2 * len(PARTS)):
                new = new + (bias_sums[i] + dn[i],)
            bias_sums = new
        if dx_ptr is not None:
            if NORM != "none":
                if weight_ptr is not None:
                    new = ()
                    for i in tl.static_range(2 * len(PARTS)):
                        new = new + (dn[i] * weight[i],)
                    dn = new
                along = _row_sum(dn[0] * x[0] + dn[1] * x[1], HIDDEN)
                for i in tl.static_range(1, len(PARTS)):
                    along += _row_sum(dn[2 * i] * x[2 * i] + dn[2 * i + 1] * x[2 * i + 1], HIDDEN)
                along = along / COUNT
                if NORM == "layer":
                    centre = _row_sum(dn[0] + dn[1], HIDDEN)
                    for i in tl.static_range(1, len(PARTS)):
                        centre += _row_sum(dn[2 * i] + dn[2 * i + 1], HIDDEN)
                    centre = centre / COUNT
            for i in tl.static_range(len(PARTS)):
                da = dn[2 * i]
                db = dn[2 * i + 1]
                if NORM != "none":
                    da = da - x[2 * i] * along
                    db = db - x[2 * i + 1] * along
                    if NORM == "layer":
                        da = da - centre
                        db = db - centre
                    da = da * rstd
                    db = db * rstd
                _store(
                    dx_ptr,
                    token * (H * D),
                    live,
                    h0,
                    da,
                    db,
                    _part(PARTS, i),
                    H,
                    D,
                    SECTIONS,
                    R,
                    HALF,
                )
    if weight_sums_ptr is not None:
        _store_sums(
            weight_sums_ptr, p.to(tl.int64), weight_sums, h0, PARTS, H, D, SECTIONS, R, HALF, HIDDEN
        )
    if bias_sums_ptr is not None:
        _store_sums(
            bias_sums_ptr, p.to(tl.int64), bias_sums, h0, PARTS, H, D, SECTIONS, R, HALF, HIDDEN
        )


@triton.jit(do_not_specialize=_SIZES)
def qk_norm_rope_bwd_kernel(
    dq_out_ptr, dk_out_ptr,  # gradients of the outputs, [B, N, H, D], strided
    q_ptr, k_ptr,  # [B, N, H, D], strided
    dq_ptr, dk_ptr,  # contiguous, or None
    q_mean_ptr, q_rstd_ptr, k_mean_ptr, k_rstd_ptr,  # [B, N, H] or [B, N] float32
    q_weight_ptr, q_bias_ptr, k_weight_ptr, k_bias_ptr,  # [D] or [H * D]
    q_weight_sums_ptr, q_bias_sums_ptr, k_weight_sums_ptr, k_bias_sums_ptr,  # a row a program, or None
    cos_ptr, sin_ptr,  # [1|B, L, 1|H, R] by their strides
    q_programs: tl.int32, q_N: tl.int32, k_N: tl.int32, q_chunks: tl.int32, k_chunks: tl.int32,
    q_chunk: tl.int32, k_chunk: tl.int32,
    q_sb: tl.int64, q_sn: tl.int64, q_sh: tl.int64, q_sd: tl.int64,
    k_sb: tl.int64, k_sn: tl.int64, k_sh: tl.int64, k_sd: tl.int64,
    dq_sb: tl.int64, dq_sn: tl.int64, dq_sh: tl.int64, dq_sd: tl.int64,
    dk_sb: tl.int64, dk_sn: tl.int64, dk_sh: tl.int64, dk_sd: tl.int64,
    start: tl.int32, length: tl.int32, angle_sb: tl.int64, angle_sn: tl.int64, angle_sh: tl.int64, angle_sr: tl.int64,
    Q_HEADS: tl.constexpr, Q_BLOCKS: tl.constexpr, Q_PARTS: tl.constexpr, Q_BLOCK_N: tl.constexpr,
    K_HEADS: tl.constexpr, K_BLOCKS: tl.constexpr, K_PARTS: tl.constexpr, K_BLOCK_N: tl.constexpr,
    VEC: tl.constexpr, D: tl.constexpr, SECTIONS: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr,
    UNIT: tl.constexpr, DY_VEC: tl.constexpr, DY_UNIT: tl.constexpr,
    A_VEC: tl.constexpr, A_HEADS: tl.constexpr, A_UNIT: tl.constexpr, A_PERIOD: tl.constexpr,
    NORM: tl.constexpr, HIDDEN: tl.constexpr, RELU: tl.constexpr, EAGER: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0)
    if p < q_programs:
        if dq_out_ptr is not None:
            _backward(
                p, dq_out_ptr, q_ptr, dq_ptr, q_mean_ptr, q_rstd_ptr, q_weight_ptr, q_bias_ptr, q_weight_sums_ptr,
                q_bias_sums_ptr, cos_ptr, sin_ptr, q_N, q_chunks, q_chunk,
                q_sb, q_sn, q_sh, q_sd, dq_sb, dq_sn, dq_sh, dq_sd,
                start, length, angle_sb, angle_sn, angle_sh, angle_sr, Q_HEADS, Q_BLOCKS, Q_PARTS, Q_BLOCK_N, VEC,
                D, SECTIONS, R, HALF, UNIT, DY_VEC, DY_UNIT, A_VEC, A_HEADS, A_UNIT, A_PERIOD, NORM, HIDDEN, RELU, EAGER,
            )  # fmt: skip
    else:
        if dk_out_ptr is not None:
            _backward(
                p - q_programs, dk_out_ptr, k_ptr, dk_ptr, k_mean_ptr, k_rstd_ptr, k_weight_ptr, k_bias_ptr,
                k_weight_sums_ptr, k_bias_sums_ptr, cos_ptr, sin_ptr, k_N, k_chunks, k_chunk,
                k_sb, k_sn, k_sh, k_sd, dk_sb, dk_sn, dk_sh, dk_sd,
                start, length, angle_sb, angle_sn, angle_sh, angle_sr, K_HEADS, K_BLOCKS, K_PARTS, K_BLOCK_N, VEC,
                D, SECTIONS, R, HALF, UNIT, DY_VEC, DY_UNIT, A_VEC, A_HEADS, A_UNIT, A_PERIOD, NORM, HIDDEN, RELU, EAGER,
            )  # fmt: skip


@triton.jit
def _angle_sums(
    dcos, dsin, dy_ptr, x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, n, window, b0, b1, first_head, N,
    stride_b, stride_n, stride_h, stride_d, dy_sb, dy_sn, dy_sh, dy_sd,
    H: tl.constexpr, PARTS: tl.constexpr, VEC: tl.constexpr,
    D: tl.constexpr, SECTIONS: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, UNIT: tl.constexpr,
    DY_VEC: tl.constexpr, DY_UNIT: tl.constexpr, A_HEADS: tl.constexpr,
    NORM: tl.constexpr, HIDDEN: tl.constexpr, RELU: tl.constexpr, EAGER: tl.constexpr,
):  # fmt: skip
    """Adds q's or k's share of the angles' gradients, [N, heads, pairs] a part: dcos = ga a + gb b, dsin = gb a - ga b."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    SAME: tl.constexpr = _same(DTYPE, weight_ptr, bias_ptr)
    BLOCKS: tl.constexpr = 1 if A_HEADS else (H + _heads(PARTS) - 1) // _heads(PARTS)
    for visit in range(0, (b1 - b0) * BLOCKS):
        b = (b0 + visit // BLOCKS).to(tl.int64)
        h0 = first_head + visit % BLOCKS * _heads(PARTS)
        token = b * N + n
        rows = b * (stride_b * VEC) + n * (stride_n * VEC)
        dy_rows = b * (dy_sb * DY_VEC) + n * (dy_sn * DY_VEC)
        weight = _load_weight(weight_ptr, h0, PARTS, H, D, SECTIONS, R, HALF, HIDDEN)
        bias = _load_weight(bias_ptr, h0, PARTS, H, D, SECTIONS, R, HALF, HIDDEN)
        mean, rstd = _statistics(mean_ptr, rstd_ptr, token, window, h0, PARTS, H, HIDDEN, NORM)
        new_cos = ()
        new_sin = ()
        for i in tl.static_range(len(PARTS)):
            ga, gb = _load(
                dy_ptr,
                dy_rows,
                window,
                h0,
                dy_sh * DY_VEC,
                dy_sd,
                _part(PARTS, i),
                H,
                D,
                SECTIONS,
                R,
                HALF,
                DY_UNIT,
            )
            xa, xb = _normalised(
                x_ptr, rows, window, h0, stride_h * VEC, stride_d, mean, rstd, _part(PARTS, i), H, D, SECTIONS, R, HALF, UNIT,
                NORM,
            )  # fmt: skip
            xa = _affine(xa, weight, bias, 2 * i, NORM == "rms", DTYPE, SAME, RELU, EAGER)
            xb = _affine(xb, weight, bias, 2 * i + 1, NORM == "rms", DTYPE, SAME, RELU, EAGER)
            new_cos = new_cos + (dcos[i] + (ga * xa + gb * xb),)
            new_sin = new_sin + (dsin[i] + (gb * xa - ga * xb),)
        dcos = new_cos
        dsin = new_sin
    return dcos, dsin


@triton.jit
def _store_angles(
    ptr, sums, rows, window, first_head, PARTS: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    SECTIONS: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr, A_HEADS: tl.constexpr,
):  # fmt: skip
    """rows [N]: element offsets of [1 or H, R], contiguous."""
    if ptr is not None:
        for i in tl.static_range(len(PARTS)):
            _, _, _, _, angle, turns = _pairs(_part(PARTS, i), D, SECTIONS, R, HALF)
            at = rows[:, None, None] + angle[None, None, :]
            mask = window[:, None, None] & turns[None, None, :]
            total = sums[i]
            if A_HEADS:
                h = first_head + tl.arange(0, _heads(PARTS))
                at = at + (h * R)[None, :, None]
                mask = mask & (h < H)[None, :, None]
            else:
                total = tl.sum(total, axis=1, keep_dims=True)
            tl.store(ptr + at, total.to(ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def qk_norm_rope_bwd_angles_kernel(
    dq_out_ptr, dk_out_ptr,  # gradients of the outputs, [B, N, H, D], strided, or None
    q_ptr, k_ptr,  # [B, N, H, D], strided
    q_mean_ptr, q_rstd_ptr, k_mean_ptr, k_rstd_ptr,  # [B, N, H] or [B, N] float32
    q_weight_ptr, q_bias_ptr, k_weight_ptr, k_bias_ptr,  # [D] or [H * D]
    dcos_ptr, dsin_ptr,  # [A, L, 1|H, R], contiguous; a program owns BLOCK_N of L, and all heads or some
    q_N: tl.int32, k_N: tl.int32, start: tl.int32, length: tl.int32, samples: tl.int32,
    q_sb: tl.int64, q_sn: tl.int64, q_sh: tl.int64, q_sd: tl.int64,
    k_sb: tl.int64, k_sn: tl.int64, k_sh: tl.int64, k_sd: tl.int64,
    dq_sb: tl.int64, dq_sn: tl.int64, dq_sh: tl.int64, dq_sd: tl.int64,
    dk_sb: tl.int64, dk_sn: tl.int64, dk_sh: tl.int64, dk_sd: tl.int64,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr,
    VEC: tl.constexpr, D: tl.constexpr, SECTIONS: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr,
    UNIT: tl.constexpr, DY_VEC: tl.constexpr, DY_UNIT: tl.constexpr, A_HEADS: tl.constexpr,
    NORM: tl.constexpr, HIDDEN: tl.constexpr, RELU: tl.constexpr, EAGER: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first_head = tl.program_id(1) * _heads(PARTS)
    b0 = tl.program_id(2) * samples
    b1 = b0 + samples
    window = row < length
    n = start + row
    dcos = ()
    for i in tl.static_range(len(PARTS)):
        dcos = dcos + (_zero(_part(PARTS, i), BLOCK_N),)
    dsin = dcos
    if dq_out_ptr is not None:
        dcos, dsin = _angle_sums(
            dcos, dsin, dq_out_ptr, q_ptr, q_mean_ptr, q_rstd_ptr, q_weight_ptr, q_bias_ptr, n, window, b0, b1,
            first_head, q_N, q_sb, q_sn, q_sh, q_sd, dq_sb, dq_sn, dq_sh, dq_sd, Q_HEADS, PARTS, VEC,
            D, SECTIONS, R, HALF, UNIT, DY_VEC, DY_UNIT, A_HEADS, NORM, HIDDEN, RELU, EAGER,
        )  # fmt: skip
    if dk_out_ptr is not None:
        dcos, dsin = _angle_sums(
            dcos, dsin, dk_out_ptr, k_ptr, k_mean_ptr, k_rstd_ptr, k_weight_ptr, k_bias_ptr, n, window, b0, b1,
            first_head, k_N, k_sb, k_sn, k_sh, k_sd, dk_sb, dk_sn, dk_sh, dk_sd, K_HEADS, PARTS, VEC,
            D, SECTIONS, R, HALF, UNIT, DY_VEC, DY_UNIT, A_HEADS, NORM, HIDDEN, RELU, EAGER,
        )  # fmt: skip
    rows = tl.program_id(2).to(tl.int64) * length + row
    rows = rows * (Q_HEADS * R if A_HEADS else R)
    _store_angles(
        dcos_ptr, dcos, rows, window, first_head, PARTS, Q_HEADS, D, SECTIONS, R, HALF, A_HEADS
    )
    _store_angles(
        dsin_ptr, dsin, rows, window, first_head, PARTS, Q_HEADS, D, SECTIONS, R, HALF, A_HEADS
    )
