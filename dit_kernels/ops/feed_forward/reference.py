"""Bias and activation of the feed-forward in plain torch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def supports(*args: Any) -> str | None:
    return None


def forward(
    x: Tensor,  # [..., F], gated [..., 2F]
    bias: Tensor | None,  # x's last dimension
    act: str,  # "gelu-tanh" | "gelu-none" | "swiglu-first" | "swiglu-second"
    stats: bool,
) -> list[Tensor]:
    """[y]"""
    exact = torch.promote_types(x.dtype, torch.float32)
    return [_activate(x.to(exact), None if bias is None else bias.to(exact), act).to(x.dtype)]


def eager(x: Tensor, bias: Tensor | None, act: str) -> list[Tensor]:
    """The formula computed in the input\'s own dtype: what the accuracy rule compares with."""
    return [_activate(x, bias, act).to(x.dtype)]


def _activate(x: Tensor, bias: Tensor | None, act: str) -> Tensor:
    if bias is not None:
        x = x + bias
    kind, option = act.split("-")
    if kind == "gelu":
        return F.gelu(x, approximate=option)
    first, second = x.chunk(2, dim=-1)
    return F.silu(first) * second if option == "first" else first * F.silu(second)


def cost(x: Tensor, bias: Tensor | None, act: str, *args: Any) -> dict[str, tuple[int, int]]:
    """(FLOPs, least bytes): backward reads x and the gradient and writes dx."""
    read = x.numel() * x.element_size()
    written = read if act.startswith("gelu") else read // 2
    return {"forward": (0, read + written), "backward": (0, 2 * read + written)}


def example_inputs(
    dtype: torch.dtype, device: str = "cpu"
) -> dict[str, tuple[str, dict[str, Any]]]:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    return {
        "gelu-tanh": ("gelu_bias", dict(x=randn(2, 7, 48), bias=randn(48))),
        "gelu-erf": ("gelu_bias", dict(x=randn(2, 5, 33), approximate="none")),
        "swiglu-first": ("swiglu", dict(x=randn(2, 7, 44), bias=randn(44))),
        "swiglu-second-strided": ("swiglu", dict(x=randn(3, 5, 60)[..., ::2], gate="second")),
    }
