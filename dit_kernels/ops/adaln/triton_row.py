"""A row in the Triton kernels of adaLN: loads, stores, sums, and what is done to it between.

A row is a tuple of power-of-two PARTS (1152 = 1024 + 128). Names: `_s` b, n, c are strides of sample, token and
channel, `_s` b, g, c of a modulation's sample, group and channel; all but the channel's count vectors of
VEC elements, so that the compiler knows what divides them. Numbers that vary from call to call are not
specialised on; a pointer that is None removes its code.
"""

# Annotations must stay objects: Triton reads them; and Triton has no types.
# mypy: ignore-errors

import triton
import triton.language as tl

_SIZES = [
    "N", "per_sample", "segment", "chunks", "chunk", "eps",
    *(f"{t}_s{axis}" for t in ("residual", "x", "branch", "dy", "dy2", "dout") for axis in "bnc"),
    *(f"{m}_{s}" for m in ("gate", "shift", "scale", "shift2", "scale2") for s in ("sb", "sg", "sc", "len")),
]  # fmt: skip


@triton.constexpr_function
def _start(parts, i):
    return sum(parts[:i])


@triton.constexpr_function
def _promote(a, b):
    return a if a == b else tl.float32


@triton.jit
def _load_part(
    ptr, row, stride_c, C: tl.constexpr, START: tl.constexpr, P: tl.constexpr, UNIT: tl.constexpr
):  # fmt: skip
    """row: an element offset -> [P] in the pointer's dtype."""
    cols = START + tl.arange(0, P)
    if UNIT:
        pointers = ptr + row + cols
    else:
        pointers = ptr + row + cols.to(tl.int64) * stride_c
    if START + P > C:
        return tl.load(pointers, mask=cols < C, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def _load(ptr, row, stride_c, C: tl.constexpr, PARTS: tl.constexpr, UNIT: tl.constexpr):
    values = ()
    for i in tl.static_range(len(PARTS)):
        values = values + (_load_part(ptr, row, stride_c, C, _start(PARTS, i), PARTS[i], UNIT),)
    return values


@triton.jit
def _load_vector(ptr, C: tl.constexpr, PARTS: tl.constexpr):
    """[C]; no parts of None."""
    values = ()
    if ptr is not None:
        values = _load(ptr, 0, 1, C, PARTS, True)
    return values


@triton.jit
def _store_part(ptr, row, value, C: tl.constexpr, START: tl.constexpr, P: tl.constexpr):
    cols = START + tl.arange(0, P)
    value = value.to(ptr.dtype.element_ty)
    if START + P > C:
        tl.store(ptr + row + cols, value, mask=cols < C)
    else:
        tl.store(ptr + row + cols, value)


@triton.jit
def _store(ptr, row, values, C: tl.constexpr, PARTS: tl.constexpr):
    for i in tl.static_range(len(PARTS)):
        _store_part(ptr, row, values[i], C, _start(PARTS, i), PARTS[i])


@triton.jit
def _zero_pad(value, C: tl.constexpr, START: tl.constexpr, P: tl.constexpr):
    if START + P > C:
        return tl.where(START + tl.arange(0, P) < C, value, 0.0)
    else:
        return value


# Arithmetic in float32. With EAGER each result takes the dtype that torch gives it.


@triton.jit
def _as(value, dtype: tl.constexpr, EAGER: tl.constexpr):
    if EAGER:
        return value.to(dtype)
    else:
        return value


@triton.jit
def _mul(a, b, EAGER: tl.constexpr):
    return _as(a.to(tl.float32) * b.to(tl.float32), _promote(a.dtype, b.dtype), EAGER)


@triton.jit
def _add(a, b, EAGER: tl.constexpr):
    return _as(a.to(tl.float32) + b.to(tl.float32), _promote(a.dtype, b.dtype), EAGER)


@triton.jit
def _one_plus(a, EAGER: tl.constexpr):
    return _as(1.0 + a.to(tl.float32), a.dtype, EAGER)


@triton.jit
def _tanh(x):
    """libdevice has no interpreter. The polynomial keeps small gates exact to float32."""
    z = x * x
    series = -5.70498872745e-3 * z + 2.06390887954e-2
    series = (series * z - 5.37397155531e-2) * z + 1.33314422036e-1
    series = (series * z - 3.33332819422e-1) * z * x + x
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, series, tl.where(x < 0.0, -far, far))


