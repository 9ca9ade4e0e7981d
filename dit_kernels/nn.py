"""Drop-in layers: parameters under the names of the plain layer each replaces, plus a call of the fused op.

| layer                             | replaces                                                   |
|-----------------------------------|------------------------------------------------------------|
| AdaLayerNorm, AdaLayerNormZero    | diffusers' layers of these names                           |
| AdaLayerNormSingle                | `scale_shift_table + temb` and its norm in PixArt, Wan, LTX |
| QKNormRoPE                        | norm_q, norm_k and the rotary embedding after them         |
| Attention3D, FeedForward          | timm's Attention and Mlp, as the original DiT uses them    |
| PatchEmbed3D                      | timm's PatchEmbed, with time                               |
| TimestepEmbedder, FinalLayer, DiTBlock | the original DiT's                                    |
| AttentionPool                     | -                                                          |
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._guards import detect_fake_mode

from dit_kernels import debug, ops
from dit_kernels.ops.arguments import check_choice, check_eps, triple
from dit_kernels.ops.feed_forward import activated_linear


class AdaLayerNorm(nn.Module):
    """Norm modulated by a projection of the timestep embedding.

        y = norm(x) * (1 + scale) + shift,    from linear(silu(temb))

    Args:
        embedding_dim: of temb.
        num_embeddings: size of a table of learned timestep embeddings, in place of a given temb.
        output_dim: twice the hidden size of x; 2 * embedding_dim by default.
        norm_elementwise_affine, norm_eps: of the norm.
        chunk_dim: 1 for temb [B, D] split into (shift, scale), as CogVideoX has it; 0 for temb [D] split
            into (scale, shift).
    """

    def __init__(
        self,
        embedding_dim: int,
        num_embeddings: int | None = None,
        output_dim: int | None = None,
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-5,
        chunk_dim: int = 0,
    ) -> None:
        super().__init__()
        check_eps("AdaLayerNorm", norm_eps)
        output_dim = output_dim or 2 * embedding_dim
        self.chunk_dim = chunk_dim
        self.emb = None if num_embeddings is None else nn.Embedding(num_embeddings, embedding_dim)
        self.silu = nn.SiLU()
        self.linear = nn.Linear(embedding_dim, output_dim)
        self.norm = nn.LayerNorm(output_dim // 2, norm_eps, norm_elementwise_affine)

    def forward(
        self, x: Tensor, timestep: Tensor | None = None, temb: Tensor | None = None
    ) -> Tensor:
        """x [B, N, C] -> [B, N, C]"""
        if self.emb is not None:
            temb = self.emb(timestep)
        if temb is None:
            raise ValueError("AdaLayerNorm: temb must be given; got None")
        temb = self.linear(self.silu(temb))
        if self.chunk_dim == 1:
            shift, scale = temb.chunk(2, dim=1)
        else:
            scale, shift = (
                row.reshape(1, -1).expand(x.shape[0], -1) for row in temb.chunk(2, dim=0)
            )
        norm = self.norm
        return ops.adaln(x, shift, scale, weight=norm.weight, bias=norm.bias, eps=norm.eps)  # type: ignore[return-value]


class AdaLayerNormZero(nn.Module):
    """The first norm of an adaLN-Zero block, with the modulation of the rest of the block.

        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = linear(silu(emb));
        y = norm(x) * (1 + scale_msa) + shift_msa

    Args:
        embedding_dim: hidden size of x and of emb.
        num_embeddings: number of classes, if the layer embeds timestep and class itself.
        norm_type: "layer_norm" (eps 1e-6) or "fp32_layer_norm" (eps 1e-5).
        bias: of the linear.
    """

    def __init__(
        self,
        embedding_dim: int,
        num_embeddings: int | None = None,
        norm_type: str = "layer_norm",
        bias: bool = True,
    ) -> None:
        super().__init__()
        eps = {"layer_norm": 1e-6, "fp32_layer_norm": 1e-5}.get(norm_type)
        if eps is None:
            raise ValueError(
                f"AdaLayerNormZero: norm_type must be 'layer_norm' or 'fp32_layer_norm'; got {norm_type!r}"
            )
        self.emb = None
        if num_embeddings is not None:
            self.emb = _TimestepLabelEmbeddings(num_embeddings, embedding_dim)
        self.silu = nn.SiLU()
        self.linear = nn.Linear(embedding_dim, 6 * embedding_dim, bias=bias)
        self.norm = nn.LayerNorm(embedding_dim, elementwise_affine=False, eps=eps)

    def forward(
        self,
        x: Tensor,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        hidden_dtype: torch.dtype | None = None,
        emb: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x [B, N, C], emb [B, C] -> (y, gate_msa, shift_mlp, scale_mlp, gate_mlp), the latter [B, C]"""
        if self.emb is not None:
            emb = self.emb(timestep, class_labels, hidden_dtype)
        if emb is None:
            raise ValueError("AdaLayerNormZero: emb must be given; got None")
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.linear(self.silu(emb)).chunk(
            6, dim=1
        )
        y = ops.adaln(x, shift, scale, eps=self.norm.eps)
        return y, gate, shift_mlp, scale_mlp, gate_mlp  # type: ignore[return-value]


