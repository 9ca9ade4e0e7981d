"""final_layer by csrc/final_layer.cu: norm, modulation, projection and unpatchify by products of tiles."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

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
    values, width = weight.shape
    if not values * width:
        return f"weight has no elements: {list(weight.shape)}"
    if values > 2**23 or width > 2**23:
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
    (gt, gh, gw), (pt, ph, pw) = grid, patch_size
    samples, tokens, width = x.shape
    video = x.new_empty((samples, channels, gt * pt, gh * ph, gw * pw))
    saved = []
    if stats:
        count = 2 if norm == "layer" else 1
        saved = [x.new_empty((samples, tokens), dtype=torch.float32) for _ in range(count)]
    if samples * tokens * width:
        cuda_extension.kernels().final_layer_fwd(
            *cuda_extension.where(x), grid, patch_size, channels,
            _steps(layout, pt, ph, pw, channels), _NORMS[norm], eps,
            x, shift, scale, weight.contiguous(), _vector(bias), video, *_statistics(saved, norm),
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
    arguments = (
        grid, patch_size, channels, _steps(layout, *patch_size, channels), _NORMS[norm], eps,
        x, shift, scale, weight.contiguous(), dvideo, *_statistics(saved, norm),
    )  # fmt: skip

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
        kernels.final_layer_bwd_rows(*where, *arguments, segment, dx, *direct, *sums)
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
        kernels.final_layer_bwd_weight(*where, *arguments, chunk, weight_sums, bias_sums)
        for rows, gradient in ((weight_sums, dweight), (bias_sums, dbias)):
            if rows is not None:
                kernels.add_rows(*where, rows, gradient, 1, *rows.shape)
    return [t for t in results if t is not None]


def _length(m: Tensor | None, tokens: int) -> int:
    """Tokens that share a row; 0: there is no row."""
    if m is None:
        return 0
    return tokens // m.shape[1] if m.dim() == 3 else tokens


@functools.lru_cache(4096)
def _steps(layout: str, pt: int, ph: int, pw: int, channels: int) -> tuple[int, ...]:
    """From one t, h, w and c to the next among the values of a patch."""
    sizes = {"t": pt, "h": ph, "w": pw, "c": channels}
    steps, step = {}, 1
    for axis in reversed(layout.split()):
        steps[axis] = step
        step *= sizes[axis]
    return tuple(steps[axis] for axis in "thwc")


def _statistics(saved: list[Tensor], norm: str) -> tuple[Tensor | None, Tensor | None]:
    if not saved:
        return None, None
    return (saved[0], saved[1]) if norm == "layer" else (None, saved[0])


def _vector(bias: Tensor | None) -> Tensor | None:
    """[K], nothing next to x."""
    return bias if bias is None or bias.stride(0) == 1 else bias.contiguous()
