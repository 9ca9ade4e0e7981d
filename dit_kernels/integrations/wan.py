"""Wan 2.1 and 2.2, and what has their blocks: VACE, Animate, ChronoEdit, SkyReels-V2 (attention).

The block computes its norms and gates in float32 and rounds at the end of each: "once" is what it does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from dit_kernels.integrations.fused import Fused, attend, fits, norm_of
from dit_kernels.integrations.recognition import Row, adapts


def block_rows(block: Any) -> Sequence[Row] | str:
    norms = [block.norm1, block.norm3]
    crossed = not isinstance(block.norm2, nn.Identity)
    if not all(norm_of(norm) for norm in norms + [block.norm2] * crossed):
        return "its norms are not those that the fused norm replaces"
    return [
        ("norm1", "adaln"),
        ("norm2", "gated_adaln" if crossed else "gated_residual"),
        ("norm3", "gated_adaln"),
        ("ffn", "gated_residual"),
    ]


@adapts(
    "WanTransformerBlock",
    "1c5bb4dcb0c3",
    kind="adaln",
    rows=block_rows,
    covers=("norm1", "norm2", "norm3"),
)
def block(
    fused: Fused,
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    rotary_emb: Any,
) -> Any:
    table = self.scale_shift_table[0]  # [6, C]
    parts = 2 if temb.dim() == 4 else 1  # temb [B, 6, C], or a row a token [B, N, 6, C]
    shift, scale, gate, c_shift, c_scale, c_gate = temb.unbind(parts)
    x = hidden_states

    y = fused.adaln(
        self.norm1, x, shift, scale, shift_table=table[0], scale_table=table[1], rounding="once"
    )
    branch = self.attn1(y, None, None, rotary_emb)
    if norm_of(self.norm2) is None:
        x = fused.gated_residual(x, branch, gate, gate_table=table[2], rounding="once")
        y = x
    else:
        x, y = fused.gated_adaln(self.norm2, x, branch, gate, gate_table=table[2], rounding="once")
    branch = self.attn2(y, encoder_hidden_states, None, None)
    x, y = fused.gated_adaln(
        self.norm3, x, branch, None, c_shift, c_scale, shift_table=table[3], scale_table=table[4],
        rounding="once",
    )  # fmt: skip
    return fused.gated_residual(x, self.ffn(y), c_gate, gate_table=table[5], rounding="once")


def attention_rows(attn: Any) -> Sequence[Row] | str:
    names = ["norm_q", "norm_k"] + ["norm_added_k"] * (attn.add_k_proj is not None)
    if not all(norm_of(getattr(attn, name, None)) for name in names):
        return "its norms are not those that the fused norm replaces"
    calls = 1 if not attn.is_cross_attention else 2 + (attn.add_k_proj is not None)
    return [("", "qk_norm_rope")] * calls


@adapts(
    "WanAttnProcessor",
    "92a6f3fc6775",
    "a4b4c8cd5c4a",
    kind="qk_norm_rope",
    rows=attention_rows,
    covers=("norm_q", "norm_k", "norm_added_k"),
    helpers={"_get_qkv_projections": ("64a735fed320", "e728e80dc7e1")},
    processor=True,
)
def attention(
    fused: Fused,
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    rotary_emb: Any = None,
    **kwargs: Any,
) -> Any:
    if kwargs or self.processor._parallel_config is not None:
        return NotImplemented
    image = None
    context = encoder_hidden_states
    if self.add_k_proj is not None and context is not None:
        length = context.shape[1] - 512  # the text's length, fixed in the model
        image, context = context[:, :length], context[:, length:]
    q, k, v = projections(self, hidden_states, context)
    if not fits(q, self.norm_q.weight):
        return NotImplemented
    q, k = (x.unflatten(2, (self.heads, -1)) for x in (q, k))
    v = v.unflatten(2, (self.heads, -1))
    angles = None if rotary_emb is None else halved(*rotary_emb)
    if self.is_cross_attention:
        # q and k have their own lengths, and image keys a third: one call each keeps them apart
        q, _ = fused.qk(q, None, self.norm_q, None, angles, over="hidden")
        k, _ = fused.qk(k, None, self.norm_k, None, angles, over="hidden")
    else:
        q, k = fused.qk(q, k, self.norm_q, self.norm_k, angles, over="hidden")

    out_image = None
    if image is not None:
        k_image, v_image = image_projections(self, image)
        k_image, v_image = (x.unflatten(2, (self.heads, -1)) for x in (k_image, v_image))
        k_image, _ = fused.qk(k_image, None, self.norm_added_k, None, over="hidden")
        out_image = attend(self.processor, q, k_image, v_image).flatten(2, 3).type_as(q)
    out = attend(self.processor, q, k, v, attention_mask).flatten(2, 3).type_as(q)
    if out_image is not None:
        out = out + out_image
    return self.to_out[1](self.to_out[0](out))


def halved(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Each angle stands twice in the model's tables [1, N, 1, D]."""
    return cos[..., 0::2], sin[..., 1::2]


def projections(
    self: Any, hidden_states: Tensor, context: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    context = hidden_states if context is None else context
    if not self.fused_projections:
        return self.to_q(hidden_states), self.to_k(context), self.to_v(context)
    if not self.is_cross_attention:
        return self.to_qkv(hidden_states).chunk(3, dim=-1)
    return (self.to_q(hidden_states), *self.to_kv(context).chunk(2, dim=-1))


def image_projections(self: Any, image: Tensor) -> Sequence[Tensor]:
    if self.fused_projections:
        return self.to_added_kv(image).chunk(2, dim=-1)
    return self.add_k_proj(image), self.add_v_proj(image)
