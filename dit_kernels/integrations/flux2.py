"""Flux 2: modulation shared by all blocks, SwiGLU, attention and MLP in one projection."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dit_kernels import ops
from dit_kernels.integrations.flux import clipped, joint_attention
from dit_kernels.integrations.fused import Fused, attend, fits, keeps_dtype
from dit_kernels.integrations.recognition import adapts
from dit_kernels.integrations.shared import norm_rows, qk_rows


@adapts(
    "Flux2TransformerBlock",
    "526207df8c37",
    kind="adaln",
    rows=norm_rows(
        ("norm1", "adaln"),
        ("norm1_context", "adaln"),
        ("norm2", "gated_adaln"),
        ("norm2_context", "gated_adaln"),
        ("ff", "gated_residual"),
        ("ff_context", "gated_residual"),
    ),
    covers=("norm1", "norm1_context", "norm2", "norm2_context"),
)
def block(
    fused: Fused,
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb_mod_img: Tensor,
    temb_mod_txt: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: Any = None,
) -> Any:
    x, text = hidden_states, encoder_hidden_states
    if not (keeps_dtype(x, temb_mod_img) and keeps_dtype(text, temb_mod_txt)):
        return NotImplemented
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = temb_mod_img.chunk(6, dim=-1)
    c_shift, c_scale, c_gate, c_shift_mlp, c_scale_mlp, c_gate_mlp = temb_mod_txt.chunk(6, dim=-1)
    y = fused.adaln(self.norm1, x, shift, scale)
    c_y = fused.adaln(self.norm1_context, text, c_shift, c_scale)
    branch, c_branch = self.attn(
        hidden_states=y,
        encoder_hidden_states=c_y,
        image_rotary_emb=image_rotary_emb,
        **(joint_attention_kwargs or {}),
    )
    x, y = fused.gated_adaln(self.norm2, x, branch, gate, shift_mlp, scale_mlp)
    x = fused.gated_residual(x, self.ff(y), gate_mlp)
    text, c_y = fused.gated_adaln(
        self.norm2_context, text, c_branch, c_gate, c_shift_mlp, c_scale_mlp
    )
    return clipped(fused.gated_residual(text, self.ff_context(c_y), c_gate_mlp)), x


@adapts(
    "Flux2SingleTransformerBlock",
    "daac230726f3",
    kind="adaln",
    rows=norm_rows(("norm", "adaln"), ("attn", "gated_residual")),
    covers=("norm",),
)
def single_block(
    fused: Fused,
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None,
    temb_mod: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: Any = None,
    split_hidden_states: bool = False,
    text_seq_len: int | None = None,
) -> Any:
    x = hidden_states
    if not keeps_dtype(x, temb_mod):
        return NotImplemented
    if encoder_hidden_states is not None:
        text_seq_len = encoder_hidden_states.shape[1]
        x = torch.cat([encoder_hidden_states, x], dim=1)
    shift, scale, gate = temb_mod.chunk(3, dim=-1)
    y = fused.adaln(self.norm, x, shift, scale)
    branch = self.attn(
        hidden_states=y, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {})
    )
    x = clipped(fused.gated_residual(x, branch, gate))
    return (x[:, :text_seq_len], x[:, text_seq_len:]) if split_hidden_states else x


@adapts(
    "Flux2SwiGLU",
    "a9b3280543e1",
    "f28b14a484bb",
    kind="feed_forward",
    rows=lambda module: [("", "swiglu")],
    covers=("gate_fn",),
)
def swiglu(fused: Fused, self: Any, x: Tensor) -> Any:
    return ops.swiglu(x, gate="first")


@adapts(
    "Flux2AttnProcessor",
    "f8d77ecb688f",
    "1f0ad779974a",
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
    if out is NotImplemented:
        return out
    if encoder_hidden_states is None:
        return self.to_out[1](self.to_out[0](out))
    length = encoder_hidden_states.shape[1]
    text = self.to_add_out(out[:, :length])
    return self.to_out[1](self.to_out[0](out[:, length:])), text


@adapts(
    "Flux2ParallelSelfAttnProcessor",
    "fca0401304cb",
    "5587257c5a05",  # to 0.39
    kind="qk_norm_rope",
    rows=qk_rows("norm_q", "norm_k"),
    covers=("norm_q", "norm_k"),
    helpers={"apply_rotary_emb": ("213e19b8c19f",)},
    processor=True,
)
def parallel_attention(
    fused: Fused,
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    image_rotary_emb: Any = None,
    **kwargs: Any,
) -> Any:
    if kwargs or not fits(hidden_states, self.norm_q.weight):
        return NotImplemented
    together = self.to_qkv_mlp_proj(hidden_states)
    width = 3 * self.inner_dim
    width = together.shape[-1] * width // (width + self.mlp_hidden_dim * self.mlp_mult_factor)
    qkv, mlp = together.split([width, together.shape[-1] - width], dim=-1)
    q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in qkv.chunk(3, dim=-1))
    rotation = None
    if image_rotary_emb is not None:
        cos, sin = image_rotary_emb
        rotation = (cos[:, 0::2], sin[:, 0::2])
    q, k = fused.qk(q, k, self.norm_q, self.norm_k, rotation)
    out = attend(self.processor, q, k, v, attention_mask).flatten(2, 3).to(q.dtype)
    return self.to_out(torch.cat([out, self.mlp_act_fn(mlp)], dim=-1))
