"""Attention with a norm of queries and keys and rotary embedding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dit_kernels import ops
from dit_kernels.nn.checks import check_heads
from dit_kernels.ops.arguments import check_choice, check_eps

QK_NORMS = (None, "rms", "layer")


class QKNormRoPE(nn.Module):
    """Norm and rotary embedding of queries and keys.

    Args:
        head_dim: D.
        num_heads: needed for over="hidden".
        num_kv_heads: of k, if they are fewer.
        norm: "rms", "layer" or None.
        over: "head" or "hidden", see `ops.qk_norm_rope`.
        eps: of the norm.
        layout, sections: of the rotation.
    """

    def __init__(
        self,
        head_dim: int,
        num_heads: int | None = None,
        num_kv_heads: int | None = None,
        *,
        norm: str | None = "rms",
        over: str = "head",
        eps: float = 1e-6,
        layout: str = "interleaved",
        sections: int = 1,
    ) -> None:
        super().__init__()
        check_choice("QKNormRoPE", "norm", norm, QK_NORMS)
        check_choice("QKNormRoPE", "over", over, ("head", "hidden"))
        check_choice("QKNormRoPE", "layout", layout, ("interleaved", "half"))
        check_eps("QKNormRoPE", eps)
        if over == "hidden" and num_heads is None:
            raise ValueError("QKNormRoPE: num_heads must be given with over='hidden'; got None")
        q_size = head_dim if over == "head" else head_dim * (num_heads or 1)
        k_size = head_dim if over == "head" else head_dim * (num_kv_heads or num_heads or 1)
        self.norm, self.over, self.eps = norm, over, eps
        self.layout, self.sections = layout, sections
        self.norm_q = _qk_norm(norm, q_size, eps)
        self.norm_k = _qk_norm(norm, k_size, eps)

    def forward(
        self,
        q: Tensor,
        k: Tensor | None = None,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
        *,
        rope_start: int = 0,
        rope_len: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """q, k [B, N, H, D] -> (q, k)"""
        return ops.qk_norm_rope(
            q, k, norm=self.norm, over=self.over, eps=self.eps, cos=cos, sin=sin, layout=self.layout,
            sections=self.sections, rope_start=rope_start, rope_len=rope_len,
            **_qk_parameters(self.norm_q, self.norm_k if k is not None else None),
        )  # fmt: skip


class Attention3D(nn.Module):
    """Self-attention over a grid of patches: packed QKV, QK-norm, rotary embedding, window, projection.

    Args:
        dim: hidden size C.
        num_heads: H; D = C / H.
        qkv_bias: bias of the QKV projection.
        qk_norm: None, "rms" or "layer", over each head.
        eps: of the QK-norm.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = True,
        qk_norm: str | None = None,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        check_heads("Attention3D", "dim", dim, num_heads)
        check_choice("Attention3D", "qk_norm", qk_norm, QK_NORMS)
        check_eps("Attention3D", eps)
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.qk_norm, self.eps = qk_norm, eps
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = _qk_norm(qk_norm, self.head_dim, eps)
        self.k_norm = _qk_norm(qk_norm, self.head_dim, eps)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self,
        x: Tensor,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
        *,
        rope_start: int = 0,
        rope_len: int | None = None,
        segments: Sequence[tuple[slice, dict[str, Any]]] | None = None,
        **attention: Any,
    ) -> Tensor:
        """x [B, N, C] -> [B, N, C]

        `attention` goes to `ops.attention3d`: grid, window_size, text_tokens, cu_seqlens, ...
        `segments` attends within parts of the tokens, each (slice, its own such arguments).
        """
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)
        if self.qk_norm is not None or cos is not None:
            q, rotated = ops.qk_norm_rope(
                q, k, norm=self.qk_norm, eps=self.eps, cos=cos, sin=sin, rope_start=rope_start,
                rope_len=rope_len, **_qk_parameters(self.q_norm, self.k_norm),
            )  # fmt: skip
            k = k if rotated is None else rotated
        if segments is None:
            out = ops.attention3d(q, k, v, **attention)
        else:
            parts = [ops.attention3d(q[:, s], k[:, s], v[:, s], **own) for s, own in segments]
            out = torch.cat(parts, dim=1)  # type: ignore[arg-type]
        return self.proj(out.flatten(2))  # type: ignore[union-attr]


class CrossAttention(nn.Module):
    """Attention of the patches to the prompt's tokens.

    Args:
        dim: hidden size C of the patches.
        num_heads: H.
        context_dim: width of the prompt's tokens; dim by default.
        qk_norm, eps: as `Attention3D`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        context_dim: int | None = None,
        qk_norm: str | None = None,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        check_heads("CrossAttention", "dim", dim, num_heads)
        check_choice("CrossAttention", "qk_norm", qk_norm, QK_NORMS)
        check_eps("CrossAttention", eps)
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.qk_norm, self.eps = qk_norm, eps
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(context_dim or dim, 2 * dim)
        self.q_norm = _qk_norm(qk_norm, self.head_dim, eps)
        self.k_norm = _qk_norm(qk_norm, self.head_dim, eps)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        kv_lens: Tensor | None = None,
        lengths: Sequence[int] | None = None,
    ) -> Tensor:
        """x [B, N, C], context [B, L, context_dim], kv_lens int32 [B] -> [B, N, C]

        With `lengths` x is packed [1, N_total, C] and sequence i attends to context[i].
        """
        q = self.q(x).unflatten(-1, (self.num_heads, self.head_dim))
        k, v = self.kv(context).unflatten(-1, (2, self.num_heads, self.head_dim)).unbind(2)
        if self.qk_norm is not None:
            parameters = _qk_parameters(self.q_norm, None)
            q, _ = ops.qk_norm_rope(q, norm=self.qk_norm, eps=self.eps, **parameters)
            parameters = _qk_parameters(self.k_norm, None)
            k, _ = ops.qk_norm_rope(k, norm=self.qk_norm, eps=self.eps, **parameters)
        if lengths is None:
            out = ops.attention3d(q, k, v, kv_lens=kv_lens)
        else:
            parts = [
                ops.attention3d(
                    part, k[i : i + 1], v[i : i + 1],
                    kv_lens=None if kv_lens is None else kv_lens[i : i + 1],
                )
                for i, part in enumerate(q.split(list(lengths), dim=1))
            ]  # fmt: skip
            out = torch.cat(parts, dim=1)  # type: ignore[arg-type]
        return self.proj(out.flatten(2))  # type: ignore[union-attr]


def _qk_norm(norm: str | None, size: int, eps: float) -> nn.Module:
    if norm is None:
        return nn.Identity()
    return nn.RMSNorm(size, eps=eps) if norm == "rms" else nn.LayerNorm(size, eps=eps)


def _qk_parameters(q_norm: nn.Module, k_norm: nn.Module | None) -> dict[str, Any]:
    found = {"q_weight": getattr(q_norm, "weight", None), "q_bias": getattr(q_norm, "bias", None)}
    if k_norm is not None:
        found |= {
            "k_weight": getattr(k_norm, "weight", None),
            "k_bias": getattr(k_norm, "bias", None),
        }
    return found
