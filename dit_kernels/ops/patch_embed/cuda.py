"""patch_embed by csrc/patch_embed.cu: products of tiles, on tensor cores where both operands are of one 16-bit dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dit_kernels.ops import cuda_extension


def supports(
    video: Tensor, weight: Tensor, bias: Tensor | None, pos_embed: Tensor | None
) -> str | None:
    if 0 in weight.shape:
        return f"weight has no elements: {list(weight.shape)}"
    if max(weight[0].numel(), weight.shape[0]) > 2**23:
        return f"weight has at most 2^23 channels and values a patch; got {list(weight.shape)}"
    if max(video.shape) >= 2**31:
        return f"an axis of the video is shorter than 2^31; got {list(video.shape)}"
    return cuda_extension.unsupported(video, weight, bias, pos_embed)


def forward(
    video: Tensor, weight: Tensor, bias: Tensor | None, pos_embed: Tensor | None, stats: bool
) -> list[Tensor]:
    grid = _grid(video, weight)
    out = video.new_empty((video.shape[0], grid[0] * grid[1] * grid[2], weight.shape[0]))
    if out.numel():
        weight, bias = weight.contiguous(), _vector(bias)
        cuda_extension.kernels().patch_embed_fwd(
            *cuda_extension.where(video), *_sizes(video, weight), video, list(video.stride()),
            weight, bias, pos_embed, [0, 0] if pos_embed is None else list(pos_embed.stride()), out,
        )  # fmt: skip
    return [out]


def backward(
    grads: list[Tensor | None],
    video: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    saved: list[Tensor],
    needs: list[bool],
) -> list[Tensor]:
    dvideo, dweight, dbias, dpos = results = [
        t.new_empty(t.shape) if t is not None and need else None
        for t, need in zip((video, weight, bias, pos_embed), needs, strict=True)
    ]
    (dtokens,) = grads
    if dtokens is None or dtokens.numel() == 0:
        return [t.zero_() for t in results if t is not None]
    kernels, where, sizes = cuda_extension.kernels(), cuda_extension.where(video), _sizes(video, weight)  # fmt: skip
    strides = list(dtokens.stride())
    if dvideo is not None:
        kernels.patch_embed_bwd_video(
            *where, *sizes, dvideo, list(dvideo.stride()), weight.contiguous(), dtokens, strides
        )
    if dweight is not None or dbias is not None:
        rows, values = dtokens.shape[0] * dtokens.shape[1], weight[0].numel()
        blocks = -(-weight.shape[0] // 128) * (-(-values // 64) if dweight is not None else 1)
        chunk = _chunk(rows, blocks, 2 * cuda_extension.multiprocessors(video))
        chunks = -(-rows // chunk)
        weight_sums = bias_sums = None
        if dweight is not None:
            weight_sums = video.new_empty((chunks, weight.numel()), dtype=torch.float32)
        if dbias is not None:
            bias_sums = video.new_empty((chunks, weight.shape[0]), dtype=torch.float32)
        kernels.patch_embed_bwd_weight(
            *where, *sizes, video, list(video.stride()), dtokens, strides, chunk, weight_sums, bias_sums
        )  # fmt: skip
        for sums, out in ((weight_sums, dweight), (bias_sums, dbias)):
            if sums is not None:
                kernels.add_rows(*where, sums, out, 1, *sums.shape)
    if dpos is not None:
        kernels.patch_embed_bwd_pos(*where, *sizes, dtokens, strides, dpos)
    return [t for t in results if t is not None]


def _grid(video: Tensor, weight: Tensor) -> list[int]:
    return [n // p for n, p in zip(video.shape[2:], weight.shape[2:], strict=True)]


def _sizes(video: Tensor, weight: Tensor) -> tuple[Any, ...]:
    """Samples, grid, patch, channels of the video and of a token."""
    return (
        video.shape[0],
        _grid(video, weight),
        list(weight.shape[2:]),
        video.shape[1],
        weight.shape[0],
    )


def _chunk(rows: int, blocks: int, slots: int) -> int:
    """Patches of one block of the weight gradient: as many blocks as fill the GPU, of at least 256."""
    pieces = max(1, min(slots // blocks, -(-rows // 256), 65535))
    chunk = -(-rows // pieces)
    return -(-chunk // 64) * 64


def _vector(bias: Tensor | None) -> Tensor | None:
    """[C], nothing next to the tokens."""
    return bias if bias is None or bias.stride(0) == 1 else bias.contiguous()
