"""Patch embedding in plain torch: each patch flattened, one matrix product, bias and position added."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def supports(*args: Any) -> str | None:
    return None


def forward(
    video: Tensor,  # [B, Cin, F, Y, X]
    weight: Tensor,  # [C, Cin, pt, ph, pw]
    bias: Tensor | None,  # [C]
    pos_embed: Tensor | None,  # [N, C] or [1, N, C]
    stats: bool,
) -> list[Tensor]:
    """[tokens [B, N, C]]"""
    return [_embed(video, weight, bias, pos_embed, torch.promote_types(video.dtype, torch.float32))]


def eager(
    video: Tensor, weight: Tensor, bias: Tensor | None, pos_embed: Tensor | None
) -> list[Tensor]:
    """The formula computed in the input\'s own dtype: what the accuracy rule compares with."""
    return [_embed(video, weight, bias, pos_embed, video.dtype)]


def _embed(
    video: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    channels, _, pt, ph, pw = weight.shape
    patches = (
        video.to(dtype)
        .unflatten(4, (-1, pw))
        .unflatten(3, (-1, ph))
        .unflatten(2, (-1, pt))  # [B, Cin, Gt, pt, Gh, ph, Gw, pw]
        .permute(0, 2, 4, 6, 1, 3, 5, 7)
        .flatten(4)
        .flatten(1, 3)  # [B, N, Cin * pt * ph * pw]
    )
    tokens = patches @ weight.to(dtype).reshape(channels, -1).T
    for addend in (bias, pos_embed):
        if addend is not None:
            tokens = tokens + addend.to(dtype)
    return tokens.to(video.dtype)


def cost(
    video: Tensor, weight: Tensor, bias: Tensor | None, pos_embed: Tensor | None, *args: Any
) -> dict[str, tuple[int, int]]:
    """(FLOPs, least bytes): one product forward; weight's and video's backward."""
    volume = weight.shape[2] * weight.shape[3] * weight.shape[4]
    tokens = video.numel() // max(1, video.shape[1] * volume)
    flops = 2 * tokens * weight.numel()
    read = video.numel() * video.element_size() + weight.numel() * weight.element_size()
    read += 0 if pos_embed is None else pos_embed.numel() * pos_embed.element_size()
    written = tokens * weight.shape[0] * video.element_size()
    return {"forward": (flops, read + written), "backward": (2 * flops, 2 * read + written)}


def example_inputs(
    dtype: torch.dtype, device: str = "cpu"
) -> dict[str, tuple[str, dict[str, Any]]]:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    channels_last = randn(2, 4, 6, 10, 3).permute(0, 4, 1, 2, 3)
    return {
        "image": ("patch_embed", dict(
            video=randn(2, 4, 8, 8), weight=randn(24, 4, 2, 2), bias=randn(24), pos_embed=randn(16, 24))),
        "video": ("patch_embed", dict(
            video=randn(1, 3, 4, 6, 10), weight=randn(40, 3, 1, 2, 2), bias=randn(40))),
        "tubelet-channels-last": ("patch_embed", dict(
            video=channels_last, weight=randn(33, 3, 2, 3, 5), pos_embed=randn(1, 8, 33))),
    }  # fmt: skip
