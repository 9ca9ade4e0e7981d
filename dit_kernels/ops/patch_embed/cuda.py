"""patch_embed by csrc/patch_embed.cu: products of tiles, on tensor cores where both operands are of one 16-bit dtype."""

from __future__ import annotations

import math

from torch import Tensor

from dit_kernels.ops import cuda_extension, gradients
from dit_kernels.ops.strides import adjacent


def supports(
    video: Tensor, weight: Tensor, bias: Tensor | None, pos_embed: Tensor | None
) -> str | None:
    channels, values = weight.shape[0], math.prod(weight.shape[1:])
    if not channels * values:
        return f"weight has no elements: {list(weight.shape)}"
    if channels > 2**23 or values > 2**23:
        return f"weight has at most 2^23 channels and values a patch; got {list(weight.shape)}"
    if max(video.shape) >= 2**31:
        return f"an axis of the video is shorter than 2^31; got {list(video.shape)}"
    return cuda_extension.unsupported(video, weight, bias, pos_embed)


def forward(
    video: Tensor, weight: Tensor, bias: Tensor | None, pos_embed: Tensor | None, stats: bool
) -> list[Tensor]:
    samples, _, frames, height, width = video.shape
    channels, _, pt, ph, pw = weight.shape
    tokens = (frames // pt) * (height // ph) * (width // pw)
    out = video.new_empty((samples, tokens, channels))
    if samples * tokens:
        cuda_extension.kernels().patch_embed_fwd(
            *cuda_extension.where(video), video, weight.contiguous(), adjacent(bias), pos_embed, out
        )
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
    results = gradients.empty((video, weight, bias, pos_embed), needs)
    dvideo, dweight, dbias, dpos = results
    (dtokens,) = grads
    if dtokens is None or dtokens.numel() == 0:
        return [t.zero_() for t in results if t is not None]
    kernels, where, weight = (
        cuda_extension.kernels(),
        cuda_extension.where(video),
        weight.contiguous(),
    )
    if dvideo is not None:
        kernels.patch_embed_bwd_video(*where, dvideo, weight, dtokens)
    if dweight is not None or dbias is not None:
        rows, values = dtokens.shape[0] * dtokens.shape[1], weight[0].numel()
        blocks = -(-weight.shape[0] // 128) * (-(-values // 64) if dweight is not None else 1)
        slots = 2 * cuda_extension.multiprocessors(video)
        chunk = gradients.rows_of_a_program(rows, blocks, slots, 64)
        chunks = -(-rows // chunk)
        weight_sums = gradients.partial_sums(dweight, chunks)
        bias_sums = gradients.partial_sums(dbias, chunks)
        kernels.patch_embed_bwd_weight(
            *where, video, weight, dtokens, chunk, weight_sums, bias_sums
        )
        for sums, out in ((weight_sums, dweight), (bias_sums, dbias)):
            if sums is not None:
                kernels.add_rows(*where, sums, out, 1, *sums.shape)
    if dpos is not None:
        kernels.patch_embed_bwd_pos(*where, video, weight, dtokens, dpos)
    return [t for t in results if t is not None]
