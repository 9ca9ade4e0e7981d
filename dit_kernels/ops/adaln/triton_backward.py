"""The backward kernels of adaLN in Triton: gradients of the tokens and partial sums, then their second stage.

A program walks over its chunk of tokens as the forward's does, and keeps the sums over them in registers.
"""

# Annotations must stay objects: Triton reads them; and Triton has no types.
# mypy: ignore-errors

import triton
import triton.language as tl

from dit_kernels.ops.adaln.triton_row import (
    _SIZES,
    _activate,
    _affine,
    _load,
    _load_vector,
    _modulation,
    _one_plus,
    _plus,
    _row_sum,
    _row_sums,
    _scaled,
    _store,
    _tanh,
)


@triton.jit
def _zeros(P: tl.constexpr):
    return tl.zeros([P], tl.float32)


@triton.jit
def _sums(ptr, PARTS: tl.constexpr):
    sums = ()
    if ptr is not None:
        for i in tl.static_range(len(PARTS)):
            sums = sums + (_zeros(PARTS[i]),)
    return sums


@triton.jit
def _store_sums(ptr, program, sums, C: tl.constexpr, PARTS: tl.constexpr):
    """One row of sums, for the second stage, or of the gradient itself."""
    if ptr is not None:
        _store(ptr, program.to(tl.int64) * C, sums, C, PARTS)


