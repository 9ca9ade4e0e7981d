"""Mochi: RMS norms without weights, computed in float32, and a text stream of its own width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_kernels.integrations.fused import Fused, fits, keeps_dtype, norm_of
from dit_kernels.integrations.recognition import Row, adapts
from dit_kernels.integrations.shared import norm_rows, qk_rows


@adapts("MochiRMSNormZero", "b328650995e9", kind="adaln", rows=norm_rows("norm"), covers=("norm",))
def norm_zero(fused: Fused, self: Any, hidden_states: Tensor, emb: Tensor) -> Any:
    scale, gate, scale_mlp, gate_mlp = self.linear(self.silu(emb)).chunk(4, dim=1)
    y = fused.adaln(self.norm, hidden_states, None, scale, rounding="once")
    return y, gate, scale_mlp, gate_mlp


def continuous_rows(module: Any) -> Sequence[Row] | str:
    return [("", "adaln")] if norm_of(module.norm.norm) else "its norm is not known"


@adapts(
    "MochiLayerNormContinuous",
    "18dd17296858",
    kind="adaln",
    rows=continuous_rows,
    covers=("norm", "norm.norm"),
)
def norm_continuous(fused: Fused, self: Any, x: Tensor, conditioning_embedding: Tensor) -> Any:
    scale = self.linear_1(self.silu(conditioning_embedding).to(x.dtype))
    return fused.adaln(self.norm.norm, x, None, scale, rounding="once")


def block_rows(block: Any) -> Sequence[Row] | str:
    norms = [block.norm2, block.norm3, block.norm4]
    rows = [("norm3", "gated_adaln"), ("norm4", "gated_residual")]
    if not block.context_pre_only:
        norms += [block.norm2_context, block.norm3_context, block.norm4_context]
        rows += [("norm3_context", "gated_adaln"), ("norm4_context", "gated_residual")]
    found = [norm_of(norm.norm) for norm in norms]
    if not all(f is not None and f["weight"] is None for f in found):
        return "its norms are not those that the fused norm replaces"
    if len({f["eps"] for f in found if f is not None}) != 1:
        return "the norms before and after the sum have different eps"
    return rows


_NORMS = ("norm2", "norm3", "norm4", "norm2_context", "norm3_context", "norm4_context")


@adapts(
    "MochiTransformerBlock",
    "6884a5357747",
    kind="adaln",
    rows=block_rows,
    covers=(*_NORMS, *(f"{name}.norm" for name in _NORMS)),
)
def block(
    fused: Fused,
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    encoder_attention_mask: Tensor,
    image_rotary_emb: Any = None,
) -> Any:
    x, text = hidden_states, encoder_hidden_states
    if not (keeps_dtype(x, temb) and keeps_dtype(text, temb)):
        return NotImplemented
    y, gate, scale_mlp, gate_mlp = self.norm1(x, temb)
    if self.context_pre_only:
        c_y = self.norm1_context(text, temb)
    else:
        c_y, c_gate, c_scale_mlp, c_gate_mlp = self.norm1_context(text, temb)
    branch, c_branch = self.attn1(
        hidden_states=y,
        encoder_hidden_states=c_y,
        image_rotary_emb=image_rotary_emb,
        attention_mask=encoder_attention_mask,
    )
    sandwich: dict[str, Any] = dict(gate_act="tanh", branch_norm="rms", rounding="once")
    x, y = fused.gated_adaln(self.norm3.norm, x, branch, gate, None, scale_mlp, **sandwich)
    sandwich["eps"] = self.norm4.norm.eps
    x = fused.gated_residual(x, self.ff(y), gate_mlp, **sandwich)
    if self.context_pre_only:
        return x, text
    del sandwich["eps"]
    text, c_y = fused.gated_adaln(
        self.norm3_context.norm, text, c_branch, c_gate, None, c_scale_mlp, **sandwich
    )
    sandwich["eps"] = self.norm4_context.norm.eps
    return x, fused.gated_residual(text, self.ff_context(c_y), c_gate_mlp, **sandwich)


@adapts(
    "MochiAttnProcessor2_0",
    "a36635e53625",
    kind="qk_norm_rope",
    rows=qk_rows("norm_q", "norm_k", "norm_added_q", "norm_added_k"),
    covers=("norm_q", "norm_k", "norm_added_q", "norm_added_k"),
    processor=True,
)
def attention(
    fused: Fused,
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    attention_mask: Tensor,
    image_rotary_emb: Any = None,
    **kwargs: Any,
) -> Any:
    if kwargs or not fits(hidden_states, self.norm_q.weight):
        return NotImplemented
    q, k, v = (
        projection(hidden_states).unflatten(2, (self.heads, -1))
        for projection in (self.to_q, self.to_k, self.to_v)
    )
    c_q, c_k, c_v = (
        projection(encoder_hidden_states).unflatten(2, (self.heads, -1))
        for projection in (self.add_q_proj, self.add_k_proj, self.add_v_proj)
    )
    rotation = None
    if image_rotary_emb is not None:
        rotation = tuple(t[None] for t in image_rotary_emb)  # [N, H, D / 2]: learned a head
    q, k = fused.qk(q, k, self.norm_q, self.norm_k, rotation)
    c_q, c_k = fused.qk(c_q, c_k, self.norm_added_q, self.norm_added_k)
    q, k, v, c_q, c_k, c_v = (x.transpose(1, 2) for x in (q, k, v, c_q, c_k, c_v))

    length, c_length = q.shape[2], c_q.shape[2]
    parts = []
    for i in range(len(q)):
        # each sample attends with its own prompt's tokens
        valid = torch.nonzero(attention_mask[i].flatten(), as_tuple=False).flatten()
        q_i, k_i, v_i = (
            torch.cat([x[i : i + 1], c[i : i + 1, :, valid]], dim=2)
            for x, c in ((q, c_q), (k, c_k), (v, c_v))
        )
        out = F.scaled_dot_product_attention(q_i, k_i, v_i)
        parts.append(F.pad(out, (0, 0, 0, length + c_length - out.shape[2])))
    out = torch.cat(parts, dim=0).transpose(1, 2).flatten(2, 3)
    out, text = out.split_with_sizes((length, c_length), dim=1)
    out = self.to_out[1](self.to_out[0](out))
    return out, self.to_add_out(text) if hasattr(self, "to_add_out") else text