class AdaLayerNormSingle(nn.Module):
    """adaLN-single inside a block: one timestep projection for all blocks, plus a learned table a block.

        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = scale_shift_table + temb
        y = norm(x) * (1 + scale_msa) + shift_msa

    Args:
        hidden_size: C.
        norm, eps: of the norm.
    """

    def __init__(self, hidden_size: int, norm: str = "layer", eps: float = 1e-6) -> None:
        super().__init__()
        check_choice("AdaLayerNormSingle", "norm", norm, NORMS)
        check_eps("AdaLayerNormSingle", eps)
        self.norm, self.eps = norm, eps
        self.scale_shift_table = nn.Parameter(torch.randn(6, hidden_size) / hidden_size**0.5)

    def forward(self, x: Tensor, temb: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x [B, N, C], temb [B, 6 * C] (a sample) or [B, G, 6 * C] (a frame or token)

        -> (y, gate_msa, shift_mlp, scale_mlp, gate_mlp), the latter with their table rows added
        """
        table = self.scale_shift_table
        shift, scale, *rest = temb.chunk(6, dim=-1)
        y = ops.adaln(
            x,
            shift,
            scale,
            norm=self.norm,
            eps=self.eps,
            shift_table=table[0],
            scale_table=table[1],
        )
        gate, shift_mlp, scale_mlp, gate_mlp = (
            m + row for m, row in zip(rest, table[2:], strict=True)
        )
        return y, gate, shift_mlp, scale_mlp, gate_mlp  # type: ignore[return-value]


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
        _check_heads("Attention3D", "dim", dim, num_heads)
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
        _check_heads("CrossAttention", "dim", dim, num_heads)
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


class PatchEmbed3D(nn.Module):
    """Video to tokens; the parameters of a Conv3d whose stride is its kernel, under `proj`.

    Args:
        patch_size: (pt, ph, pw).
        in_channels: Cin.
        hidden_size: C.
        bias: of the projection.
    """

    def __init__(
        self,
        patch_size: Sequence[int] = (1, 2, 2),
        in_channels: int = 4,
        hidden_size: int = 1152,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.patch_size = patch = triple("PatchEmbed3D", "patch_size", patch_size)
        self.proj = nn.Conv3d(in_channels, hidden_size, patch, patch, bias=bias)
        self.register_load_state_dict_pre_hook(_image_weight_to_video)

    def forward(self, video: Tensor, pos_embed: Tensor | None = None) -> Tensor:
        """video [B, Cin, F, Y, X] -> tokens [B, N, C]"""
        return ops.patch_embed(video, self.proj.weight, self.proj.bias, pos_embed=pos_embed)


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
        _check_least("FeedForward", "hidden_features", hidden_features)
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


class TimestepEmbedder(nn.Module):
    """Sinusoidal embedding of the time, through a two-layer MLP.

        f_i = max_period^(-i / (F / 2 - frequency_shift));  [cos(t f), sin(t f)] -> mlp

    Args:
        hidden_size: C.
        frequency_embedding_size: F, even.
        max_period: of the slowest wave.
        frequency_shift: 0 as the original DiT, 1 as diffusers' DiTTransformer2DModel.
    """

    def __init__(
        self,
        hidden_size: int,
        frequency_embedding_size: int = 256,
        max_period: float = 10000.0,
        frequency_shift: float = 0.0,
    ) -> None:
        super().__init__()
        if not frequency_shift < frequency_embedding_size // 2:
            raise ValueError(
                "TimestepEmbedder: frequency_shift must be less than half of frequency_embedding_size;"
                f" got {frequency_shift} and {frequency_embedding_size}"
            )
        self.frequency_embedding_size = frequency_embedding_size
        self.max_period, self.frequency_shift = max_period, frequency_shift
        self.mlp = nn.Sequential(
            nn.Linear(frequency_embedding_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )  # fmt: skip

    def forward(self, t: Tensor) -> Tensor:
        """t [...], any real numbers -> [..., C]"""
        wave = timestep_embedding(
            t, self.frequency_embedding_size, self.max_period, self.frequency_shift
        )
        return self.mlp(wave.to(next(self.mlp.parameters()).dtype))


class AttentionPool(nn.Module):
    """Prompt tokens to one vector: a learned query attends to them.

        pooled = proj(attention(query, kv(text)))

    Args:
        text_dim: width of the prompt's tokens.
        hidden_size: C of the result.
        num_heads: heads of the attention.
    """

    def __init__(self, text_dim: int, hidden_size: int, num_heads: int = 8) -> None:
        super().__init__()
        _check_heads("AttentionPool", "hidden_size", hidden_size, num_heads)
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.randn(hidden_size) / hidden_size**0.5)
        self.norm = nn.LayerNorm(text_dim)
        self.kv = nn.Linear(text_dim, 2 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, text: Tensor, text_mask: Tensor | None = None) -> Tensor:
        """text [B, L, text_dim], text_mask bool [B, L], True for real tokens -> [B, C]

        A prompt of no tokens at all gives proj's bias.
        """
        text, text_mask = real_first(text, text_mask)
        norm = self.norm
        y = ops.adaln(text, weight=norm.weight, bias=norm.bias, eps=norm.eps)
        k, v = self.kv(y).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        q = self.query.to(k.dtype).view(1, 1, self.num_heads, -1).expand(text.shape[0], -1, -1, -1)
        out = ops.attention3d(q, k, v, kv_lens=prefix_lengths(text_mask))
        return self.proj(out.flatten(1))  # type: ignore[union-attr]


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


def timestep_embedding(
    t: Tensor, dim: int, max_period: float = 10000.0, frequency_shift: float = 0.0
) -> Tensor:
    """[cos(t f_i), sin(t f_i)] for t [...], float32 [..., dim]; see `TimestepEmbedder`."""
    half = dim // 2
    exponent = -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device)
    angle = t[..., None].float() * torch.exp(exponent / (half - frequency_shift))
    wave = torch.cat((angle.cos(), angle.sin()), dim=-1)
    return F.pad(wave, (0, 1)) if dim % 2 else wave


def real_first(text: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Prompts [B, L, C] with their real tokens first, in the order they had, and the mask of that.

    Attention to a prompt knows no positions: tokens behind a gap or left padding may as well stand first.
    """
    if mask is None:
        return text, None
    order = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)
    samples = torch.arange(text.shape[0], device=text.device)[:, None]
    return text[samples, order], mask[samples, order]


