"""LTX-Video."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dit_kernels.integrations.fused import Fused, attend, fits, keeps_dtype, mask_of_heads
from dit_kernels.integrations.recognition import adapts
from dit_kernels.integrations.shared import norm_rows


@adapts(
    "LTXVideoTransformerBlock",
    "bc8351ef0c0a",
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
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Any = None,
    encoder_attention_mask: Any = None,
) -> Any:
    x, table = hidden_states, self.scale_shift_table  # [6, C]
    weights = (self.norm1.weight, self.norm2.weight)
    if not keeps_dtype(x, temb, table, *weights) or len(table) != 6:
        return NotImplemented
    # a row a sample or a token
    modulation = temb.unflatten(-1, (6, -1)).unbind(2)
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation

    y = fused.adaln(self.norm1, x, shift, scale, shift_table=table[0], scale_table=table[1])
    branch = self.attn1(
        hidden_states=y, encoder_hidden_states=None, image_rotary_emb=image_rotary_emb
    )
    x = fused.gated_residual(x, branch, gate, gate_table=table[2])
    branch = self.attn2(
        x,
        encoder_hidden_states=encoder_hidden_states,
        image_rotary_emb=None,
        attention_mask=encoder_attention_mask,
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
    return fused.gated_residual(x, self.ff(y), gate_mlp, gate_table=table[5])


def attention_rows(attn: Any) -> Any:
    found = norm_rows(("norm_q", "qk_norm_rope"), ("norm_k", "qk_norm_rope"))(attn)
    return found if isinstance(found, str) else [("", "qk_norm_rope")]


@adapts(
    "LTXVideoAttnProcessor",
    "786f53ae3f1a",
    kind="qk_norm_rope",
    rows=attention_rows,
    covers=("norm_q", "norm_k"),
    helpers={"apply_rotary_emb": ("bd900aa57bac",)},
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
    attention_mask = mask_of_heads(self, attention_mask, context)
    q, k, v = (
        projection(x).unflatten(2, (self.heads, -1))
        for projection, x in (
            (self.to_q, hidden_states), (self.to_k, context), (self.to_v, context)
        )
    )  # fmt: skip
    rotation = None
    if image_rotary_emb is not None:
        # the angles run over the whole hidden size, [B, N, C], each twice
        cos, sin = (t[..., 0::2].unflatten(2, (self.heads, -1)) for t in image_rotary_emb)
        rotation = (cos, sin)
    q, k = fused.qk(q, k, self.norm_q, self.norm_k, rotation, over="hidden")
    out = attend(self.processor, q, k, v, attention_mask).flatten(2, 3).to(q.dtype)
    return self.to_out[1](self.to_out[0](out))