@triton.jit
def _activate(gate, TANH: tl.constexpr, EAGER: tl.constexpr):
    if TANH:
        return _as(_tanh(gate.to(tl.float32)), gate.dtype, EAGER)
    else:
        return gate


@triton.jit
def _affine(
    xhat, weight, bias, i: tl.constexpr, RMS: tl.constexpr, DTYPE: tl.constexpr, EAGER: tl.constexpr
):  # fmt: skip
    """The norm's own weight and bias; `DTYPE` is the rounding of the norm's result."""
    n = xhat
    if len(weight) > 0:
        n = n * weight[i].to(tl.float32)
    if len(bias) > 0:
        wide: tl.constexpr = (
            bias[i].dtype if len(weight) == 0 else _promote(weight[i].dtype, bias[i].dtype)
        )
        if RMS and wide == DTYPE:
            n = _as(n, DTYPE, EAGER).to(tl.float32)  # torch's rms_norm has no bias: two ops
        n = n + bias[i].to(tl.float32)
    return _as(n, DTYPE, EAGER)


@triton.jit
def _modulation(
    ptr, table, FORM: tl.constexpr, b, n, index_ptr, N, stride_b, stride_g, stride_c, length,
    C: tl.constexpr, PARTS: tl.constexpr, VEC: tl.constexpr, UNIT: tl.constexpr, EAGER: tl.constexpr,
):  # fmt: skip
    """The row of shift, scale or gate that token n reads, plus the table.

    FORM "group" or "token": row n // length of its sample; a group is read once a program, for all its
    tokens. "index": the row that row_index [B, N] names.
    """
    if FORM == "index":
        row = tl.load(index_ptr + b * N + n).to(tl.int64) * VEC * stride_b
    else:
        row = b * VEC * stride_b + (n // length).to(tl.int64) * VEC * stride_g
    values = _load(ptr, row, stride_c, C, PARTS, UNIT)
    if len(table) > 0:
        sums = ()
        for i in tl.static_range(len(PARTS)):
            sums = sums + (_add(values[i], table[i], EAGER),)
        return sums
    else:
        return values


# Rows as tuples of parts, in float32.


@triton.jit
def _scaled(a, b, PARTS: tl.constexpr):
    """a * b, elementwise."""
    values = ()
    for i in tl.static_range(len(PARTS)):
        values = values + (a[i].to(tl.float32) * b[i].to(tl.float32),)
    return values


@triton.jit
def _as_float(a, PARTS: tl.constexpr):
    values = ()
    for i in tl.static_range(len(PARTS)):
        values = values + (a[i].to(tl.float32),)
    return values


@triton.jit
def _plus(a, b, PARTS: tl.constexpr):
    values = ()
    for i in tl.static_range(len(PARTS)):
        values = values + (a[i].to(tl.float32) + b[i].to(tl.float32),)
    return values


@triton.jit
def _row_sum(values, PARTS: tl.constexpr):
    """Sum over a row's channels: equal parts are added before they are reduced."""
    total = 0.0
    part = values[0]
    for i in tl.static_range(1, len(PARTS)):
        if PARTS[i] == PARTS[i - 1]:
            part += values[i]
        else:
            total += tl.sum(part, axis=0)
            part = values[i]
    return total + tl.sum(part, axis=0)


@triton.jit
def _add_pairs(a, b, more_a, more_b):
    return a + more_a, b + more_b


@triton.jit
def _row_sums(a, b, PARTS: tl.constexpr):
    """Both sums with one exchange between the warps."""
    total_a, total_b = 0.0, 0.0
    part_a, part_b = a[0], b[0]
    for i in tl.static_range(1, len(PARTS)):
        if PARTS[i] == PARTS[i - 1]:
            part_a += a[i]
            part_b += b[i]
        else:
            sum_a, sum_b = tl.reduce((part_a, part_b), 0, _add_pairs)
            total_a += sum_a
            total_b += sum_b
            part_a, part_b = a[i], b[i]
    sum_a, sum_b = tl.reduce((part_a, part_b), 0, _add_pairs)
    return total_a + sum_a, total_b + sum_b