def prefix_lengths(mask: Tensor | None) -> Tensor | None:
    """bool [B, L], True first and then False, as `real_first` makes it -> int32 [B]"""
    return None if mask is None else mask.sum(-1, dtype=torch.int32)


class _TimestepLabelEmbeddings(nn.Module):
    """diffusers' CombinedTimestepLabelEmbeddings, under its parameter names."""

    def __init__(
        self, num_classes: int, embedding_dim: int, class_dropout_prob: float = 0.1
    ) -> None:
        super().__init__()
        self.timestep_embedder = nn.Module()
        self.timestep_embedder.linear_1 = nn.Linear(256, embedding_dim)
        self.timestep_embedder.linear_2 = nn.Linear(embedding_dim, embedding_dim)
        self.class_embedder = LabelEmbedder(num_classes, embedding_dim, class_dropout_prob)

    def forward(
        self, timestep: Tensor, labels: Tensor, hidden_dtype: torch.dtype | None = None
    ) -> Tensor:
        mlp: Any = self.timestep_embedder
        wave = timestep_embedding(timestep, 256, frequency_shift=1.0)
        temb = mlp.linear_2(F.silu(mlp.linear_1(wave.to(hidden_dtype or wave.dtype))))
        return temb + self.class_embedder(labels)


class LabelEmbedder(nn.Module):
    """Class labels to vectors; in training some are replaced by the class of no label.

    Args:
        num_classes: labels are 0 to num_classes - 1; num_classes itself means no label.
        hidden_size: C.
        dropout_prob: how often a label is dropped in training, for classifier-free guidance.
    """

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float) -> None:
        super().__init__()
        _check_least("LabelEmbedder", "num_classes", num_classes)
        if not 0 <= dropout_prob <= 1:
            raise ValueError(f"LabelEmbedder: dropout_prob must lie in [0, 1]; got {dropout_prob}")
        self.num_classes, self.dropout_prob = num_classes, dropout_prob
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)

    def forward(self, labels: Tensor) -> Tensor:
        """int64 [B] -> [B, C]

        Labels out of range are found on a CPU, and elsewhere under DIT_KERNELS_DEBUG=1.
        """
        if labels.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"LabelEmbedder: class labels must be int64; got {labels.dtype}")
        if debug() or _readable(labels):
            low, high = (int(labels.min()), int(labels.max())) if labels.numel() else (0, 0)
            last = self.embedding_table.num_embeddings - 1
            if low < 0 or high > last:
                raise ValueError(
                    f"LabelEmbedder: class labels must lie in [0, {last}];"
                    f" got values from {low} to {high}"
                )
        if self.training and self.dropout_prob > 0:
            drop = torch.rand(labels.shape, device=labels.device) < self.dropout_prob
            labels = torch.where(drop, self.num_classes, labels)
        return self.embedding_table(labels)


