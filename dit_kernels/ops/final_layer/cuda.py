"""final_layer by csrc/final_layer.cu: norm, modulation, projection and unpatchify by products of tiles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dit_kernels.ops import cuda_extension

_NORMS = {"rms": 1, "layer": 2}


def supports(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *statics: object,
) -> str | None:
    if 0 in weight.shape:
        return f"weight has no elements: {list(weight.shape)}"
    if max(weight.shape) > 2**23:
        return f"weight has at most 2^23 values a patch and channels; got {list(weight.shape)}"
    if x.shape[1] >= 2**31:
        return f"a sample has less than 2^31 tokens; got {list(x.shape)}"
    return cuda_extension.unsupported(x, shift, scale, weight, bias)


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
    size = [g * p for g, p in zip(grid, patch_size, strict=True)]
    video = x.new_empty((x.shape[0], channels, *size))
    saved = []
    if stats:
        count = 2 if norm == "layer" else 1
        saved = [x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(count)]
    if x.numel():
        plan = _plan(x, shift, scale, video, grid, patch_size, channels, layout, norm, eps)
        cuda_extension.kernels().final_layer_fwd(
            *cuda_extension.where(x), *plan, x, shift, scale, weight.contiguous(), _vector(bias), video,
            *_statistics(saved, norm),
        )  # fmt: skip
    return [video, *saved]


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
    dx, dshift, dscale, dweight, dbias = results = [
        t.new_empty(t.shape) if t is not None and need else None
        for t, need in zip((x, shift, scale, weight, bias), needs, strict=True)
    ]
    (dvideo,) = grads
    if dvideo is None or x.numel() == 0:
        return [t.zero_() for t in results if t is not None]
    samples, tokens, width = x.shape
    kernels, where = cuda_extension.kernels(), cuda_extension.where(x)
    plan = _plan(x, shift, scale, dvideo, grid, patch_size, channels, layout, norm, eps)
    arguments = (x, shift, scale, weight.contiguous(), dvideo, *_statistics(saved, norm))

    if any(t is not None for t in results[:3]):
        lengths = [_length(m, tokens) for m in (shift, scale)]
        segment = math.gcd(tokens, *(n for n in lengths if n > 1))
        chunks = -(-segment // 128)
        blocks = samples * (tokens // segment) * chunks
        direct: list[Tensor | None] = []
        sums: list[Tensor | None] = []
        for gradient, length in ((dshift, lengths[0]), (dscale, lengths[1])):
            token = gradient is not None and length == 1
            direct.append(gradient if token else None)
            rows = None
            if gradient is not None and not token:
                rows = x.new_empty((blocks, width), dtype=torch.float32)
            sums.append(rows)
        kernels.final_layer_bwd_rows(*where, *plan, *arguments, segment, dx, *direct, *sums)
        for gradient, rows, length in zip((dshift, dscale), sums, lengths, strict=True):
            if rows is not None:
                per_group = length // segment * chunks
                kernels.add_rows(*where, rows, gradient, blocks // per_group, per_group, width)

    if dweight is not None or dbias is not None:
        rows_of_x, values = samples * tokens, weight.shape[0]
        tiles = (-(-width // 128) if dweight is not None else 1) * -(-values // 64)
        slots = 2 * cuda_extension.multiprocessors(x)
        pieces = max(1, min(slots // tiles, -(-rows_of_x // 256), 65535))
        chunk = 64 * -(-rows_of_x // (64 * pieces))
        chunks = -(-rows_of_x // chunk)
        weight_sums = bias_sums = None
        if dweight is not None:
            weight_sums = x.new_empty((chunks, weight.numel()), dtype=torch.float32)
        if dbias is not None:
            bias_sums = x.new_empty((chunks, values), dtype=torch.float32)
        kernels.final_layer_bwd_weight(*where, *plan, *arguments, chunk, weight_sums, bias_sums)
        for rows, gradient in ((weight_sums, dweight), (bias_sums, dbias)):
            if rows is not None:
                kernels.add_rows(*where, rows, gradient, 1, *rows.shape)
    return [t for t in results if t is not None]


def _length(m: Tensor | None, tokens: int) -> int:
    """Tokens that share a row; 0: there is no row."""
    if m is None:
        return 0
    return tokens // m.shape[1] if m.dim() == 3 else tokens


def _modulation(m: Tensor | None, samples: int, tokens: int) -> list[int]:
    """Strides of sample, group and channel, tokens a group, indexed, dtype."""
    if m is None:
        return [0, 0, 0, 1, 0, 0]
    group = m.stride(1) if m.dim() == 3 and m.shape[1] > 1 else 0
    sample = m.stride(0) if samples > 1 else 0
    code = cuda_extension.dtype_code(m)
    return [sample, group, m.stride(-1), max(1, _length(m, tokens)), 0, code]


def _plan(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    video: Tensor,
    grid: Sequence[int],
    patch_size: Sequence[int],
    channels: int,
    layout: str,
    norm: str,
    eps: float,
) -> tuple[Any, ...]:
    """What a launch is but for its tensors."""
    samples, tokens, width = x.shape
    sizes = dict(zip("thwc", (*patch_size, channels), strict=True))
    steps, step = {}, 1
    for axis in reversed(layout.split()):
        steps[axis] = step
        step *= sizes[axis]
    sample, token, channel = (
        s if n > 1 else (1 if axis == 2 else 0)
        for axis, (n, s) in enumerate(zip(x.shape, x.stride(), strict=True))
    )
    return (
        samples, list(grid), list(patch_size), channels, [steps[axis] for axis in "thwc"], width,
        _NORMS[norm], eps, [sample, token, channel, cuda_extension.dtype_code(x)],
        _modulation(shift, samples, tokens), _modulation(scale, samples, tokens), list(video.stride()),
    )  # fmt: skip


def _statistics(saved: list[Tensor], norm: str) -> tuple[Tensor | None, Tensor | None]:
    if not saved:
        return None, None
    return (saved[0], saved[1]) if norm == "layer" else (None, saved[0])


def _vector(bias: Tensor | None) -> Tensor | None:
    """[K], nothing next to x."""
    return bias if bias is None or bias.stride(0) == 1 else bias.contiguous()
