"""The forward kernel of adaLN in Triton.

A program walks over its chunk of tokens, a token at a time, with the loads of the next one under way.
"""

# Annotations must stay objects: Triton reads them; and Triton has no types.
# mypy: ignore-errors

import triton
import triton.language as tl

from dit_kernels.ops.adaln.triton_row import (
    _SIZES,
    _activate,
    _add,
    _affine,
    _as_float,
    _load,
    _load_vector,
    _modulation,
    _mul,
    _one_plus,
    _row_sum,
    _scaled,
    _start,
    _store,
    _store_part,
    _zero_pad,
)


@triton.jit(do_not_specialize=_SIZES)
def adaln_fwd_kernel(
    residual_ptr,  # [B, N, C] or None
    x_ptr,  # [B, N, C]; the branch where there is a residual
    gate_ptr, gate_table_ptr, branch_weight_ptr,
    shift_ptr, scale_ptr, shift_table_ptr, scale_table_ptr, shift2_ptr, scale2_ptr,
    weight_ptr, bias_ptr,  # [C]
    row_index_ptr,  # [B, N] int32
    out_ptr, y_ptr, y2_ptr,  # [B, N, C], contiguous
    branch_rstd_ptr, mean_ptr, rstd_ptr,  # [B, N] float32
    N: tl.int32, per_sample: tl.int32, segment: tl.int32, chunks: tl.int32, chunk: tl.int32, eps: tl.float32,
    residual_sb: tl.int64, residual_sn: tl.int64, residual_sc: tl.int64,
    x_sb: tl.int64, x_sn: tl.int64, x_sc: tl.int64,
    gate_sb: tl.int64, gate_sg: tl.int64, gate_sc: tl.int64, gate_len: tl.int32,
    shift_sb: tl.int64, shift_sg: tl.int64, shift_sc: tl.int64, shift_len: tl.int32,
    scale_sb: tl.int64, scale_sg: tl.int64, scale_sc: tl.int64, scale_len: tl.int32,
    shift2_sb: tl.int64, shift2_sg: tl.int64, shift2_sc: tl.int64, shift2_len: tl.int32,
    scale2_sb: tl.int64, scale2_sg: tl.int64, scale2_sc: tl.int64, scale2_len: tl.int32,
    C: tl.constexpr, PARTS: tl.constexpr, VEC: tl.constexpr, UNIT: tl.constexpr,
    NORM: tl.constexpr, TANH: tl.constexpr, BRANCH_RMS: tl.constexpr, EAGER: tl.constexpr,
    GATE: tl.constexpr, SHIFT: tl.constexpr, SCALE: tl.constexpr, SHIFT2: tl.constexpr, SCALE2: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0)
    b = (p // per_sample).to(tl.int64)
    first = (p % per_sample) // chunks * segment
    n0 = first + (p % per_sample) % chunks * chunk
    n1 = tl.minimum(n0 + chunk, first + segment)

    gate_table = _load_vector(gate_table_ptr, C, PARTS)
    shift_table = _load_vector(shift_table_ptr, C, PARTS)
    scale_table = _load_vector(scale_table_ptr, C, PARTS)
    branch_weight = _load_vector(branch_weight_ptr, C, PARTS)
    weight = _load_vector(weight_ptr, C, PARTS)
    bias = _load_vector(bias_ptr, C, PARTS)
    if GATE == "group":
        gate = _modulation(
            gate_ptr, gate_table, GATE, b, n0, None, N, gate_sb, gate_sg, gate_sc, gate_len, C, PARTS, VEC, UNIT, EAGER
        )  # fmt: skip
    if SHIFT == "group":
        shift = _modulation(
            shift_ptr, shift_table, SHIFT, b, n0, None, N, shift_sb, shift_sg, shift_sc, shift_len, C, PARTS, VEC, UNIT, EAGER
        )  # fmt: skip
    if SCALE == "group":
        scale = _modulation(
            scale_ptr, scale_table, SCALE, b, n0, None, N, scale_sb, scale_sg, scale_sc, scale_len, C, PARTS, VEC, UNIT, EAGER
        )  # fmt: skip
    if SHIFT2 == "group":
        shift2 = _modulation(
            shift2_ptr, (), SHIFT2, b, n0, None, N, shift2_sb, shift2_sg, shift2_sc, shift2_len, C, PARTS, VEC, UNIT, EAGER
        )  # fmt: skip
    if SCALE2 == "group":
        scale2 = _modulation(
            scale2_ptr, (), SCALE2, b, n0, None, N, scale2_sb, scale2_sg, scale2_sc, scale2_len, C, PARTS, VEC, UNIT, EAGER
        )  # fmt: skip

    for position in tl.range(n0, n1, num_stages=STAGES):
        n = tl.cast(position, tl.int64)
        token = b * N + n
        out_row = token * C
        x = _load(x_ptr, b * VEC * x_sb + n * VEC * x_sn, x_sc, C, PARTS, UNIT)

        if residual_ptr is not None:
            residual_row = b * VEC * residual_sb + n * VEC * residual_sn
            residual = _load(residual_ptr, residual_row, residual_sc, C, PARTS, UNIT)
            if GATE == "token" or GATE == "index":
                gate = _modulation(
                    gate_ptr, gate_table, GATE, b, n, row_index_ptr, N, gate_sb, gate_sg, gate_sc, gate_len, C, PARTS, VEC, UNIT, EAGER
                )  # fmt: skip
            if BRANCH_RMS:
                square = _row_sum(_scaled(x, x, PARTS), PARTS)
                branch_rstd = tl.rsqrt(square / C + eps)
                if branch_rstd_ptr is not None:
                    tl.store(branch_rstd_ptr + token, branch_rstd)
            total = ()
            for i in tl.static_range(len(PARTS)):
                branch = x[i]
                if BRANCH_RMS:
                    branch = branch.to(tl.float32) * branch_rstd
                    branch = _affine(branch, branch_weight, (), i, True, x[i].dtype, EAGER)
                if GATE != "none":
                    branch = _mul(_activate(gate[i], TANH, EAGER), branch, EAGER)
                total = total + (_add(residual[i], branch, EAGER).to(residual[i].dtype),)
            x = total
            _store(out_ptr, out_row, x, C, PARTS)

        if NORM != "none":
            centred = _as_float(x, PARTS)
            if NORM == "layer":
                mean = _row_sum(centred, PARTS) / C
                if mean_ptr is not None:
                    tl.store(mean_ptr + token, mean)
                differences = ()
                for i in tl.static_range(len(PARTS)):
                    differences = differences + (
                        _zero_pad(centred[i] - mean, C, _start(PARTS, i), PARTS[i]),
                    )
                centred = differences
            square = _row_sum(_scaled(centred, centred, PARTS), PARTS)
            rstd = tl.rsqrt(square / C + eps)
            if rstd_ptr is not None:
                tl.store(rstd_ptr + token, rstd)

            if SHIFT == "token" or SHIFT == "index":
                shift = _modulation(
                    shift_ptr, shift_table, SHIFT, b, n, row_index_ptr, N, shift_sb, shift_sg, shift_sc, shift_len, C, PARTS, VEC, UNIT, EAGER
                )  # fmt: skip
            if SCALE == "token" or SCALE == "index":
                scale = _modulation(
                    scale_ptr, scale_table, SCALE, b, n, row_index_ptr, N, scale_sb, scale_sg, scale_sc, scale_len, C, PARTS, VEC, UNIT, EAGER
                )  # fmt: skip
            if SHIFT2 == "token" or SHIFT2 == "index":
                shift2 = _modulation(
                    shift2_ptr, (), SHIFT2, b, n, row_index_ptr, N, shift2_sb, shift2_sg, shift2_sc, shift2_len, C, PARTS, VEC, UNIT, EAGER
                )  # fmt: skip
            if SCALE2 == "token" or SCALE2 == "index":
                scale2 = _modulation(
                    scale2_ptr, (), SCALE2, b, n, row_index_ptr, N, scale2_sb, scale2_sg, scale2_sc, scale2_len, C, PARTS, VEC, UNIT, EAGER
                )  # fmt: skip
            for i in tl.static_range(len(PARTS)):
                normed = _affine(
                    centred[i] * rstd, weight, bias, i, NORM == "rms", x[i].dtype, EAGER
                )
                y = normed
                if SCALE != "none":
                    y = _mul(y, _one_plus(scale[i], EAGER), EAGER)
                if SHIFT != "none":
                    y = _add(y, shift[i], EAGER)
                _store_part(y_ptr, out_row, y, C, _start(PARTS, i), PARTS[i])
                if y2_ptr is not None:
                    y = normed
                    if SCALE2 != "none":
                        y = _mul(y, _one_plus(scale2[i], EAGER), EAGER)
                    if SHIFT2 != "none":
                        y = _add(y, shift2[i], EAGER)
                    _store_part(y2_ptr, out_row, y, C, _start(PARTS, i), PARTS[i])


# Column sums over a program's tokens, for the pointers that are there.
