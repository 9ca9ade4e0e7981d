"""Sana-Video: adaLN blocks with linear attention, which takes q and k both turned and not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dit_kernels.integrations.fused import Fused, fits, keeps_dtype
from dit_kernels.integrations.recognition import Row, adapts
from dit_kernels.integrations.shared import norm_rows


@adapts(
    "SanaVideoTransformerBlock",
    "dcdaa92f5a68",
    kind="adaln",
    rows=norm_rows(
        ("norm1", "adaln"),
        ("attn1", "gated_residual"),
        ("norm2", "gated_adaln"),
        ("ff", "gated_residual"),
    ),
    covers=("norm1", "norm2"),
)
def block(
    fused: Fused,
    self: Any,
    hidden_states: Tensor,
    attention_mask: Any = None,
    encoder_hidden_states: Any = None,
    encoder_attention_mask: Any = None,
    timestep: Any = None,
    frames: Any = None,
    height: Any = None,
    width: Any = None,
    rotary_emb: Any = None,
) -> Any:
    x, table = hidden_states, self.scale_shift_table  # [6, C]
    norms = (self.norm1.weight, self.norm1.bias, self.norm2.weight, self.norm2.bias)
    if self.attn2 is None or not keeps_dtype(x, timestep, table, *norms):
        return NotImplemented
    # a row a sample or a token
    modulation = timestep.reshape(len(x), timestep.shape[1], 6, -1).unbind(2)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation
    y = fused.adaln(self.norm1, x, shift, scale, shift_table=table[0], scale_table=table[1])
    x = fused.gated_residual(x, self.attn1(y, rotary_emb=rotary_emb), gate, gate_table=table[2])
    branch = self.attn2(
        x, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask
    )
    x, y = fused.gated_adaln(
        self.norm2,
        x,
        branch,
        None,
        shift_mlp,
        scale_mlp,
        shift_table=table[3],
        scale_table=table[4],
    )
    branch = self.ff(y.unflatten(1, (frames, height, width))).flatten(1, 3)
    return fused.gated_residual(x, branch, gate_mlp, gate_table=table[5])


def attention_rows(attn: Any) -> Sequence[Row] | str:
    found = norm_rows(("norm_q", "qk_norm_rope"), ("norm_k", "qk_norm_rope"))(attn)
    return found if isinstance(found, str) else [("", "qk_norm_rope")] * 2


@adapts(
    "SanaLinearAttnProcessor3_0",
    "7f5c3935e076",
    kind="qk_norm_rope",
    rows=attention_rows,
    covers=("norm_q", "norm_k"),
    processor=True,
)
def linear_attention(
    fused: Fused,
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Any = None,
    rotary_emb: Any = None,
) -> Any:
    if encoder_hidden_states is not None or rotary_emb is None or hidden_states.dim() != 3:
        return NotImplemented
    if not fits(hidden_states, self.norm_q.weight):
        return NotImplemented
    q, k, v = (
        linear(hidden_states).unflatten(2, (self.heads, -1))
        for linear in (self.to_q, self.to_k, self.to_v)
    )
    q, k = fused.qk(q, k, self.norm_q, self.norm_k, over="hidden", act="relu")
    cos, sin = rotary_emb
    turned = fused.qk(q, k, None, None, (cos[..., 0::2], sin[..., 1::2]))
    # [B, H, D, N]
    q, k, v, q_turned, k_turned = (t.permute(0, 2, 3, 1) for t in (q, k, v, *turned))
    q_turned, k_turned, v = q_turned.float(), k_turned.float(), v.float()
    z = 1 / (k.sum(dim=-1, keepdim=True).transpose(-2, -1) @ q + 1e-15)
    out = (v @ k_turned.transpose(-1, -2)) @ q_turned * z
    out = out.flatten(1, 2).transpose(1, 2).to(hidden_states.dtype)
    return self.to_out[1](self.to_out[0](out))