NORMS = ("layer", "rms")
QK_NORMS = (None, "rms", "layer")

_ACTIVATIONS = {
    "gelu-tanh": "gelu-tanh", "gelu": "gelu-none", "swiglu": "swiglu-first",
    "swiglu-second": "swiglu-second",
}  # fmt: skip


def _check_heads(layer: str, name: str, dim: int, num_heads: int) -> None:
    _check_least(layer, "num_heads", num_heads)
    if dim % num_heads:
        raise ValueError(f"{layer}: num_heads must divide {name}; got {num_heads} and {dim}")


def _check_least(layer: str, name: str, number: int) -> None:
    if number < 1:
        raise ValueError(f"{layer}: {name} must be at least 1; got {number}")


def _readable(tensor: Tensor) -> bool:
    """Its values are there to look at, without waiting for a device, and not for a tracer."""
    return (
        tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and detect_fake_mode() is None
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def _is_plain_linear(module: nn.Module) -> bool:
    """Nothing happens in the module's call but its product: no hooks, adapters or quantised weights."""
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and "forward" not in vars(module)  # offloading and layerwise casting replace it
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
    )


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


def _image_weight_to_video(
    module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object
) -> None:
    """A Conv2d's weight [C, Cin, ph, pw] is that of a patch one frame long."""
    weight = state_dict.get(f"{prefix}proj.weight")
    if weight is not None and weight.dim() == 4:
        state_dict[f"{prefix}proj.weight"] = weight.unsqueeze(2)
