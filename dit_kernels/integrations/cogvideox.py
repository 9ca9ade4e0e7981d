"""CogVideoX and CogVideoX 1.5."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dit_kernels.integrations.fused import Fused, attend_plainly, fits, keeps_dtype, norm_of
from dit_kernels.integrations.recognition import Row, adapts


def norm_zero_rows(module: Any) -> Sequence[Row] | str:
    if norm_of(module.norm) is None:
        return "its norm is not one that the fused norm replaces"
    return [("", "adaln")] * 2  # video and text


@adapts(
    "CogVideoXLayerNormZero",
    "482cb0b56e22",
    kind="adaln",
    rows=norm_zero_rows,
    covers=("norm",),
)
def norm_zero(
    fused: Fused,
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
) -> Any:
    modulation = self.linear(self.silu(temb))
    tokens = (hidden_states, encoder_hidden_states)
    if not all(keeps_dtype(x, modulation, self.norm.weight) for x in tokens):
        return NotImplemented
    shift, scale, gate, c_shift, c_scale, c_gate = modulation.chunk(6, dim=1)
    x = fused.adaln(self.norm, hidden_states, shift, scale)
    text = fused.adaln(self.norm, encoder_hidden_states, c_shift, c_scale)
    return x, text, gate[:, None], c_gate[:, None]


def block_rows(block: Any) -> Sequence[Row] | str:
    if norm_of(getattr(block.norm2, "norm", None)) is None:
        return "its norm is not one that the fused norm replaces"
    return [("norm2", "gated_adaln")] * 2 + [("ff", "gated_residual")] * 2


@adapts(
    "CogVideoXBlock",
    "f6914c82c59e",
    kind="adaln",
    rows=block_rows,
    covers=("norm2", "norm2.norm"),
)
def block(
    fused: Fused,
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    attention_kwargs: Any = None,
) -> Any:
    x, text = hidden_states, encoder_hidden_states
    if not (keeps_dtype(x, temb) and keeps_dtype(text, temb)):
        return NotImplemented
    y, c_y, gate, c_gate = self.norm1(x, text, temb)
    branch, c_branch = self.attn1(
        hidden_states=y,
        encoder_hidden_states=c_y,
        image_rotary_emb=image_rotary_emb,
        **(attention_kwargs or {}),
    )
    shift, scale, gate_ff, c_shift, c_scale, c_gate_ff = self.norm2.linear(
        self.norm2.silu(temb)
    ).chunk(6, dim=1)
    x, y = fused.gated_adaln(self.norm2.norm, x, branch, gate, shift, scale)
    text, c_y = fused.gated_adaln(self.norm2.norm, text, c_branch, c_gate, c_shift, c_scale)
    branch = self.ff(torch.cat([c_y, y], dim=1))
    length = text.shape[1]
    x = fused.gated_residual(x, branch[:, length:], gate_ff)
    return x, fused.gated_residual(text, branch[:, :length], c_gate_ff)


def attention_rows(attn: Any) -> Sequence[Row] | str:
    if attn.is_cross_attention:
        return "it is a cross-attention"
    if attn.norm_q is not None and not (norm_of(attn.norm_q) and norm_of(attn.norm_k)):
        return "its norms are not those that the fused norm replaces"
    return [("", "qk_norm_rope")]


@adapts(
    "CogVideoXAttnProcessor2_0",
    "7d3ddfe43c39",
    kind="qk_norm_rope",
    rows=attention_rows,
    covers=("norm_q", "norm_k"),
    processor=True,
)
def attention(
    fused: Fused,
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    image_rotary_emb: Any = None,
    **kwargs: Any,
) -> Any:
    length = encoder_hidden_states.shape[1]
    x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    if kwargs or attention_mask is not None or (self.norm_q is None and image_rotary_emb is None):
        return NotImplemented
    if self.norm_q is not None and not fits(x, self.norm_q.weight):
        return NotImplemented
    q, k, v = (
        projection(x).unflatten(-1, (self.heads, -1))
        for projection in (self.to_q, self.to_k, self.to_v)
    )
    rotation = None
    if image_rotary_emb is not None:
        cos, sin = image_rotary_emb  # [N of the video, D], each angle twice
        rotation = (cos[:, 0::2], sin[:, 0::2])
    q, k = fused.qk(q, k, self.norm_q, self.norm_k, rotation, rope_start=length if rotation else 0)
    out = self.to_out[1](self.to_out[0](attend_plainly(q, k, v).flatten(2)))
    return out[:, length:], out[:, :length]
