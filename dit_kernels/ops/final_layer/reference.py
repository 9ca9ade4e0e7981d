"""The DiT's last layer in plain torch: norm and modulation, projection, tokens to video."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def supports(*args: Any) -> str | None:
    return None


def forward(
    x: Tensor,  # [B, N, C]
    shift: Tensor | None,  # [B, C], [B, G, C] or [B, N, C]
    scale: Tensor | None,
    weight: Tensor,  # [pt * ph * pw * channels, C]
    bias: Tensor | None,
    grid: Sequence[int],
    patch_size: Sequence[int],
    channels: int,
    layout: str,
    norm: str,
    eps: float,
    stats: bool,
) -> list[Tensor]:
    """[video [B, channels, F, Y, X]], then with stats [mean], rstd"""
    exact = torch.promote_types(x.dtype, torch.float32)
    outputs = _layer(
        x, shift, scale, weight, bias, grid, patch_size, channels, layout, norm, eps, exact
    )
    if stats:
        row = x.to(exact)
        if norm == "layer":
            mean = row.mean(-1, keepdim=True)
            outputs.append(mean[..., 0])
            row = row - mean
        outputs.append(torch.rsqrt(row.square().mean(-1) + eps))
    return outputs


def eager(x: Tensor, *args: Any) -> list[Tensor]:
    """The formula computed in the input\'s own dtype: what the accuracy rule compares with."""
    return _layer(x, *args, dtype=x.dtype)  # type: ignore[misc]


def _layer(
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
    dtype: torch.dtype,
) -> list[Tensor]:
    def rows(modulation: Tensor) -> Tensor:
        modulation = modulation.to(dtype)
        if modulation.dim() == 2:
            return modulation[:, None]
        groups = modulation.shape[1]
        return modulation.repeat_interleave(x.shape[1] // groups, dim=1) if groups else modulation

    size = x.shape[-1:]
    y = x.to(dtype)
    y = F.layer_norm(y, size, eps=eps) if norm == "layer" else F.rms_norm(y, size, eps=eps)
    if scale is not None:
        y = y * (1 + rows(scale))
    if shift is not None:
        y = y + rows(shift)
    y = F.linear(y, weight.to(dtype), None if bias is None else bias.to(dtype))
    axes = layout.split()
    sizes = dict(zip("thwc", (*patch_size, channels), strict=True))
    parts = y.unflatten(1, tuple(grid)).unflatten(4, tuple(sizes[axis] for axis in axes))
    t, h, w, c = (4 + axes.index(axis) for axis in "thwc")
    video = parts.permute(0, c, 1, t, 2, h, 3, w)  # [B, c, Gt, pt, Gh, ph, Gw, pw]
    return [video.flatten(6, 7).flatten(4, 5).flatten(2, 3).to(x.dtype)]


def cost(
    x: Tensor, shift: Any, scale: Any, weight: Tensor, *args: Any
) -> dict[str, tuple[int, int]]:
    """(FLOPs, least bytes): one product forward, two backward."""
    tokens = x.shape[0] * x.shape[1]
    flops = 2 * tokens * weight.numel()
    read = x.numel() * x.element_size() + weight.numel() * weight.element_size()
    video = tokens * weight.shape[0] * x.element_size()
    return {"forward": (flops, read + video), "backward": (2 * flops, 2 * read + video)}


def example_inputs(
    dtype: torch.dtype, device: str = "cpu"
) -> dict[str, tuple[str, dict[str, Any]]]:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    image = dict(grid=(1, 3, 4), patch_size=(1, 2, 2), channels=8)
    video = dict(grid=(2, 2, 3), patch_size=(2, 1, 2), channels=3)
    shift, scale = randn(2, 96).chunk(2, dim=-1)
    return {
        "dit": ("final_layer", dict(
            x=randn(2, 12, 48), shift=shift, scale=scale, weight=randn(32, 48), bias=randn(32), **image)),
        "frames-rms": ("final_layer", dict(
            x=randn(1, 12, 40), shift=randn(1, 2, 40), scale=randn(1, 2, 40), weight=randn(12, 40),
            bias=None, **video, layout="c t h w", norm="rms", eps=1e-5)),
    }  # fmt: skip
