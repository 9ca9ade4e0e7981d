"""QK-norm and rotary embedding in plain torch.

    n = act(norm(q))          over each head, or over the whole hidden size before the heads are split
    (a, b) -> (a cos - b sin, a sin + b cos)        for each rotated pair of channels

`rounding="once"` computes in float32 (float64 for float64 inputs) and rounds once. "eager" rounds where
PyTorch code does: after the norm, after the activation, after the rotation (itself in float32).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def supports(*args: Any) -> str | None:
    return None


def forward(
    q: Tensor,  # [B, N, H, D]
    k: Tensor | None,  # [B, N', H', D]
    q_weight: Tensor
    | None,  # [D] over heads, [H * D] over the hidden size; so k_weight and the biases
    k_weight: Tensor | None,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    cos: Tensor | None,  # [L, R] or [1|B, L, 1|H, R]
    sin: Tensor | None,
    norm: str,  # "rms" | "layer" | "none"
    over: str,  # "head" | "hidden"
    eps: float,
    act: str,  # "none" | "relu"
    layout: str,  # "interleaved" | "half"
    sections: int,
    rope_start: int,
    rounding: str,
    stats: bool,
) -> list[Tensor]:
    """[q, (k)], then with stats the row statistics [(mean), rstd] of q and of k."""
    outputs: list[Tensor] = []
    statistics: list[Tensor] = []
    for x, weight, bias in ((q, q_weight, q_bias), (k, k_weight, k_bias)):
        if x is None:
            continue
        exact = torch.promote_types(x.dtype, torch.float32)
        dtype = exact if rounding == "once" else x.dtype
        y = _norm(x.to(dtype), norm, over, weight, bias, eps)
        if act == "relu":
            y = y.relu()
        if cos is not None and sin is not None:
            y = _rotate(y.to(exact), cos.to(exact), sin.to(exact), layout, sections, rope_start)
        outputs.append(y.to(x.dtype))
        if stats and norm != "none":
            row = x.to(exact) if over == "head" else x.to(exact).flatten(2)
            if norm == "layer":
                mean = row.mean(-1, keepdim=True)
                statistics.append(mean[..., 0])
                row = row - mean
            statistics.append(torch.rsqrt(row.square().mean(-1) + eps))
    return outputs + statistics if stats else outputs


def eager(*args: Any) -> list[Tensor]:
    """The formula as people write it: what the accuracy rule compares with."""
    return forward(*args[:-1], rounding="eager", stats=False)  # type: ignore[misc]


def _norm(
    x: Tensor, kind: str, over: str, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    if kind == "none":
        return x
    row = x if over == "head" else x.flatten(2)
    dtype = row.dtype
    if any(p is not None and p.dtype != dtype for p in (weight, bias)):
        row = row.to(torch.promote_types(dtype, torch.float32))
        weight = None if weight is None else weight.to(row.dtype)
        bias = None if bias is None else bias.to(row.dtype)
    if kind == "layer":
        row = F.layer_norm(row, row.shape[-1:], weight, bias, eps)
    else:
        row = F.rms_norm(row, row.shape[-1:], weight, eps)
        row = row if bias is None else row + bias
    return row.to(dtype).view(x.shape)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, layout: str, sections: int, start: int) -> Tensor:
    if cos.dim() == 2:
        cos, sin = cos[None, :, None], sin[None, :, None]  # [1, L, 1, R]
    stop = start + cos.shape[1]
    half = cos.shape[-1] // sections
    parts = x[:, start:stop].unflatten(-1, (sections, -1))  # [B, L, H, sections, D / sections]
    cos, sin = cos.unflatten(-1, (sections, half)), sin.unflatten(-1, (sections, half))
    turning, still = parts[..., : 2 * half], parts[..., 2 * half :]
    if layout == "interleaved":
        a, b = turning[..., 0::2], turning[..., 1::2]
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
    else:
        a, b = turning[..., :half], turning[..., half:]
        turned = torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)
    turned = torch.cat((turned, still), dim=-1).flatten(-2)
    return torch.cat((x[:, :start], turned, x[:, stop:]), dim=1)


def cost(q: Tensor, k: Tensor | None, *args: Any) -> dict[str, tuple[int, int]]:
    """(FLOPs, least bytes): forward reads and writes q and k; backward also reads the gradients."""
    heads = q.numel() * q.element_size() + (0 if k is None else k.numel() * k.element_size())
    tables = sum(2 * t.numel() * t.element_size() for t in args[4:5] if isinstance(t, Tensor))
    return {"forward": (0, 2 * heads + tables), "backward": (0, 3 * heads + tables)}


def example_inputs(
    dtype: torch.dtype, device: str = "cpu"
) -> dict[str, tuple[str, dict[str, Any]]]:
    """case -> (function, keyword arguments): the forms of the models out there, small."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    def angles(*shape: int) -> dict[str, Tensor]:
        angle = 6.0 * torch.rand(shape, generator=generator)
        kind = torch.float64 if dtype == torch.float64 else torch.float32
        return {"cos": angle.cos().to(device, kind), "sin": angle.sin().to(device, kind)}

    def packed(tokens: int, heads: int, dim: int) -> tuple[Tensor, Tensor]:
        q, k, _ = randn(2, tokens, 3 * heads * dim).unflatten(-1, (3, heads, dim)).unbind(2)
        return q, k

    wan_q, wan_k = packed(7, 3, 16)
    flux_q, flux_k = packed(9, 2, 32)
    cog_q, cog_k = packed(8, 2, 16)
    function = "qk_norm_rope"
    return {
        "wan": (function, dict(
            q=wan_q, k=wan_k, over="hidden", q_weight=randn(48), k_weight=randn(48), **angles(7, 8))),
        "flux-text-first": (function, dict(
            q=flux_q, k=flux_k, q_weight=randn(32), k_weight=randn(32), rope_start=3, **angles(6, 16))),
        "cogvideox": (function, dict(
            q=cog_q, k=cog_k, norm="layer", q_weight=randn(16), k_weight=randn(16), q_bias=randn(16),
            k_bias=randn(16), rope_start=3, **angles(5, 8))),
        "cosmos-half": (function, dict(
            q=randn(2, 6, 2, 16), k=randn(2, 6, 2, 16), q_weight=randn(16), k_weight=randn(16),
            layout="half", **angles(6, 8))),
        "allegro-thirds": (function, dict(
            q=randn(2, 5, 2, 24), k=randn(2, 5, 2, 24), norm=None, layout="half", sections=3,
            **angles(5, 12))),
        "mochi-per-head": (function, dict(
            q=randn(2, 7, 3, 16), k=randn(2, 7, 3, 16), q_weight=randn(16), k_weight=randn(16), eps=1e-5,
            rope_len=5, **angles(1, 5, 3, 8))),
        "lumina-gqa": (function, dict(
            q=randn(2, 5, 4, 24), k=randn(2, 5, 2, 24), q_weight=randn(24), k_weight=randn(24),
            **angles(2, 5, 1, 12))),
        "sana-relu": (function, dict(
            q=randn(2, 6, 2, 28), k=randn(2, 6, 2, 28), over="hidden", q_weight=randn(56),
            k_weight=randn(56), act="relu", **angles(6, 14))),
        "partial-rotation": (function, dict(q=randn(1, 5, 2, 20), **angles(5, 6))),
        "cross": (function, dict(
            q=randn(2, 6, 2, 16), k=randn(2, 4, 2, 16), over="hidden", q_weight=randn(32),
            k_weight=randn(32))),
    }  # fmt: skip
