"""Lumina 2 and Z-Image: sandwich norms, tanh gates, no shift."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dit_kernels.integrations.fused import Fused, attend, attend_plainly, fits, keeps_dtype, norm_of
from dit_kernels.integrations.recognition import Row, adapts
from dit_kernels.integrations.shared import norm_rows, qk_rows


def sandwich_rows(before: str, branch: str, after: str, last: str, ff: str) -> Any:
    def found(block: Any) -> Sequence[Row] | str:
        rows = norm_rows((branch, ""), (after, "gated_adaln"), (last, "gated_residual"))(block)
        if isinstance(rows, str):
            return rows
        if norm_of(getattr(block, branch))["eps"] != norm_of(getattr(block, after))["eps"]:  # type: ignore[index]
            return "the norms before and after the sum have different eps"
        first = [(before, "adaln")] if before else []
        return [*first, (after, "gated_adaln"), (ff, "gated_residual")]

    return found


@adapts(
    "Lumina2TransformerBlock",
    "f682bbf887da",
    kind="adaln",
    rows=sandwich_rows("", "norm2", "ffn_norm1", "ffn_norm2", "feed_forward"),
    covers=("norm2", "ffn_norm1", "ffn_norm2"),
)
def lumina_block(
    fused: Fused,
    self: Any,
    hidden_states: Tensor,
    attention_mask: Any,
    image_rotary_emb: Any,
    temb: Any = None,
) -> Any:
    x = hidden_states
    gate = scale_mlp = gate_mlp = None
    if self.modulation:
        y, gate, scale_mlp, gate_mlp = self.norm1(x, temb)
    else:
        y = self.norm1(x)
    if not keeps_dtype(x, gate, self.norm2.weight, self.ffn_norm1.weight, self.ffn_norm2.weight):
        return NotImplemented
    branch = self.attn(
        hidden_states=y,
        encoder_hidden_states=y,
        attention_mask=attention_mask,
        image_rotary_emb=image_rotary_emb,
    )
    x, y = sandwich(fused, self.norm2, self.ffn_norm1, x, branch, gate, scale_mlp)
    return closing(fused, self.ffn_norm2, x, self.feed_forward(y), gate_mlp)


@adapts(
    "ZImageTransformerBlock",
    "6f587e92cd29",
    kind="adaln",
    rows=sandwich_rows(
        "attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2", "feed_forward"
    ),
    covers=("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"),
)
def z_image_block(
    fused: Fused,
    self: Any,
    x: Tensor,
    attn_mask: Any,
    freqs_cis: Any,
    adaln_input: Any = None,
    noise_mask: Any = None,
    adaln_noisy: Any = None,
    adaln_clean: Any = None,
) -> Any:
    norms = (self.attention_norm1, self.attention_norm2, self.ffn_norm1, self.ffn_norm2)
    if noise_mask is not None or not keeps_dtype(x, adaln_input, *(n.weight for n in norms)):
        return NotImplemented
    scale = gate = scale_mlp = gate_mlp = None
    if self.modulation:
        scale, gate, scale_mlp, gate_mlp = self.adaLN_modulation(adaln_input).chunk(4, dim=1)
    y = fused.adaln(self.attention_norm1, x, None, scale)
    branch = self.attention(y, attention_mask=attn_mask, freqs_cis=freqs_cis)
    x, y = sandwich(fused, self.attention_norm2, self.ffn_norm1, x, branch, gate, scale_mlp)
    return closing(fused, self.ffn_norm2, x, self.feed_forward(y), gate_mlp)


def sandwich(
    fused: Fused, inner: Any, outer: Any, x: Tensor, branch: Tensor, gate: Any, scale: Any
) -> Any:
    """x = x + tanh(gate) * inner(branch); (x, outer(x) * (1 + scale))"""
    return fused.gated_adaln(
        outer, x, branch, gate, None, scale,
        gate_act="tanh", branch_norm="rms", branch_weight=inner.weight, **rounding(fused, x, branch),
    )  # fmt: skip


def closing(fused: Fused, inner: Any, x: Tensor, branch: Tensor, gate: Any) -> Tensor:
    """x + tanh(gate) * inner(branch)"""
    return fused.gated_residual(
        x, branch, gate, gate_act="tanh", branch_norm="rms", branch_weight=inner.weight,
        eps=inner.eps, **rounding(fused, x, branch),
    )  # fmt: skip


def rounding(fused: Fused, x: Tensor, branch: Tensor) -> dict[str, str]:
    """Under autocast the norm of a 16-bit branch is float32, and stays it."""
    return {"rounding": fused.rounding if branch.dtype == x.dtype else "once"}


def turned(freqs: Tensor) -> tuple[Tensor, Tensor]:
    """Complex [B, N, D / 2] as cos and sin [B, N, 1, D / 2]."""
    return freqs.real.unsqueeze(2), freqs.imag.unsqueeze(2)


@adapts(
    "Lumina2AttnProcessor2_0",
    "256beb5f9a95",
    kind="qk_norm_rope",
    rows=qk_rows("norm_q", "norm_k"),
    covers=("norm_q", "norm_k"),
    helpers={"apply_rotary_emb": ("213e19b8c19f",)},
    processor=True,
)
def lumina_attention(
    fused: Fused,
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    image_rotary_emb: Any = None,
    base_sequence_length: int | None = None,
    **kwargs: Any,
) -> Any:
    if kwargs or not fits(hidden_states, self.norm_q.weight):
        return NotImplemented
    q = self.to_q(hidden_states).unflatten(-1, (self.heads, -1))
    k, v = (
        p(encoder_hidden_states).unflatten(-1, (-1, q.shape[-1])) for p in (self.to_k, self.to_v)
    )
    rotation = None if image_rotary_emb is None else turned(image_rotary_emb)
    q, k = fused.qk(q, k, self.norm_q, self.norm_k, rotation)
    scale = self.scale
    if base_sequence_length is not None:
        scale *= math.sqrt(math.log(hidden_states.shape[1], base_sequence_length))
    groups = self.heads // k.shape[2]
    k, v = (x.unsqueeze(3).repeat(1, 1, 1, groups, 1).flatten(2, 3) for x in (k, v))
    if attention_mask is not None:
        attention_mask = attention_mask.bool().view(len(q), 1, 1, -1)
    out = attend_plainly(q, k, v, attention_mask, scale).flatten(2).type_as(q)
    return self.to_out[1](self.to_out[0](out))


@adapts(
    "ZSingleStreamAttnProcessor",
    "9cffdabaeef3",
    kind="qk_norm_rope",
    rows=qk_rows("norm_q", "norm_k"),
    covers=("norm_q", "norm_k"),
    processor=True,
)
def z_image_attention(
    fused: Fused,
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    freqs_cis: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    if kwargs or not fits(hidden_states, self.norm_q.weight):
        return NotImplemented
    q, k, v = (
        projection(hidden_states).unflatten(-1, (self.heads, -1))
        for projection in (self.to_q, self.to_k, self.to_v)
    )
    q, k = fused.qk(
        q, k, self.norm_q, self.norm_k, None if freqs_cis is None else turned(freqs_cis)
    )
    if attention_mask is not None and attention_mask.dim() == 2:
        attention_mask = attention_mask[:, None, None]
    out = attend(self.processor, q, k, v, attention_mask).flatten(2, 3).to(q.dtype)
    out = self.to_out[0](out)
    return self.to_out[1](out) if len(self.to_out) > 1 else out
