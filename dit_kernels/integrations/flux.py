"""Flux, and what has its blocks or its attention: LongCat-Image, Ovis-Image, Bria."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dit_kernels.integrations.fused import Fused, attend, fits, keeps_dtype
from dit_kernels.integrations.recognition import adapts
from dit_kernels.integrations.shared import norm_rows, qk_rows


@adapts(
    "FluxTransformerBlock",
    "85cd7ce98bb3",
    kind="adaln",
    rows=norm_rows(
        ("norm2", "gated_adaln"),
        ("norm2_context", "gated_adaln"),
        ("ff", "gated_residual"),
        ("ff_context", "gated_residual"),
    ),
    covers=("norm2", "norm2_context"),
)
def block(
    fused: Fused,
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: Any = None,
) -> Any:
    x, text = hidden_states, encoder_hidden_states
    if not (keeps_dtype(x, temb) and keeps_dtype(text, temb)):
        return NotImplemented
    y, gate, shift_mlp, scale_mlp, gate_mlp = self.norm1(x, emb=temb)
    c_y, c_gate, c_shift_mlp, c_scale_mlp, c_gate_mlp = self.norm1_context(text, emb=temb)
    branch, c_branch, *ip_adapter = self.attn(
        hidden_states=y,
        encoder_hidden_states=c_y,
        image_rotary_emb=image_rotary_emb,
        **(joint_attention_kwargs or {}),
    )
    x, y = fused.gated_adaln(self.norm2, x, branch, gate, shift_mlp, scale_mlp)
    x = fused.gated_residual(x, self.ff(y), gate_mlp)
    if ip_adapter:
        x = x + ip_adapter[0]
    text, c_y = fused.gated_adaln(
        self.norm2_context, text, c_branch, c_gate, c_shift_mlp, c_scale_mlp
    )
    text = fused.gated_residual(text, self.ff_context(c_y), c_gate_mlp)
    return clipped(text), x


@adapts(
    "FluxSingleTransformerBlock",
    "0b116839d642",
    kind="adaln",
    rows=lambda block: [("proj_out", "gated_residual")],
)
def single_block(
    fused: Fused,
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: Any = None,
) -> Any:
    if not keeps_dtype(hidden_states, temb):
        return NotImplemented
    length = encoder_hidden_states.shape[1]
    x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    y, gate = self.norm(x, emb=temb)
    mlp = self.act_mlp(self.proj_mlp(y))
    branch = self.attn(
        hidden_states=y, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {})
    )
    x = clipped(fused.gated_residual(x, self.proj_out(torch.cat([branch, mlp], dim=2)), gate))
    return x[:, :length], x[:, length:]


def clipped(x: Tensor) -> Tensor:
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


@adapts(
    "FluxAttnProcessor",
    "69ad1b9bc4e3",
    "e8f0e5579638",
    "ac32c8a7acca",
    kind="qk_norm_rope",
    rows=qk_rows("norm_q", "norm_k", "norm_added_q", "norm_added_k"),
    covers=("norm_q", "norm_k", "norm_added_q", "norm_added_k"),
    helpers={"apply_rotary_emb": ("213e19b8c19f",), "_get_qkv_projections": ("b253fe1634db",)},
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
    if kwargs:
        return NotImplemented
    out = joint_attention(
        fused, self, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
    )
    if out is NotImplemented or encoder_hidden_states is None:
        return out
    length = encoder_hidden_states.shape[1]
    text, out = out[:, :length].contiguous(), out[:, length:].contiguous()
    out = self.to_out[1](self.to_out[0](out))
    return out, self.to_add_out(text)


def joint_attention(
    fused: Fused,
    self: Any,
    hidden_states: Tensor,
    text: Tensor | None,
    attention_mask: Tensor | None,
    image_rotary_emb: Any,
) -> Any:
    """Up to the projections out: [B, N, C], the text first."""
    joint = self.added_kv_proj_dim is not None
    if not fits(hidden_states, self.norm_q.weight) or (joint and text is None):
        return NotImplemented
    if self.fused_projections:
        q, k, v = self.to_qkv(hidden_states).chunk(3, dim=-1)
    else:
        q, k, v = self.to_q(hidden_states), self.to_k(hidden_states), self.to_v(hidden_states)
    if joint and self.fused_projections:
        c_q, c_k, c_v = self.to_added_qkv(text).chunk(3, dim=-1)
    elif joint:
        c_q, c_k, c_v = self.add_q_proj(text), self.add_k_proj(text), self.add_v_proj(text)
    q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in (q, k, v))
    rotation = None
    if image_rotary_emb is not None:
        cos, sin = image_rotary_emb  # [N, D], each angle twice
        rotation = (cos[:, 0::2], sin[:, 0::2])
    if not joint:
        q, k = fused.qk(q, k, self.norm_q, self.norm_k, rotation)
    else:
        c_q, c_k, c_v = (x.unflatten(-1, (-1, self.head_dim)) for x in (c_q, c_k, c_v))
        length = c_q.shape[1]
        own = c_own = rotation
        if rotation is not None:
            own = (rotation[0][length:], rotation[1][length:])
            c_own = (rotation[0][:length], rotation[1][:length])
        q, k = fused.qk(q, k, self.norm_q, self.norm_k, own)
        c_q, c_k = fused.qk(c_q, c_k, self.norm_added_q, self.norm_added_k, c_own)
        q, k, v = (torch.cat(pair, dim=1) for pair in ((c_q, q), (c_k, k), (c_v, v)))
    return attend(self.processor, q, k, v, attention_mask).flatten(2, 3).to(q.dtype)
