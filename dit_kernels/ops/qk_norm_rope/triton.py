"""QK-norm and rotary embedding in Triton: how a call is cut and launched. The kernels: `triton_{forward,backward}`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple, cast

import triton
from torch import Tensor

from dit_kernels.ops import gradients, triton_launch, triton_rows, triton_tuning
from dit_kernels.ops.qk_norm_rope import lists
from dit_kernels.ops.qk_norm_rope.triton_backward import (
    qk_norm_rope_bwd_angles_kernel,
    qk_norm_rope_bwd_kernel,
)
from dit_kernels.ops.qk_norm_rope.triton_forward import qk_norm_rope_fwd_kernel
from dit_kernels.ops.strides import adjacent


def supports(
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    norm: str,
    over: str,
    *statics: object,
) -> str | None:
    for name, x in (("q", q), ("k", k)):
        if x is None:
            continue
        width = x.shape[3] * (x.shape[2] if over == "hidden" else 1)
        if not 0 < x.shape[3] or width > (16384 if over == "hidden" else 2048):
            return (
                f"a row of {name} has 1 to 2048 channels (16384 over the hidden size); got {width}"
            )
    return triton_launch.unsupported((q, k, q_weight, k_weight, q_bias, k_bias, cos, sin))


def forward(
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    norm: str,
    over: str,
    eps: float,
    act: str,
    layout: str,
    sections: int,
    rope_start: int,
    rounding: str,
    stats: bool,
) -> list[Tensor]:
    outputs = lists.empty_outputs(q, k)
    saved = lists.empty_statistics(q, k, norm, over) if stats else []
    parameters = [adjacent(p) for p in (q_weight, q_bias, k_weight, k_bias)]
    cos, sin = _tables(cos, sin)
    plan = _plans(
        (q, k, *parameters, cos, sin),
        norm, over, eps, act, layout, sections, rope_start, rounding, stats,
    )  # fmt: skip
    triton_launch.run(
        qk_norm_rope_fwd_kernel, plan,
        q, k, outputs[0], None if k is None else outputs[1], *lists.statistics(saved, k),
        *parameters, cos, sin,
    )  # fmt: skip
    return outputs + saved


def _plan(
    tensors: Sequence[Tensor | None],
    norm: str,
    over: str,
    eps: float,
    act: str,
    layout: str,
    sections: int,
    rope_start: int,
    rounding: str,
    stats: bool,
) -> triton_launch.Plan:
    """Of the forward kernel."""
    q, k, *_, cos, sin = tensors
    q = cast(Tensor, q)
    angles = _arrange_angles(cos, sin)
    row = _row(q.shape[3], angles, layout, sections)
    hidden = over == "hidden"
    q_tile, k_tile, warps, row = _tiles(q, k, (), angles, row, hidden)
    q_programs, q_chunks, q_chunk = _programs(q, q_tile, 16, 16)
    k_programs, k_chunks, k_chunk = _programs(k, k_tile, 16, 16)
    strides, vec, unit = _strides(q, k)
    eager = rounding == "eager"
    numbers = (
        q_programs, q.shape[1], 0 if k is None else k.shape[1], q_chunks, k_chunks, q_chunk, k_chunk,
        *strides, rope_start, angles.length, *angles.strides, eps,
        *q_tile, *k_tile, vec, *row, unit, angles.vec, angles.heads, angles.unit, angles.period,
        norm, hidden, act == "relu", eager,
    )  # fmt: skip
    options = dict(num_warps=warps, enable_fp_fusion=not eager)
    return triton_launch.Plan((q_programs + k_programs,), numbers, options, {})


_plans = triton_launch.Plans(_plan)


def backward(
    grads: list[Tensor | None],
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    saved: list[Tensor],
    norm: str,
    over: str,
    eps: float,
    act: str,
    layout: str,
    sections: int,
    rope_start: int,
    rounding: str,
    needs: list[bool],
) -> list[Tensor]:
    inputs = (q, k, q_weight, k_weight, q_bias, k_bias, cos, sin)
    results = gradients.empty(inputs, needs)
    dq_out, dk_out = lists.given(grads, results)
    if dq_out is None and dk_out is None:
        return [t.zero_() for t in results if t is not None]
    angles = _arrange_angles(cos, sin)
    row = _row(q.shape[3], angles, layout, sections)
    hidden = over == "hidden"
    strides, vec, unit = _strides(q, k)
    dy_strides, dy_vec, dy_unit = _strides(dq_out, dk_out)
    statistics = lists.statistics(saved, k)
    parameters = [adjacent(p) for p in (q_weight, q_bias, k_weight, k_bias)]
    eager = rounding == "eager"
    options = (norm, hidden, act == "relu", eager)

    if any(result is not None for result in results[:6]):
        q_tile, k_tile, warps, cut = _tiles(q, k, (dq_out, dk_out), angles, row, hidden)
        q_programs, q_chunks, q_chunk = _programs(dq_out, q_tile, 4, 4096)
        k_programs, k_chunks, k_chunk = _programs(dk_out, k_tile, 4, 4096)
        sums = {
            i: gradients.partial_sums(results[i], programs)
            for i, programs in ((2, q_programs), (4, q_programs), (3, k_programs), (5, k_programs))
        }
        triton_launch.launch(
            qk_norm_rope_bwd_kernel, (q_programs + k_programs,),
            dq_out, dk_out, q, k, results[0], results[1], *statistics, *parameters,
            *sums.values(), angles.cos, angles.sin,
            q_programs, q.shape[1], 0 if k is None else k.shape[1], q_chunks, k_chunks, q_chunk, k_chunk,
            *strides, *dy_strides, rope_start, angles.length, *angles.strides,
            *q_tile, *k_tile, vec, *cut, unit, dy_vec, dy_unit, angles.vec, angles.heads, angles.unit, angles.period,
            *options, num_warps=warps, enable_fp_fusion=not eager,
        )  # fmt: skip
        for i, rows in sums.items():
            if rows is not None:
                triton_rows.add_rows(rows, results[i])

    dcos, dsin = results[6:]
    table = dsin if dcos is None else dcos
    if table is not None and table.numel():
        samples, heads = (table.shape[0], table.shape[2]) if table.dim() == 4 else (1, 1)
        tile = _tile(q.shape[2], row, False, _Config(4, 16))
        blocks = tile.blocks if heads > 1 else 1
        triton_launch.launch(
            qk_norm_rope_bwd_angles_kernel, (triton.cdiv(angles.length, tile.block_n), blocks, samples),
            dq_out, dk_out, q, k, *statistics, *parameters, dcos, dsin,
            q.shape[1], 0 if k is None else k.shape[1], rope_start, angles.length, q.shape[0] // samples,
            *strides, *dy_strides, q.shape[2], 1 if k is None else k.shape[2], tile.parts, tile.block_n,
            vec, *row, unit, dy_vec, dy_unit, angles.heads, *options,
            num_warps=4, enable_fp_fusion=not eager,
        )  # fmt: skip
    return [t for t in results if t is not None]


class _Angles(NamedTuple):
    cos: Tensor | None
    sin: Tensor | None
    length: int
    strides: tuple[
        int, int, int, int
    ]  # of sample, token, head and angle; the first three in vectors
    vec: int
    heads: bool
    unit: bool
    period: int  # R


_NO_ANGLES = _Angles(None, None, 0, (0, 0, 0, 1), 1, False, True, 0)


def _tables(cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """With one set of strides; neither where no channel turns."""
    if cos is None or sin is None or cos.shape[-1] == 0:
        return None, None
    return (cos, sin) if cos.stride() == sin.stride() else (cos.contiguous(), sin.contiguous())


def _arrange_angles(cos: Tensor | None, sin: Tensor | None) -> _Angles:
    cos, sin = _tables(cos, sin)
    if cos is None:
        return _NO_ANGLES
    if cos.dim() == 2:
        sample, token, head, angle = 0, cos.stride(0), 0, cos.stride(1)
    else:
        sample, token, head, angle = (
            s if n > 1 else 0 for n, s in zip(cos.shape, cos.stride(), strict=True)
        )
        angle = cos.stride(3)
    unit = angle == 1
    vec = triton_rows.vector(sample, token, head) if unit else 1
    heads = cos.dim() == 4 and cos.shape[2] > 1
    strides = (sample // vec, token // vec, head // vec, angle)
    length = cos.shape[1] if cos.dim() == 4 else cos.shape[0]
    return _Angles(cos, sin, length, strides, vec, heads, unit, cos.shape[-1])


def _strides(q: Tensor | None, k: Tensor | None) -> tuple[list[int], int, bool]:
    """Of q then k: sample, token and head in vectors, channel; then the vector, and whether channels are adjacent."""
    found = [
        (0, 0, 0, 1)
        if x is None
        else tuple(s if n > 1 else 0 for n, s in zip(x.shape[:3], x.stride()[:3], strict=True))
        + (x.stride(3),)
        for x in (q, k)
    ]
    unit = all(s[3] == 1 for s in found)
    vec = triton_rows.vector(*(s for strides in found for s in strides[:3])) if unit else 1
    return [n for s in found for n in (s[0] // vec, s[1] // vec, s[2] // vec, s[3])], vec, unit


class _Row(NamedTuple):
    """What the kernels know as D, SECTIONS, R and HALF."""

    dim: int
    sections: int
    angles: int
    half: bool


def _row(dim: int, angles: _Angles, layout: str, sections: int) -> _Row:
    if angles.cos is None:
        return _Row(dim, 1, 0, False)
    return _Row(dim, sections, angles.period, layout == "half")


def _one_head(
    xs: Sequence[Tensor | None], heads: set[int], angles: _Angles, row: _Row, hidden: bool
) -> bool:
    """Whether a row over the hidden size lies in one piece: it is then cut as one head, its angles periodic."""
    return (
        hidden
        and len(heads) == 1
        and not angles.heads
        and all(x is None or x.shape[2] == 1 or x.stride(2) == row.dim * x.stride(3) for x in xs)
    )


class _Tile(NamedTuple):
    heads: int
    blocks: int
    parts: tuple[tuple[int, int, int, int], ...]
    block_n: int


def _tiles(
    q: Tensor,
    k: Tensor | None,
    grads: Sequence[Tensor | None],
    angles: _Angles,
    row: _Row,
    hidden: bool,
) -> tuple[_Tile, _Tile, int, _Row]:
    """How q and k are cut, the warps, and the row as it is cut."""
    q_heads = q.shape[2]
    k_heads = q_heads if k is None else k.shape[2]
    if _one_head((q, k, *grads), {q_heads, k_heads}, angles, row, hidden):
        row = _Row(q_heads * row.dim, q_heads * row.sections, q_heads * row.angles, row.half)
        q_heads = k_heads = 1
    heads = max(q_heads, k_heads)
    config = triton_tuning.choose(
        "qk_norm_rope.backward" if grads else "qk_norm_rope.forward",
        (heads, *row, hidden),
        _configure(heads, row, hidden, len(grads) > 0),
    )
    q_tile = _tile(q_heads, row, hidden, config)
    return q_tile, _tile(k_heads, row, hidden, config), config.num_warps, row


class _Config(NamedTuple):
    """`held`: values of a tile of several tokens that a thread holds, at most."""

    num_warps: int
    held: int


@functools.cache
def _configure(heads: int, row: _Row, hidden: bool, backward: bool) -> _Config:
    """Enough warps that a thread holds 40 channels at most, or 20 backward, where it also carries their sums."""
    held = 16 if backward else 32
    if not hidden:
        return _Config(4, held)
    width, warps = heads * row.dim, 4
    while width > (20 if backward else 40) * 32 * warps and warps < 16:
        warps *= 2
    return _Config(warps, held)


def _candidates(key: triton_tuning.Key, default: _Config) -> list[_Config]:
    """Half and twice the warps; half and twice the tokens a tile."""
    heads, *row, hidden = cast(tuple[int, ...], key)
    warps, held = default
    found = [default, _Config(max(1, warps // 2), held), _Config(min(16, 2 * warps), held)]
    found += [_Config(warps, held // 2), _Config(warps, 2 * held)]
    tiles = {(c.num_warps, _tile(heads, _Row(*row), bool(hidden), c).block_n): c for c in reversed(found)}  # fmt: skip
    return list(reversed(tiles.values()))


triton_tuning.CANDIDATES |= {
    "qk_norm_rope.forward": _candidates,
    "qk_norm_rope.backward": _candidates,
}


@functools.cache
def _tile(heads: int, row: _Row, hidden: bool, config: _Config) -> _Tile:
    pairs = triton_rows.split(row.sections * ((row.dim // row.sections + 1) // 2))
    if hidden:
        head_parts = triton_rows.split(heads)
    else:
        fits = heads & -heads
        head_parts = (min(fits, 8) if fits > 1 else min(triton_rows.power_of_two(heads), 4),)
    parts = tuple(
        (sum(head_parts[:i]), h, sum(pairs[:j]), p)
        for i, h in enumerate(head_parts)
        for j, p in enumerate(pairs)
    )
    width = 2 * sum(h * p for _, h, _, p in parts)
    block_n = 1
    while block_n < 32 and 2 * block_n * width <= config.held * 32 * config.num_warps:
        block_n *= 2
    return _Tile(heads, 1 if hidden else triton.cdiv(heads, head_parts[0]), parts, block_n)


def _programs(x: Tensor | None, tile: _Tile, per_core: int, most: int) -> tuple[int, int, int]:
    """(programs, those a sample and head block, tokens of one)."""
    if x is None or x.numel() == 0:
        return 0, 1, 1
    samples, tokens = x.shape[:2]
    slots = per_core * triton_launch.multiprocessors(x)
    chunk = tile.block_n
    while chunk < most * tile.block_n and samples * tokens * tile.blocks > chunk * slots:
        chunk *= 2
    chunks = triton.cdiv(tokens, chunk)
    return samples * chunks * tile.blocks, chunks, chunk
