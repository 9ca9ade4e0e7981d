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

# Triton gives its functions no types
# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl


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
