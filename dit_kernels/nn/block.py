"""The original DiT's block, its feed-forward and its last layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dit_kernels import ops
from dit_kernels.nn.attention import Attention3D, CrossAttention
from dit_kernels.nn.checks import NORMS, check_least
from dit_kernels.ops.arguments import check_choice, check_eps, triple
from dit_kernels.ops.feed_forward import activated_linear

_ACTIVATIONS = {
    "gelu-tanh": "gelu-tanh", "gelu": "gelu-none", "swiglu": "swiglu-first",
    "swiglu-second": "swiglu-second",
}  # fmt: skip


class FeedForward(nn.Module):
    """Linear, activation, Linear.

    Args:
        in_features: C.
        hidden_features: width between the Linears; 4 * C by default.
        act: "gelu-tanh", "gelu" (erf), "swiglu" (SiLU on the first half) or "swiglu-second".
        bias: of both Linears.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        act: str = "gelu-tanh",
        bias: bool = True,
    ) -> None:
        super().__init__()
        if act not in _ACTIVATIONS:
            raise ValueError(
                f"FeedForward: act must be gelu-tanh, gelu, swiglu or swiglu-second; got {act!r}"
            )
        hidden_features = 4 * in_features if hidden_features is None else hidden_features
        check_least("FeedForward", "hidden_features", hidden_features)
        self.act = act
        width = 2 * hidden_features if act.startswith("swiglu") else hidden_features
        self.fc1 = nn.Linear(in_features, width, bias=bias)
        self.fc2 = nn.Linear(hidden_features, in_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]"""
        # The bias stays in the Linear where it costs nothing: the matrix product adds it at its store.
        # Calling the module, not its weight, keeps hooks and LoRA adapters on it alive.
        h = self.fc1(x)
        if _is_plain_linear(self.fc2):
            return activated_linear(h, self.fc2.weight, self.fc2.bias, _ACTIVATIONS[self.act])
        if self.act.startswith("swiglu"):
            h = ops.swiglu(h, gate="second" if self.act.endswith("second") else "first")
        else:
            h = ops.gelu_bias(h, approximate="tanh" if self.act.endswith("tanh") else "none")
        return self.fc2(h)


class FinalLayer(nn.Module):
    """Modulated norm, projection and unpatchify: tokens to video.

    Args:
        hidden_size: C.
        patch_size: (pt, ph, pw).
        out_channels: of the video.
        norm, eps: of the norm.
        cond_size: width of the conditioning; C by default.
    """

    def __init__(
        self,
        hidden_size: int,
        patch_size: Sequence[int],
        out_channels: int,
        norm: str = "layer",
        eps: float = 1e-6,
        cond_size: int | None = None,
    ) -> None:
        super().__init__()
        check_choice("FinalLayer", "norm", norm, NORMS)
        check_eps("FinalLayer", eps)
        self.patch_size = triple("FinalLayer", "patch_size", patch_size)
        self.out_channels, self.norm, self.eps = out_channels, norm, eps
        self.linear = nn.Linear(hidden_size, math.prod(self.patch_size) * out_channels)
        self.adaLN_modulation = nn.Sequential(
            nn.SiLU(), nn.Linear(cond_size or hidden_size, 2 * hidden_size)
        )

    def forward(self, x: Tensor, c: Tensor, grid: Sequence[int]) -> Tensor:
        """x [B, N, C], c [B, C] or [B, G, C] -> video [B, out_channels, F, Y, X]"""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return ops.final_layer(
            x, shift, scale, self.linear.weight, self.linear.bias, grid, self.patch_size,
            self.out_channels, norm=self.norm, eps=self.eps,
        )  # fmt: skip

    def forward_packed(
        self, x: Tensor, c: Tensor, row_index: Tensor, grids: Sequence[Sequence[int]]
    ) -> list[Tensor]:
        """x [1, N_total, C], c [R, C] -> one video [out_channels, F, Y, X] a grid"""
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        y = ops.adaln(x, shift, scale, norm=self.norm, eps=self.eps, row_index=row_index)
        tokens = self.linear(y).split([math.prod(grid) for grid in grids], dim=1)
        return [
            ops.unpatchify(part, grid, self.patch_size, self.out_channels)[0]
            for part, grid in zip(tokens, grids, strict=True)
        ]


class DiTBlock(nn.Module):
    """adaLN-Zero block: attention and feed-forward, each modulated and gated by the conditioning.

        x = x + gate_msa * attn(norm(x) * (1 + scale_msa) + shift_msa)
        x = x + cross_attn(norm(x), text)                                   if context_dim is given
        x = x + gate_mlp * mlp(norm(x) * (1 + scale_mlp) + shift_mlp)

    Args:
        hidden_size, num_heads, mlp_ratio: C, H and the feed-forward's width over C.
        qk_norm: None, "rms" or "layer".
        norm: "layer" or "rms".
        norm1_eps, norm2_eps: of the norms before attention and feed-forward.
        context_dim: width of prompt tokens to cross-attend to.
        text_stream: text tokens run in the sequence, with a modulation of their own
            (`adaLN_modulation_text`) and shared weights, as in CogVideoX.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        *,
        qk_norm: str | None = None,
        norm: str = "layer",
        norm1_eps: float = 1e-6,
        norm2_eps: float = 1e-6,
        context_dim: int | None = None,
        text_stream: bool = False,
    ) -> None:
        super().__init__()
        check_choice("DiTBlock", "norm", norm, NORMS)
        check_eps("DiTBlock", norm1_eps)
        check_eps("DiTBlock", norm2_eps)
        self.norm, self.norm1_eps, self.norm2_eps = norm, norm1_eps, norm2_eps
        self.attn = Attention3D(hidden_size, num_heads, qkv_bias=True, qk_norm=qk_norm)
        self.mlp = FeedForward(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        if context_dim is not None:
            self.norm_cross = nn.LayerNorm(hidden_size, eps=1e-6)
            self.cross_attn = CrossAttention(hidden_size, num_heads, context_dim, qk_norm)
        if text_stream:
            self.adaLN_modulation_text = nn.Sequential(
                nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size)
            )
        self.has_context, self.has_text_stream = context_dim is not None, text_stream

    def forward(
        self,
        x: Tensor,
        c: Tensor,
        *,
        c_text: Tensor | None = None,
        row_index: Tensor | None = None,
        context: Tensor | None = None,
        context_lens: Tensor | None = None,
        lengths: Sequence[int] | None = None,
        **attention: Any,
    ) -> Tensor:
        """x [B, N, C] -> [B, N, C]

        Args:
            c: conditioning [B, C], [B, G, C], or [R, C] with row_index.
            c_text: [R', C], whose modulation rows follow c's (a text stream; needs row_index).
            row_index: int32, as in `ops.adaln`.
            context, context_lens: prompt tokens [B, L, context_dim] and how many of each are real.
            lengths: of the packed sequences, for cross-attention.
            attention: cos, sin, and arguments of `ops.attention3d`.
        """
        modulation = self.adaLN_modulation(c)
        if self.has_text_stream:
            modulation = torch.cat((modulation, self.adaLN_modulation_text(c_text)))
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        mode = {"norm": self.norm, "row_index": row_index}
        y = ops.adaln(x, shift1, scale1, eps=self.norm1_eps, **mode)  # type: ignore[arg-type]
        branch, gate = self.attn(y, **attention), gate1
        if self.has_context:
            norm = self.norm_cross
            x, y = ops.gated_adaln(
                x,
                branch,
                gate,
                weight=norm.weight,
                bias=norm.bias,
                eps=norm.eps,
                row_index=row_index,
            )
            branch, gate = self.cross_attn(y, context, context_lens, lengths), None
        x, y = ops.gated_adaln(x, branch, gate, shift2, scale2, eps=self.norm2_eps, **mode)  # type: ignore[arg-type]
        return ops.gated_residual(x, self.mlp(y), gate2, row_index=row_index)


def _is_plain_linear(module: nn.Module) -> bool:
    """Nothing happens in the module's call but its product: no hooks, adapters or quantised weights."""
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and "forward" not in vars(module)  # offloading and layerwise casting replace it
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
    )
