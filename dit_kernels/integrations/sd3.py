"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dit_kernels.integrations.fused import Fused, attend_plainly, fits, keeps_dtype, normed_dtype
from dit_kernels.integrations.recognition import Row, adapts
from dit_kernels.integrations.shared import norm_rows, qk_rows


def block_rows(block: Any) -> Sequence[Row] | str:
    rows = [("norm2", "gated_adaln"), ("ff", "gated_residual")]
    if block.use_dual_attention:
        rows = [("attn", "gated_residual"), *rows]
    if not block.context_pre_only:
        rows += [("norm2_context", "gated_adaln"), ("ff_context", "gated_residual")]
    return norm_rows(*rows)(block)


@adapts(
    "JointTransformerBlock",
    "f5a65c7e2aaa",
    kind="adaln",
    rows=block_rows,
    covers=("norm2", "norm2_context"),
)
def block(
    fused: Fused,
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    joint_attention_kwargs: Any = None,
) -> Any:
    x, text = hidden_states, encoder_hidden_states
    if self._chunk_size is not None or not (keeps_dtype(x, temb) and keeps_dtype(text, temb)):
        return NotImplemented
    kwargs = joint_attention_kwargs or {}
    y, gate, shift_mlp, scale_mlp, gate_mlp, *dual = self.norm1(x, emb=temb)
    if self.context_pre_only:
        c_y = self.norm1_context(text, temb)
    else:
        c_y, c_gate, c_shift_mlp, c_scale_mlp, c_gate_mlp = self.norm1_context(text, emb=temb)
    branch, c_branch = self.attn(hidden_states=y, encoder_hidden_states=c_y, **kwargs)
    if dual:
        x = fused.gated_residual(x, branch, gate)
        y, gate = dual
        branch = self.attn2(hidden_states=y, **kwargs)
    x, y = fused.gated_adaln(self.norm2, x, branch, gate, shift_mlp, scale_mlp)
    x = fused.gated_residual(x, self.ff(y), gate_mlp)
    if self.context_pre_only:
        return None, x
    text, c_y = fused.gated_adaln(
        self.norm2_context, text, c_branch, c_gate, c_shift_mlp, c_scale_mlp
    )
    return fused.gated_residual(text, self.ff_context(c_y), c_gate_mlp), x


@adapts(
    "SD3SingleTransformerBlock",
    "d953ff481a29",
    kind="adaln",
    rows=norm_rows(("norm2", "gated_adaln"), ("ff", "gated_residual")),
    covers=("norm2",),
)
def single_block(fused: Fused, self: Any, hidden_states: Tensor, temb: Tensor) -> Any:
    x = hidden_states
    if not keeps_dtype(x, temb):
        return NotImplemented
    y, gate, shift_mlp, scale_mlp, gate_mlp = self.norm1(x, emb=temb)
    branch = self.attn(hidden_states=y, encoder_hidden_states=None)
    x, y = fused.gated_adaln(self.norm2, x, branch, gate, shift_mlp, scale_mlp)
    return fused.gated_residual(x, self.ff(y), gate_mlp)


@adapts(
    "JointAttnProcessor2_0",
    "f25d0ea18661",
    kind="qk_norm_rope",
    rows=qk_rows("norm_q", "norm_k", "norm_added_q", "norm_added_k"),
    covers=("norm_q", "norm_k", "norm_added_q", "norm_added_k"),
    processor=True,
)
def attention(
    fused: Fused,
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    text = encoder_hidden_states
    if not fits(hidden_states, self.norm_q.weight):
        return NotImplemented
    q, k, v = self.to_q(hidden_states), self.to_k(hidden_states), self.to_v(hidden_states)
    q, k, v = (x.unflatten(-1, (self.heads, -1)) for x in (q, k, v))
    q, k = fused.qk(q, k, self.norm_q, self.norm_k)
    if text is not None:
        c_q, c_k, c_v = self.add_q_proj(text), self.add_k_proj(text), self.add_v_proj(text)
        c_q, c_k, c_v = (x.unflatten(-1, (self.heads, -1)) for x in (c_q, c_k, c_v))
        if self.norm_added_q is not None:
            c_q, c_k = fused.qk(c_q, c_k, self.norm_added_q, self.norm_added_k)
        q, k, v = (torch.cat(pair, dim=1) for pair in ((q, c_q), (k, c_k), (v, c_v)))
    out = attend_plainly(q, k, v).flatten(2).to(q.dtype)
    if text is None:
        return self.to_out[1](self.to_out[0](out))
    length = hidden_states.shape[1]
    out, text = out[:, :length], out[:, length:]
    like = normed_dtype(q, self.norm_q)
    text = text.to(like) if self.context_pre_only else self.to_add_out(text)
    return self.to_out[1](self.to_out[0](out)), text
