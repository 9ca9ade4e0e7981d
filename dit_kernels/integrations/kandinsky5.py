"""Kandinsky 5. Norms and gates in float32, rounded at the end of each: "once" is what it does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from dit_kernels.integrations.fused import Fused, attend
from dit_kernels.integrations.recognition import Row, adapts
from dit_kernels.integrations.shared import norm_rows, qk_rows


@adapts(
    "Kandinsky5TransformerEncoderBlock",
    "249c9138bb22",
    kind="adaln",
    rows=norm_rows(
        ("self_attention_norm", "adaln"),
        ("feed_forward_norm", "gated_adaln"),
        ("feed_forward", "gated_residual"),
    ),
    covers=("self_attention_norm", "feed_forward_norm"),
)
def encoder_block(fused: Fused, self: Any, x: Tensor, time_embed: Tensor, rope: Any) -> Any:
    modulation = self.text_modulation(time_embed)
    if x.dim() != 3 or modulation.dim() != 2:
        return NotImplemented
    shift, scale, gate, shift_ff, scale_ff, gate_ff = modulation.chunk(6, dim=-1)
    y = fused.adaln(self.self_attention_norm, x, shift, scale, rounding="once")
    branch = self.self_attention(y, rotary_emb=rope)
    x, y = fused.gated_adaln(
        self.feed_forward_norm, x, branch, gate, shift_ff, scale_ff, rounding="once"
    )
    return fused.gated_residual(x, self.feed_forward(y), gate_ff, rounding="once")


@adapts(
    "Kandinsky5TransformerDecoderBlock",
    "ab694ff52be6",
    kind="adaln",
    rows=norm_rows(
        ("self_attention_norm", "adaln"),
        ("cross_attention_norm", "gated_adaln"),
        ("feed_forward_norm", "gated_adaln"),
        ("feed_forward", "gated_residual"),
    ),
    covers=("self_attention_norm", "cross_attention_norm", "feed_forward_norm"),
)
def decoder_block(
    fused: Fused,
    self: Any,
    visual_embed: Tensor,
    text_embed: Tensor,
    time_embed: Tensor,
    rope: Any,
    sparse_params: Any,
) -> Any:
    x, modulation = visual_embed, self.visual_modulation(time_embed)
    if x.dim() != 3 or modulation.dim() != 2:
        return NotImplemented
    shift, scale, gate, c_shift, c_scale, c_gate, shift_ff, scale_ff, gate_ff = modulation.chunk(
        9, dim=-1
    )
    y = fused.adaln(self.self_attention_norm, x, shift, scale, rounding="once")
    branch = self.self_attention(y, rotary_emb=rope, sparse_params=sparse_params)
    x, y = fused.gated_adaln(
        self.cross_attention_norm, x, branch, gate, c_shift, c_scale, rounding="once"
    )
    branch = self.cross_attention(y, encoder_hidden_states=text_embed)
    x, y = fused.gated_adaln(
        self.feed_forward_norm, x, branch, c_gate, shift_ff, scale_ff, rounding="once"
    )
    return fused.gated_residual(x, self.feed_forward(y), gate_ff, rounding="once")


def feed_forward_rows(module: Any) -> Sequence[Row] | str:
    act = module.activation
    if type(act) is not nn.GELU or act.approximate not in ("tanh", "none"):
        return f"its activation {type(act).__name__} is not one that the op has"
    return [("", "gelu_bias")]


@adapts(
    "Kandinsky5FeedForward",
    "3030f61bccc1",
    kind="feed_forward",
    rows=feed_forward_rows,
    covers=("activation",),
)
def feed_forward(fused: Fused, self: Any, x: Tensor) -> Any:
    return fused.feed_forward(
        self.in_layer(x), f"gelu-{self.activation.approximate}", self.out_layer
    )


@adapts(
    "Kandinsky5AttnProcessor",
    "54836000c2b4",
    kind="qk_norm_rope",
    rows=qk_rows("query_norm", "key_norm"),
    covers=("query_norm", "key_norm"),
    processor=True,
)
def attention(
    fused: Fused,
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    sparse_params: Any = None,
    rotary_emb: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
    if kwargs or sparse_params is not None or hidden_states.dim() != 3:
        return NotImplemented
    rotation = None
    if rotary_emb is not None:
        # matrices [N, 1, D / 2, 2, 2] of rows (cos, -sin) and (sin, cos)
        matrices = rotary_emb.reshape(-1, *rotary_emb.shape[-3:])
        if len(matrices) != hidden_states.shape[1] or context is not hidden_states:
            return NotImplemented
        rotation = (matrices[..., 0, 0], matrices[..., 1, 0])
    q, k, v = (
        projection(x).unflatten(-1, (self.num_heads, -1))
        for projection, x in (
            (self.to_query, hidden_states), (self.to_key, context), (self.to_value, context)
        )
    )  # fmt: skip
    q, k = fused.qk(q, k, self.query_norm, self.key_norm, rotation)
    return self.out_layer(attend(self.processor, q, k, v).flatten(-2, -1))
