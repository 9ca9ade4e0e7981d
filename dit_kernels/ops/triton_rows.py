"""What row-wise Triton kernels share: a row cut into powers of two, and the second stage of `gradients`' sums."""

from __future__ import annotations

import functools

import triton
import triton.language as tl
from torch import Tensor

from dit_kernels.ops import triton_launch


def power_of_two(size: int) -> int:
    """The least one that is not smaller."""
    return 1 << max(size - 1, 0).bit_length()


@functools.cache
def split(size: int, least: int = 1) -> tuple[int, ...]:
    """At most three powers of two that cover `size`, with at most an eighth of padding where three do that."""
    parts: list[int] = []
    rest = size
    while rest > 0:
        cover = max(least, power_of_two(rest))
        if 8 * (cover - rest) <= size or len(parts) == 2 or cover == least:
            parts.append(cover)
            break
        parts.append(cover // 2)
        rest -= cover // 2
    if len(parts) > 1 and parts[-1] == parts[-2]:
        parts[-2:] = [2 * parts[-1]]
    return tuple(parts) or (least,)


def vector(*strides: int) -> int:
    """The power of two, at most 8, that divides all of them: a kernel gets strides counted in it."""
    bits = 8
    for stride in strides:
        bits |= stride
    return bits & -bits


@triton.jit(do_not_specialize=["per_group"])
def _add_rows_kernel(  # type: ignore[no-untyped-def]
    sums_ptr,  # [groups * per_group, C] float32
    out_ptr,  # [groups, C]
    per_group: tl.int32,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # of one axis: the others of a grid end at 65535
    group = (tl.program_id(0) // tl.cdiv(C, BLOCK_C)).to(tl.int64)
    cols = tl.program_id(0) % tl.cdiv(C, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, per_group, BLOCK_P):
        rows = start + tl.arange(0, BLOCK_P)
        mask = (rows < per_group)[:, None] & (cols < C)[None, :]
        total += tl.load(
            sums_ptr + (group * per_group + rows)[:, None] * C + cols[None, :], mask=mask, other=0.0
        )
    out = tl.sum(total, axis=0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + group * C + cols, out, mask=cols < C)


def add_rows(sums: Tensor, out: Tensor, groups: int = 1) -> Tensor:
    """The second stage: out [groups, C] = sums [groups, rows a group, C] added up, in out's dtype."""
    columns = out.numel() // max(groups, 1)
    rows = sums.numel() // max(out.numel(), 1)
    block = 128 if columns >= 8192 else 32
    triton_launch.launch(
        _add_rows_kernel,
        (triton.cdiv(columns, block) * groups,),
        sums,
        out,
        rows,
        columns,
        2048 // block,
        block,
        num_warps=4,
    )
    return out