@triton.jit(do_not_specialize=_SIZES)
def adaln_bwd_kernel(
    dout_ptr, dy_ptr, dy2_ptr,  # gradients of the outputs, [B, N, C] or None
    x_ptr,  # [B, N, C]: what was normalised
    branch_ptr,  # [B, N, C]
    gate_ptr, gate_table_ptr, branch_weight_ptr,
    scale_ptr, scale_table_ptr, scale2_ptr,
    weight_ptr, bias_ptr,  # [C]
    branch_rstd_ptr, mean_ptr, rstd_ptr,  # [B, N] float32
    order_ptr,  # [B * N]: the tokens sorted by row, with SORTED; then a row, its first and last position a program
    row_ptr, begin_ptr, end_ptr,  # [programs]
    dresidual_ptr, dbranch_ptr,  # [B, N, C], contiguous; dresidual is dx where there is no residual
    dgate_ptr, dshift_ptr, dscale_ptr, dshift2_ptr, dscale2_ptr,  # [B, N, C]: of a row a token
    gate_sums_ptr, shift_sums_ptr, scale_sums_ptr, shift2_sums_ptr, scale2_sums_ptr,  # [programs, C]
    branch_weight_sums_ptr, weight_sums_ptr, bias_sums_ptr,
    N: tl.int32, per_sample: tl.int32, segment: tl.int32, chunks: tl.int32, chunk: tl.int32,
    dout_sb: tl.int64, dout_sn: tl.int64, dout_sc: tl.int64,
    dy_sb: tl.int64, dy_sn: tl.int64, dy_sc: tl.int64,
    dy2_sb: tl.int64, dy2_sn: tl.int64, dy2_sc: tl.int64,
    x_sb: tl.int64, x_sn: tl.int64, x_sc: tl.int64,
    branch_sb: tl.int64, branch_sn: tl.int64, branch_sc: tl.int64,
    gate_sb: tl.int64, gate_sg: tl.int64, gate_sc: tl.int64, gate_len: tl.int32,
    scale_sb: tl.int64, scale_sg: tl.int64, scale_sc: tl.int64, scale_len: tl.int32,
    scale2_sb: tl.int64, scale2_sg: tl.int64, scale2_sc: tl.int64, scale2_len: tl.int32,
    C: tl.constexpr, PARTS: tl.constexpr, VEC: tl.constexpr, UNIT: tl.constexpr,
    NORM: tl.constexpr, TANH: tl.constexpr, BRANCH_RMS: tl.constexpr, EAGER: tl.constexpr,
    GATE: tl.constexpr, SCALE: tl.constexpr, SCALE2: tl.constexpr, SORTED: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0)
    if SORTED:
        b = tl.load(row_ptr + p).to(tl.int64)
        n0 = tl.load(begin_ptr + p)
        n1 = tl.load(end_ptr + p)
    else:
        b = (p // per_sample).to(tl.int64)
        first = (p % per_sample) // chunks * segment
        n0 = first + (p % per_sample) % chunks * chunk
        n1 = tl.minimum(n0 + chunk, first + segment)

    gate_table = _load_vector(gate_table_ptr, C, PARTS)
    scale_table = _load_vector(scale_table_ptr, C, PARTS)
    branch_weight = _load_vector(branch_weight_ptr, C, PARTS)
    weight = _load_vector(weight_ptr, C, PARTS)
    bias = _load_vector(bias_ptr, C, PARTS)
    if GATE == "group":
        gate = _modulation(
            gate_ptr, gate_table, GATE, b, n0, None, N, gate_sb, gate_sg, gate_sc, gate_len, C, PARTS, VEC, UNIT, EAGER
        )  # fmt: skip
    if SCALE == "group":
        scale = _modulation(
            scale_ptr, scale_table, SCALE, b, n0, None, N, scale_sb, scale_sg, scale_sc, scale_len, C, PARTS, VEC, UNIT, EAGER
        )  # fmt: skip
    if SCALE2 == "group":
        scale2 = _modulation(
            scale2_ptr, (), SCALE2, b, n0, None, N, scale2_sb, scale2_sg, scale2_sc, scale2_len, C, PARTS, VEC, UNIT, EAGER
        )  # fmt: skip

    gate_sums = _sums(gate_sums_ptr, PARTS)
    shift_sums = _sums(shift_sums_ptr, PARTS)
    scale_sums = _sums(scale_sums_ptr, PARTS)
    shift2_sums = _sums(shift2_sums_ptr, PARTS)
    scale2_sums = _sums(scale2_sums_ptr, PARTS)
    branch_weight_sums = _sums(branch_weight_sums_ptr, PARTS)
    weight_sums = _sums(weight_sums_ptr, PARTS)
    bias_sums = _sums(bias_sums_ptr, PARTS)

    for position in tl.range(n0, n1, num_stages=STAGES):
        if SORTED:
            token = tl.load(order_ptr + position)
            sample, n = token // N, token % N
        else:
            sample, n = b, tl.cast(position, tl.int64)
            token = b * N + n
        out_row = token * C

        if dout_ptr is not None:
            dout = _load(
                dout_ptr,
                sample * VEC * dout_sb + n * VEC * dout_sn,
                dout_sc,
                C,
                PARTS,
                UNIT,
            )
        if NORM != "none":
            x = _load(x_ptr, sample * VEC * x_sb + n * VEC * x_sn, x_sc, C, PARTS, UNIT)
            rstd = tl.load(rstd_ptr + token)
            mean = 0.0
            if NORM == "layer":
                mean = tl.load(mean_ptr + token)
            xhat, normed = (), ()
            for i in tl.static_range(len(PARTS)):
                value = (x[i].to(tl.float32) - mean) * rstd
                xhat = xhat + (value,)
                normed = normed + (
                    _affine(value, weight, bias, i, NORM == "rms", x[i].dtype, EAGER),
                )

            dn = ()
            if dy_ptr is not None:
                dy = _load(dy_ptr, sample * VEC * dy_sb + n * VEC * dy_sn, dy_sc, C, PARTS, UNIT)
                if shift_sums_ptr is not None:
                    shift_sums = _plus(shift_sums, dy, PARTS)
                if dshift_ptr is not None:
                    _store(dshift_ptr, out_row, dy, C, PARTS)
                if scale_sums_ptr is not None:
                    scale_sums = _plus(scale_sums, _scaled(dy, normed, PARTS), PARTS)
                if dscale_ptr is not None:
                    _store(dscale_ptr, out_row, _scaled(dy, normed, PARTS), C, PARTS)
                if SCALE == "token":
                    scale = _modulation(
                        scale_ptr, scale_table, SCALE, b, n, None, N, scale_sb, scale_sg, scale_sc, scale_len, C, PARTS, VEC, UNIT, EAGER
                    )  # fmt: skip
                for i in tl.static_range(len(PARTS)):
                    part = dy[i].to(tl.float32)
                    if SCALE != "none":
                        part = part * _one_plus(scale[i], EAGER).to(tl.float32)
                    dn = dn + (part,)
            if dy2_ptr is not None:
                dy2 = _load(
                    dy2_ptr,
                    sample * VEC * dy2_sb + n * VEC * dy2_sn,
                    dy2_sc,
                    C,
                    PARTS,
                    UNIT,
                )
                if shift2_sums_ptr is not None:
                    shift2_sums = _plus(shift2_sums, dy2, PARTS)
                if dshift2_ptr is not None:
                    _store(dshift2_ptr, out_row, dy2, C, PARTS)
                if scale2_sums_ptr is not None:
                    scale2_sums = _plus(scale2_sums, _scaled(dy2, normed, PARTS), PARTS)
                if dscale2_ptr is not None:
                    _store(dscale2_ptr, out_row, _scaled(dy2, normed, PARTS), C, PARTS)
                if SCALE2 == "token":
                    scale2 = _modulation(
                        scale2_ptr, (), SCALE2, b, n, None, N, scale2_sb, scale2_sg, scale2_sc, scale2_len, C, PARTS, VEC, UNIT, EAGER
                    )  # fmt: skip
                both = ()
                for i in tl.static_range(len(PARTS)):
                    part = dy2[i].to(tl.float32)
                    if SCALE2 != "none":
                        part = part * _one_plus(scale2[i], EAGER).to(tl.float32)
                    if dy_ptr is not None:
                        part += dn[i]
                    both = both + (part,)
                dn = both

            # dx = rstd * (dxhat - mean(dxhat) - xhat * mean(dxhat * xhat)), without the first mean for rms
            if weight_sums_ptr is not None:
                weight_sums = _plus(weight_sums, _scaled(dn, xhat, PARTS), PARTS)
            if bias_sums_ptr is not None:
                bias_sums = _plus(bias_sums, dn, PARTS)
            if weight_ptr is not None:
                dn = _scaled(dn, weight, PARTS)
            along = _scaled(dn, xhat, PARTS)
            if NORM == "layer":
                along, centre = _row_sums(along, dn, PARTS)
                centre = centre / C
            else:
                along = _row_sum(along, PARTS)
            along = along / C
            dx = ()
            for i in tl.static_range(len(PARTS)):
                part = dn[i] - xhat[i] * along
                if NORM == "layer":
                    part -= centre
                dx = dx + (part * rstd,)
            if dout_ptr is not None:
                dx = _plus(dx, dout, PARTS)
        else:
            dx = dout
        if dresidual_ptr is not None:
            _store(dresidual_ptr, out_row, dx, C, PARTS)

        wants_branch: tl.constexpr = dbranch_ptr is not None or branch_weight_sums_ptr is not None
        if wants_branch or gate_sums_ptr is not None or dgate_ptr is not None:
            if branch_ptr is not None:
                branch_row = sample * VEC * branch_sb + n * VEC * branch_sn
                branch = _load(branch_ptr, branch_row, branch_sc, C, PARTS, UNIT)
                if BRANCH_RMS:
                    branch_rstd = tl.load(branch_rstd_ptr + token)
            if GATE == "token":
                gate = _modulation(
                    gate_ptr, gate_table, GATE, b, n, None, N, gate_sb, gate_sg, gate_sc, gate_len, C, PARTS, VEC, UNIT, EAGER
                )  # fmt: skip
            if gate_sums_ptr is not None or dgate_ptr is not None:
                dgate = ()
                for i in tl.static_range(len(PARTS)):
                    part = branch[i]
                    if BRANCH_RMS:
                        part = part.to(tl.float32) * branch_rstd
                        part = _affine(part, branch_weight, (), i, True, branch[i].dtype, EAGER)
                    part = dx[i].to(tl.float32) * part.to(tl.float32)
                    if TANH:
                        g = _tanh(gate[i].to(tl.float32))
                        part = part * (1.0 - g * g)
                    dgate = dgate + (part,)
                if gate_sums_ptr is not None:
                    gate_sums = _plus(gate_sums, dgate, PARTS)
                if dgate_ptr is not None:
                    _store(dgate_ptr, out_row, dgate, C, PARTS)
            if wants_branch:
                db = ()
                for i in tl.static_range(len(PARTS)):
                    part = dx[i].to(tl.float32)
                    if GATE != "none":
                        part = part * _activate(gate[i], TANH, EAGER).to(tl.float32)
                    db = db + (part,)
                if BRANCH_RMS:
                    bhat = ()
                    for i in tl.static_range(len(PARTS)):
                        bhat = bhat + (branch[i].to(tl.float32) * branch_rstd,)
                    if branch_weight_sums_ptr is not None:
                        branch_weight_sums = _plus(
                            branch_weight_sums, _scaled(db, bhat, PARTS), PARTS
                        )
                    if branch_weight_ptr is not None:
                        db = _scaled(db, branch_weight, PARTS)
                    along = _row_sum(_scaled(db, bhat, PARTS), PARTS) / C
                    new = ()
                    for i in tl.static_range(len(PARTS)):
                        new = new + ((db[i] - bhat[i] * along) * branch_rstd,)
                    db = new
                if dbranch_ptr is not None:
                    _store(dbranch_ptr, out_row, db, C, PARTS)

    _store_sums(gate_sums_ptr, p, gate_sums, C, PARTS)
    _store_sums(shift_sums_ptr, p, shift_sums, C, PARTS)
    _store_sums(scale_sums_ptr, p, scale_sums, C, PARTS)
    _store_sums(shift2_sums_ptr, p, shift2_sums, C, PARTS)
    _store_sums(scale2_sums_ptr, p, scale2_sums, C, PARTS)
    _store_sums(branch_weight_sums_ptr, p, branch_weight_sums, C, PARTS)
    _store_sums(weight_sums_ptr, p, weight_sums, C, PARTS)
    _store_sums(bias_sums_ptr, p, bias_sums, C, PARTS)


@triton.jit
def _sum_rows(sums_ptr, out_ptr, group, low, high, cols, C: tl.constexpr, BLOCK_P: tl.constexpr):
    total = tl.zeros([BLOCK_P, cols.shape[0]], tl.float32)
    for start in range(low, high, BLOCK_P):
        rows = start + tl.arange(0, BLOCK_P)
        pointers = sums_ptr + rows.to(tl.int64)[:, None] * C + cols[None, :]
        total += tl.load(pointers, mask=(rows < high)[:, None] & (cols < C)[None, :], other=0.0)
    total = tl.sum(total, axis=0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + group.to(tl.int64) * C + cols, total, mask=cols < C)


@triton.jit(do_not_specialize=["per_group"])
def adaln_bwd_sums_kernel(
    sums,  # tuple of [programs, C] float32
    outs,  # tuple of [groups, C]
    first_ptr,  # [groups + 1]: the first program of each group; None: per_group each
    per_group: tl.int32,
    C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The second stage: the programs' rows of sums, added in order."""
    group = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    if first_ptr is not None:
        low = tl.load(first_ptr + group).to(tl.int32)
        high = tl.load(first_ptr + group + 1).to(tl.int32)
    else:
        low = group * per_group
        high = low + per_group
    for i in tl.static_range(len(outs)):
        if tl.program_id(2) == i:
            _sum_rows(sums[i], outs[i], group, low, high, cols, C, BLOCK_P)
