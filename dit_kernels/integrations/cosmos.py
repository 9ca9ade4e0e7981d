"""Cosmos Predict 1, 2 and 2.5."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dit_kernels.integrations.fused import Fused, attend, fits, keeps_dtype, norm_of
from dit_kernels.integrations.recognition import Row, adapts
from dit_kernels.integrations.shared import norm_rows, qk_rows


def modulation(norm: Any, embedded_timestep: Tensor, temb: Tensor | None, width: int) -> Tensor:
    """adaLN-LoRA: two thin Linears, plus a share that all blocks have."""
    m = norm.linear_2(norm.linear_1(norm.activation(embedded_timestep)))
    return m if temb is None else m + temb[..., :width]


@adapts(
    "CosmosAdaLayerNormZero", "ad147383efd6", kind="adaln", rows=norm_rows("norm"), covers=("norm",)
)
def norm_zero(
    fused: Fused,
    self: Any,
    hidden_states: Tensor,
    embedded_timestep: Tensor,
    temb: Tensor | None = None,
) -> Any:
    m = modulation(self, embedded_timestep, temb, 3 * hidden_states.shape[-1])
    if not keeps_dtype(hidden_states, m):
        return NotImplemented
    shift, scale, gate = m.chunk(3, dim=-1)
    y = fused.adaln(self.norm, hidden_states, shift, scale)
    return y, gate.unsqueeze(1) if gate.dim() == 2 else gate


@adapts(
    "CosmosAdaLayerNorm", "3e6d01443fad", kind="adaln", rows=norm_rows("norm"), covers=("norm",)
)
def norm_out(
    fused: Fused,
    self: Any,
    hidden_states: Tensor,
    embedded_timestep: Tensor,
    temb: Tensor | None = None,
) -> Any:
    m = modulation(self, embedded_timestep, temb, 2 * self.embedding_dim)
    if not keeps_dtype(hidden_states, m):
        return NotImplemented
    shift, scale = m.chunk(2, dim=-1)
    return fused.adaln(self.norm, hidden_states, shift, scale)


def block_rows(block: Any) -> Sequence[Row] | str:
    if not (norm_of(block.norm2.norm) and norm_of(block.norm3.norm)):
        return "its norms are not those that the fused norm replaces"
    return [("norm2", "gated_adaln"), ("norm3", "gated_adaln"), ("ff", "gated_residual")]


@adapts(
    "CosmosTransformerBlock",
    "5ee0646b67e4",
    kind="adaln",
    rows=block_rows,
    covers=("norm2", "norm2.norm", "norm3", "norm3.norm"),
)
def block(
    fused: Fused,
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Any,
    embedded_timestep: Tensor,
    temb: Tensor | None = None,
    image_rotary_emb: Any = None,
    extra_pos_emb: Tensor | None = None,
    attention_mask: Any = None,
    controlnet_residual: Tensor | None = None,
    latents: Tensor | None = None,
    block_idx: int | None = None,
) -> Any:
    x = hidden_states
    if not keeps_dtype(x, embedded_timestep, temb):
        return NotImplemented
    if self.before_proj is not None:
        x = self.before_proj(x) + latents
    if extra_pos_emb is not None:
        x = x + extra_pos_emb
    width = 3 * x.shape[-1]
    y, gate = self.norm1(x, embedded_timestep, temb)
    branch = self.attn1(y, image_rotary_emb=image_rotary_emb)
    shift, scale, next_gate = modulation(self.norm2, embedded_timestep, temb, width).chunk(
        3, dim=-1
    )
    x, y = fused.gated_adaln(self.norm2.norm, x, branch, gate, shift, scale)
    branch = self.attn2(
        y, encoder_hidden_states=encoder_hidden_states, attention_mask=attention_mask
    )
    gate = next_gate
    shift, scale, next_gate = modulation(self.norm3, embedded_timestep, temb, width).chunk(
        3, dim=-1
    )
    x, y = fused.gated_adaln(self.norm3.norm, x, branch, gate, shift, scale)
    x = fused.gated_residual(x, self.ff(y), next_gate)
    if controlnet_residual is not None:
        x = x + controlnet_residual
    return x if self.after_proj is None else (x, self.after_proj(x))


@adapts(
    "CosmosAttnProcessor2_0",
    "f046ed977f0f",
    "868c35f8a1ba",
    kind="qk_norm_rope",
    rows=qk_rows("norm_q", "norm_k"),
    covers=("norm_q", "norm_k"),
    processor=True,
)
def attention(
    fused: Fused,
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    image_rotary_emb: Any = None,
    **kwargs: Any,
) -> Any:
    context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
    if kwargs or not fits(hidden_states, self.norm_q.weight):
        return NotImplemented
    if image_rotary_emb is not None and context.shape[1] != hidden_states.shape[1]:
        return NotImplemented
    q, k, v = (
        projection(x).unflatten(2, (self.heads, -1))
        for projection, x in (
            (self.to_q, hidden_states), (self.to_k, context), (self.to_v, context)
        )
    )  # fmt: skip
    rotation = None
    if image_rotary_emb is not None:
        cos, sin = image_rotary_emb  # [N, D]: the halves are equal
        half = cos.shape[-1] // 2
        rotation = (cos[:, :half], sin[:, :half])
    q, k = fused.qk(q, k, self.norm_q, self.norm_k, rotation, layout="half")
    # the model's processor leaves the choice of backend to the global setting
    out = attend(None, q, k, v, attention_mask).flatten(2, 3).type_as(q)
    return self.to_out[1](self.to_out[0](out))
