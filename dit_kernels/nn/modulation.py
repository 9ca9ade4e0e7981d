"""Norms modulated by a vector of the timestep: adaLN, under the names that diffusers gives it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dit_kernels import ops
from dit_kernels.nn.checks import NORMS
from dit_kernels.nn.embedding import TimestepLabelEmbeddings
from dit_kernels.ops.arguments import check_choice, check_eps


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
            self.emb = TimestepLabelEmbeddings(num_embeddings, embedding_dim)
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
