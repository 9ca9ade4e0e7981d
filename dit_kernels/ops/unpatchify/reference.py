"""Tokens to video in plain torch: one permutation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def supports(*args: Any) -> str | None:
    return None


def forward(
    tokens: Tensor,  # [B, N, pt * ph * pw * channels]
    grid: Sequence[int],
    patch_size: Sequence[int],
    channels: int,
    layout: str,  # "t h w c" in any order
    stats: bool,
) -> list[Tensor]:
    """[video [B, channels, Gt * pt, Gh * ph, Gw * pw]]"""
    axes = layout.split()
    sizes = dict(zip("thwc", (*patch_size, channels), strict=True))
    parts = tokens.unflatten(1, tuple(grid)).unflatten(4, tuple(sizes[axis] for axis in axes))
    t, h, w, c = (4 + axes.index(axis) for axis in "thwc")
    video = parts.permute(0, c, 1, t, 2, h, 3, w)  # [B, c, Gt, pt, Gh, ph, Gw, pw]
    return [video.flatten(6, 7).flatten(4, 5).flatten(2, 3)]


def eager(*args: Any) -> list[Tensor]:
    """The same permutation."""
    return forward(*args, stats=False)  # type: ignore[misc]


def cost(tokens: Tensor, *args: Any) -> dict[str, tuple[int, int]]:
    """(FLOPs, least bytes): each value read once and written once."""
    moved = 2 * tokens.numel() * tokens.element_size()
    return {"forward": (0, moved), "backward": (0, moved)}


def example_inputs(
    dtype: torch.dtype, device: str = "cpu"
) -> dict[str, tuple[str, dict[str, Any]]]:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    image = dict(grid=(1, 3, 5), patch_size=(1, 2, 2), channels=8)
    video = dict(grid=(2, 3, 1), patch_size=(2, 3, 2), channels=3)
    return {
        "dit": ("unpatchify", dict(tokens=randn(2, 15, 32), **image)),
        "hunyuan": ("unpatchify", dict(tokens=randn(1, 6, 36), **video, layout="c t h w")),
        "cosmos-strided": ("unpatchify", dict(
            tokens=randn(2, 6, 72)[..., ::2], **video, layout="h w t c")),
    }  # fmt: skip
