"""final_layer by csrc/final_layer.cu: norm, modulation, projection and unpatchify by products of tiles."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from dit_kernels.ops import cuda_extension, gradients, row_statistics
from dit_kernels.ops.strides import adjacent
from dit_kernels.ops.unpatchify.patches import empty_video, steps

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
    video = empty_video(x, grid, patch_size, channels)
    saved = row_statistics.empty(x, 2, norm) if stats else []
    if x.numel():
        cuda_extension.kernels().final_layer_fwd(
            *cuda_extension.where(x), grid, patch_size, channels,
            steps(layout, *patch_size, channels), _NORMS[norm], eps, x, shift, scale,
            weight.contiguous(), adjacent(bias), video, *row_statistics.mean_and_rstd(saved),
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
    results = gradients.empty((x, shift, scale, weight, bias), needs)
    dx, dshift, dscale, dweight, dbias = results
    (dvideo,) = grads
    if dvideo is None or x.numel() == 0:
        return [t.zero_() for t in results if t is not None]
    samples, tokens, width = x.shape
    kernels, where = cuda_extension.kernels(), cuda_extension.where(x)
    arguments = (
        grid, patch_size, channels, steps(layout, *patch_size, channels), _NORMS[norm], eps,
        x, shift, scale, weight.contiguous(), dvideo, *row_statistics.mean_and_rstd(saved),
    )  # fmt: skip

    if any(t is not None for t in results[:3]):
        lengths = [_length(m, tokens) for m in (shift, scale)]
        segment = math.gcd(tokens, *(n for n in lengths if n > 1))
        chunks = -(-segment // 128)
        blocks = samples * (tokens // segment) * chunks
        pairs = list(zip((dshift, dscale), lengths, strict=True))
        direct = [gradient if length == 1 else None for gradient, length in pairs]
        sums = [
            None if length == 1 else gradients.partial_sums(gradient, blocks, width)
            for gradient, length in pairs
        ]
        kernels.final_layer_bwd_rows(*where, *arguments, segment, dx, *direct, *sums)
        for rows, (gradient, length) in zip(sums, pairs, strict=True):
            if rows is not None:
                per_group = length // segment * chunks
                kernels.add_rows(*where, rows, gradient, blocks // per_group, per_group, width)

    if dweight is not None or dbias is not None:
        tiles = (-(-width // 128) if dweight is not None else 1) * -(-weight.shape[0] // 64)
        slots = 2 * cuda_extension.multiprocessors(x)
        chunk = gradients.rows_of_a_program(samples * tokens, tiles, slots, 64)
        chunks = -(-(samples * tokens) // chunk)
        weight_sums = gradients.partial_sums(dweight, chunks)
        bias_sums = gradients.partial_sums(dbias, chunks)
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
