"""The DiT's last layer in Triton: how a call is cut and launched. The kernels: `triton_kernels`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import triton
from torch import Tensor

from dit_kernels.ops import gradients, row_statistics, triton_launch, triton_rows, triton_tuning
from dit_kernels.ops.final_layer.triton_kernels import (
    _final_layer_bwd_sums_kernel,
    _final_layer_bwd_x_kernel,
    _final_layer_fwd_kernel,
)
from dit_kernels.ops.strides import adjacent
from dit_kernels.ops.unpatchify.patches import empty_video, steps

# fewer tokens than this a modulation row, and its gradient is computed a token at a time
_LEAST_GROUP = 16
_MOST_VALUES = 256


def supports(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *statics: object,
) -> str | None:
    if x.shape[2] == 0:
        return "x has no channels"
    if not 0 < weight.shape[0] <= _MOST_VALUES:
        return f"a patch may have 1 to {_MOST_VALUES} values; got {weight.shape[0]}"
    return triton_launch.unsupported((x, shift, scale, weight, bias))


def forward(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    grid: Sequence[int],
    patch_size: Sequence[int],
    channels: int,
    layout: str,
    norm: str,
    eps: float,
    stats: bool,
) -> list[Tensor]:
    video = empty_video(x, grid, patch_size, channels)
    saved = row_statistics.empty(x, 2, norm) if stats else []
    if x.numel() == 0:
        return [video, *saved]
    tensors = (x, shift, scale, weight, adjacent(bias), video)
    native, precision = _dot(x, weight)
    plan = _plans(
        tensors, tuple(grid), tuple(patch_size), channels, layout, norm, eps, stats, native, precision
    )  # fmt: skip
    triton_launch.run(_final_layer_fwd_kernel, plan, *tensors, *row_statistics.mean_and_rstd(saved))
    return [video, *saved]


def _plan(
    tensors: Sequence[Tensor | None],
    grid: tuple[int, ...],
    patch_size: tuple[int, ...],
    channels: int,
    layout: str,
    norm: str,
    eps: float,
    stats: bool,
    native: bool,
    precision: str,
) -> triton_launch.Plan:
    """Of the forward kernel."""
    x, shift, scale, weight, _, video = tensors
    x, weight, video = cast(Tensor, x), cast(Tensor, weight), cast(Tensor, video)
    call = _arrange(x, shift, scale, weight, _LEAST_GROUP + x.shape[1])
    key = (x.shape[2], weight.shape[0], native)
    tiles = triton_tuning.choose("final_layer.forward", key, _NATIVE if native else _FLOAT32)
    block_k = max(16, min(128, triton_rows.power_of_two(weight.shape[0])))
    programs = (
        x.shape[0] * triton.cdiv(x.shape[1], tiles.block_m),
        triton.cdiv(weight.shape[0], block_k),
    )
    numbers = (
        x.shape[1], grid[1], grid[2], eps, *call.x, *call.shift, *call.scale, *weight.stride(), *video.stride(),
        x.shape[2], weight.shape[0], *patch_size, _rows(layout, patch_size, channels), norm == "layer",
        *call.access, weight.is_contiguous(), call.shift_form, call.scale_form, native, precision,
        tiles.block_m, tiles.block_c, block_k,
    )  # fmt: skip
    options = dict(num_warps=tiles.num_warps, num_stages=tiles.num_stages)
    return triton_launch.Plan(programs, numbers, options, {})


_plans = triton_launch.Plans(_plan)


class _Tiles(NamedTuple):
    """Tokens and channels a tile of the forward, warps, and stages of the load pipeline."""

    block_m: int
    block_c: int
    num_warps: int
    num_stages: int


_NATIVE, _FLOAT32 = _Tiles(64, 128, 8, 2), _Tiles(32, 32, 4, 2)


def _candidates(key: triton_tuning.Key, default: _Tiles) -> list[_Tiles]:
    """Narrower and wider tiles, fewer warps, a stage more."""
    block_m, block_c, warps, stages = default
    return [
        default, _Tiles(block_m, block_c // 2, warps // 2, stages), _Tiles(2 * block_m, block_c // 2, warps, stages),
        _Tiles(block_m, block_c // 2, warps, stages + 1), _Tiles(block_m, block_c, warps, stages + 1),
    ]  # fmt: skip


triton_tuning.CANDIDATES["final_layer.forward"] = _candidates


def backward(
    grads: list[Tensor | None],
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    saved: list[Tensor],
    grid: Sequence[int],
    patch_size: Sequence[int],
    channels: int,
    layout: str,
    norm: str,
    eps: float,
    needs: list[bool],
) -> list[Tensor]:
    results = gradients.empty((x, shift, scale, weight, bias), needs)
    dx, dshift, dscale, dweight, dbias = results
    (dvideo,) = grads
    if dvideo is None or x.numel() == 0:
        return [t.zero_() for t in results if t is not None]
    samples, tokens, width = x.shape
    values = weight.shape[0]
    mean, rstd = row_statistics.mean_and_rstd(saved)
    native, precision = _dot(x, weight)
    block_m, block_c = (64, 64) if native else (32, 32)
    block_k = max(16, triton_rows.power_of_two(values))
    rows = _rows(layout, patch_size, channels)
    compact = None
    if any(t is not None for t in results[1:]):
        compact = x.new_empty((samples * tokens, values))

    call = _arrange(x, shift, scale, weight, _LEAST_GROUP + tokens)
    triton_launch.launch(
        _final_layer_bwd_x_kernel, (samples * triton.cdiv(tokens, block_m),),
        dvideo, x, scale, weight, mean, rstd, dx, compact,
        tokens, grid[1], grid[2], *call.x, *call.scale, *weight.stride(), *dvideo.stride(),
        width, values, *patch_size, rows, norm == "layer", *call.access, weight.is_contiguous(), call.scale_form,
        native, precision, block_m, block_c, block_k, num_warps=8 if native else 4, num_stages=3,
    )  # fmt: skip
    if compact is None:
        return [t for t in results if t is not None]

    call = _arrange(x, shift, scale, weight, _LEAST_GROUP)
    architecture = triton_launch.architecture(x.device)
    if block_k > (64 if architecture in ("sm_90", "sm_100") else 32):
        block_m = 32  # its sums [BLOCK_C, BLOCK_K] fill the registers
    # on AMD a thread of eight warps has half the registers of one of four
    warps = 4 if not native or (architecture == "amd" and block_k > 16) else 8
    segment = call.segment
    pieces = triton.cdiv(segment, 256)
    chunk = triton.cdiv(triton.cdiv(segment, pieces), block_m) * block_m
    pieces = triton.cdiv(segment, chunk)
    chunks = samples * tokens // segment * pieces
    columns = triton.cdiv(width, block_c)
    ranges = max(1, min(chunks, 4 * triton_launch.multiprocessors(x) // columns))
    per_range = triton.cdiv(chunks, ranges)
    ranges = triton.cdiv(chunks, per_range)

    def rows_of(gradient: Tensor | None, form: str) -> Tensor | None:
        """What the modulation's gradient is added from; itself where each token has a row of its own."""
        if gradient is not None and form == "token" and gradient.numel() == x.numel():
            return gradient
        programs = samples * tokens if form == "token" else chunks
        return gradients.partial_sums(gradient, programs, width)

    weight_sums = gradients.partial_sums(dweight, ranges)
    bias_sums = gradients.partial_sums(dbias, ranges)
    shift_sums, scale_sums = rows_of(dshift, call.shift_form), rows_of(dscale, call.scale_form)
    triton_launch.launch(
        _final_layer_bwd_sums_kernel, (columns, ranges),
        compact, x, shift, scale, weight, mean, rstd, weight_sums, bias_sums, shift_sums, scale_sums,
        tokens, segment, pieces, chunk, chunks, per_range, *call.x, *call.shift, *call.scale, *weight.stride(),
        width, values, *patch_size, rows, norm == "layer", *call.access, weight.is_contiguous(),
        call.shift_form, call.scale_form, native, precision, block_m, block_c, block_k, num_warps=warps, num_stages=2,
    )  # fmt: skip
    for sums, gradient in ((weight_sums, dweight), (bias_sums, dbias)):
        if gradient is not None:
            triton_rows.add_rows(sums, gradient)
    for sums, gradient in ((shift_sums, dshift), (scale_sums, dscale)):
        if gradient is not None and sums is not gradient:
            triton_rows.add_rows(sums, gradient, gradient.numel() // width)
    return [t for t in results if t is not None]


class _Call(NamedTuple):
    """Strides, outer ones in vectors, and forms of the modulations: "none", "row" or "token"."""

    x: tuple[int, int, int]
    shift: tuple[int, int, int, int]  # of sample, group and channel; tokens a group
    scale: tuple[int, int, int, int]
    access: tuple[int, bool, int, bool]  # VEC, UNIT of x; M_VEC, M_UNIT of the modulations
    shift_form: str
    scale_form: str
    segment: int  # tokens that share every row of form "row"


def _arrange(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, weight: Tensor, least: int
) -> _Call:
    """`least`: tokens of a group from which on its row is loaded once a tile (one row a sample always is)."""
    unit = x.stride(2) == 1
    vec = triton_rows.vector(*x.stride()[:2]) if unit else 1
    segment = x.shape[1]
    found = []
    for m in (shift, scale):
        if m is None:
            found.append(("none", 0, 0, 1, 1))
            continue
        groups = m.shape[1] if m.dim() == 3 else 1
        length = x.shape[1] // groups
        form = "row" if groups == 1 or length >= least else "token"
        if form == "row":
            segment = math.gcd(segment, length)
        group = m.stride(1) if m.dim() == 3 and groups > 1 else 0
        found.append((form, m.stride(0), group, m.stride(-1), length))
    m_unit = all(f[3] == 1 for f in found)
    m_vec = triton_rows.vector(*(s for f in found for s in f[1:3])) if m_unit else 1
    shift_of, scale_of = ((f[1] // m_vec, f[2] // m_vec, f[3], f[4]) for f in found)
    strides = (x.stride(0) // vec, x.stride(1) // vec, x.stride(2))
    access = (vec, unit, m_vec, m_unit)
    return _Call(strides, shift_of, scale_of, access, found[0][0], found[1][0], segment)


def _dot(x: Tensor, weight: Tensor) -> tuple[bool, str]:
    """(whether products are of 16-bit numbers, the precision of float32 ones)."""
    native = x.dtype == weight.dtype and x.dtype != torch.float32
    return native, "ieee" if native else triton_launch.float32_precision()


def _rows(layout: str, patch_size: Sequence[int], channels: int) -> tuple[int, ...]:
    """Steps of (c, t, h, w) among the weight's rows."""
    t, h, w, c = steps(layout, *patch_size, channels)
    return c, t, h, w
