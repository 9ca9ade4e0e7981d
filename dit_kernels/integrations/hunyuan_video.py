"""HunyuanVideo, HunyuanVideo 1.5 and HunyuanImage."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_kernels.integrations.fused import Fused, attend, fits, keeps_dtype, normed_dtype
from dit_kernels.integrations.recognition import adapts
from dit_kernels.integrations.shared import norm_rows, qk_rows


@adapts(
    "HunyuanVideoTransformerBlock",
    "14a44f02558e",
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
    attention_mask: Any = None,
    freqs_cis: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    x, text = hidden_states, encoder_hidden_states
    if not (keeps_dtype(x, temb) and keeps_dtype(text, temb)):
        return NotImplemented
    y, gate, shift_mlp, scale_mlp, gate_mlp = self.norm1(x, emb=temb)
    c_y, c_gate, c_shift_mlp, c_scale_mlp, c_gate_mlp = self.norm1_context(text, emb=temb)
    branch, c_branch = self.attn(
        hidden_states=y,
        encoder_hidden_states=c_y,
        attention_mask=attention_mask,
        image_rotary_emb=freqs_cis,
    )
    x, y = fused.gated_adaln(self.norm2, x, branch, gate, shift_mlp, scale_mlp)
    text, c_y = fused.gated_adaln(
        self.norm2_context, text, c_branch, c_gate, c_shift_mlp, c_scale_mlp
    )
    branch, c_branch = self.ff(y), self.ff_context(c_y)
    x = fused.gated_residual(x, branch, gate_mlp)
    return x, fused.gated_residual(text, c_branch, c_gate_mlp)


@adapts(
    "HunyuanVideoSingleTransformerBlock",
    "26be1a620069",
    kind="adaln",
    rows=lambda block: [("proj_out", "gated_residual")],
)
def single_block(
    fused: Fused,
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Any = None,
    image_rotary_emb: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if not keeps_dtype(hidden_states, temb):
        return NotImplemented
    length = encoder_hidden_states.shape[1]
    x = torch.cat([hidden_states, encoder_hidden_states], dim=1)
    y, gate = self.norm(x, emb=temb)
    branch = single_branch(self, y, length, attention_mask, image_rotary_emb)
    x = fused.gated_residual(x, branch, gate)
    return x[:, :-length], x[:, -length:]


def single_branch(self: Any, y: Tensor, length: int, attention_mask: Any, angles: Any) -> Tensor:
    """Attention and MLP of a single block side by side; the last `length` tokens are the text."""
    mlp = self.act_mlp(self.proj_mlp(y))
    branches = self.attn(
        hidden_states=y[:, :-length],
        encoder_hidden_states=y[:, -length:],
        attention_mask=attention_mask,
        image_rotary_emb=angles,
    )
    return self.proj_out(torch.cat([torch.cat(branches, dim=1), mlp], dim=2))


@adapts(
    "HunyuanVideoIndividualTokenRefinerBlock",
    "05be015d9101",
    kind="adaln",
    rows=norm_rows(("norm2", "gated_adaln"), ("ff", "gated_residual")),
    covers=("norm2",),
)
def refiner_block(
    fused: Fused, self: Any, hidden_states: Tensor, temb: Tensor, attention_mask: Any = None
) -> Any:
    x = hidden_states
    if not keeps_dtype(x, temb, self.norm2.weight):
        return NotImplemented
    branch = self.attn(
        hidden_states=self.norm1(x), encoder_hidden_states=None, attention_mask=attention_mask
    )
    gate, gate_mlp = self.norm_out(temb)
    x, y = fused.gated_adaln(self.norm2, x, branch, gate)
    return fused.gated_residual(x, self.ff(y), gate_mlp)


@adapts(
    "HunyuanVideoAttnProcessor2_0",
    "b1e6a0da4474",
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
    image_rotary_emb: Any = None,
    **kwargs: Any,
) -> Any:
    x, text = hidden_states, encoder_hidden_states
    if kwargs or text is None or not fits(x, self.norm_q.weight):
        return NotImplemented
    length, video = text.shape[1], x.shape[1]
    if self.add_q_proj is None:
        x = torch.cat([x, text], dim=1)
    q, k, v = (
        projection(x).unflatten(2, (self.heads, -1))
        for projection in (self.to_q, self.to_k, self.to_v)
    )
    rotation: Any = None
    part: dict[str, Any] = {}
    if image_rotary_emb is not None:
        cos, sin = image_rotary_emb  # [N of the video, D], each angle twice
        rotation, part = (cos[:, 0::2], sin[:, 0::2]), {"rope_len": video}
    q, k = fused.qk(q, k, self.norm_q, self.norm_k, rotation, **part)
    if self.add_q_proj is not None:
        c_q, c_k, c_v = (
            projection(text).unflatten(2, (self.heads, -1))
            for projection in (self.add_q_proj, self.add_k_proj, self.add_v_proj)
        )
        if self.norm_added_q is not None:
            c_q, c_k = fused.qk(c_q, c_k, self.norm_added_q, self.norm_added_k)
        q, k, v = (torch.cat(pair, dim=1) for pair in ((q, c_q), (k, c_k), (v, c_v)))
    out = attend(self.processor, q, k, v, attention_mask).flatten(2, 3)
    out = out.to(normed_dtype(q, self.norm_q))
    out, text = out[:, :-length], out[:, -length:]
    if getattr(self, "to_out", None) is not None:
        out = self.to_out[1](self.to_out[0](out))
    if getattr(self, "to_add_out", None) is not None:
        text = self.to_add_out(text)
    return out, text


@adapts(
    "HunyuanVideo15AttnProcessor2_0",
    "804c5914400c",
    kind="qk_norm_rope",
    rows=qk_rows("norm_q", "norm_k", "norm_added_q", "norm_added_k"),
    covers=("norm_q", "norm_k", "norm_added_q", "norm_added_k"),
    processor=True,
)
def attention15(
    fused: Fused,
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    image_rotary_emb: Any = None,
    **kwargs: Any,
) -> Any:
    x, text = hidden_states, encoder_hidden_states
    if kwargs or text is None or attention_mask is None or not fits(x, self.norm_q.weight):
        return NotImplemented
    q, k, v = (
        projection(x).unflatten(2, (self.heads, -1))
        for projection in (self.to_q, self.to_k, self.to_v)
    )
    rotation = None
    if image_rotary_emb is not None:
        cos, sin = image_rotary_emb
        rotation = (cos[:, 0::2], sin[:, 0::2])
    q, k = fused.qk(q, k, self.norm_q, self.norm_k, rotation)
    c_q, c_k, c_v = (
        projection(text).unflatten(2, (self.heads, -1))
        for projection in (self.add_q_proj, self.add_k_proj, self.add_v_proj)
    )
    c_q, c_k = fused.qk(c_q, c_k, self.norm_added_q, self.norm_added_k)
    q, k, v = (torch.cat(pair, dim=1) for pair in ((q, c_q), (k, c_k), (v, c_v)))
    length, text_length = q.shape[1], text.shape[1]
    mask = F.pad(attention_mask, (length - attention_mask.shape[1], 0), value=True).bool()
    mask = mask.view(len(q), 1, 1, length).repeat(1, 1, length, 1)
    out = attend(self.processor, q, k, v, mask & mask.transpose(2, 3)).flatten(2, 3).to(q.dtype)
    out, text = out[:, :-text_length], out[:, -text_length:]
    if getattr(self, "to_out", None) is not None:
        out = self.to_out[1](self.to_out[0](out))
    if getattr(self, "to_add_out", None) is not None:
        text = self.to_add_out(text)
    return out, text


# Image to video: the tokens of the first frame, which is given, have modulation of their own.


def first_frame_rows(x: Tensor, first: int) -> Tensor:
    """row_index [B, N] into rows [2B, C]: sample b's own at b, its first frame's at B + b."""
    samples = torch.arange(x.shape[0], device=x.device)[:, None]
    in_first = torch.arange(x.shape[1], device=x.device) < first
    return (samples + x.shape[0] * in_first).int()


def both(own: Tensor, first: Tensor, batch: int) -> Tensor:
    """The rows [2B, C]; one sample's is every sample's."""
    return torch.cat([rows.expand(batch, -1) for rows in (own, first)])


@adapts(
    "HunyuanVideoTokenReplaceAdaLayerNormZero",
    "7fdbb0cbb740",
    "6383a83b4b36",
    kind="adaln",
    rows=norm_rows("norm"),
    covers=("norm",),
)
def token_replace_norm(
    fused: Fused,
    self: Any,
    hidden_states: Tensor,
    emb: Tensor,
    token_replace_emb: Tensor,
    first_frame_num_tokens: int,
) -> Any:
    x = hidden_states
    emb, first = (self.linear(self.silu(e)) for e in (emb, token_replace_emb))
    if not keeps_dtype(x, emb, first):
        return NotImplemented
    parts = emb.shape[-1] // x.shape[-1]  # 6; 3 in a single block
    shift, scale, *rest = emb.chunk(parts, dim=1)
    first_shift, first_scale, *first_rest = first.chunk(parts, dim=1)
    y = fused.adaln(
        self.norm,
        x,
        both(shift, first_shift, len(x)),
        both(scale, first_scale, len(x)),
        row_index=first_frame_rows(x, first_frame_num_tokens),
    )
    return y, *rest, *first_rest


@adapts(
    "HunyuanVideoTokenReplaceTransformerBlock",
    "8f9c6961caef",
    kind="adaln",
    rows=norm_rows(
        ("norm2", "gated_adaln"),
        ("norm2_context", "gated_adaln"),
        ("ff", "gated_residual"),
        ("ff_context", "gated_residual"),
    ),
    covers=("norm2", "norm2_context"),
)
def token_replace_block(
    fused: Fused,
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Any = None,
    freqs_cis: Any = None,
    token_replace_emb: Any = None,
    num_tokens: Any = None,
) -> Any:
    x, text = hidden_states, encoder_hidden_states
    if not (keeps_dtype(x, temb, token_replace_emb) and keeps_dtype(text, temb)):
        return NotImplemented
    y, *modulation = self.norm1(x, temb, token_replace_emb, num_tokens)
    gate, shift_mlp, scale_mlp, gate_mlp = (
        both(own, first, len(x)) for own, first in zip(modulation[:4], modulation[4:], strict=True)
    )
    row_index = first_frame_rows(x, num_tokens)
    c_y, c_gate, c_shift_mlp, c_scale_mlp, c_gate_mlp = self.norm1_context(text, emb=temb)
    branch, c_branch = self.attn(
        hidden_states=y,
        encoder_hidden_states=c_y,
        attention_mask=attention_mask,
        image_rotary_emb=freqs_cis,
    )
    x, y = fused.gated_adaln(self.norm2, x, branch, gate, shift_mlp, scale_mlp, row_index=row_index)
    text, c_y = fused.gated_adaln(
        self.norm2_context, text, c_branch, c_gate, c_shift_mlp, c_scale_mlp
    )
    branch, c_branch = self.ff(y), self.ff_context(c_y)
    x = fused.gated_residual(x, branch, gate_mlp, row_index=row_index)
    return x, fused.gated_residual(text, c_branch, c_gate_mlp)


@adapts(
    "HunyuanVideoTokenReplaceSingleTransformerBlock",
    "c28de5cd7f1c",
    kind="adaln",
    rows=lambda block: [("proj_out", "gated_residual")],
)
def token_replace_single_block(
    fused: Fused,
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Any = None,
    image_rotary_emb: Any = None,
    token_replace_emb: Any = None,
    num_tokens: Any = None,
) -> Any:
    if not keeps_dtype(hidden_states, temb, token_replace_emb):
        return NotImplemented
    length = encoder_hidden_states.shape[1]
    x = torch.cat([hidden_states, encoder_hidden_states], dim=1)
    y, gate, first_gate = self.norm(x, temb, token_replace_emb, num_tokens)
    branch = single_branch(self, y, length, attention_mask, image_rotary_emb)
    x = fused.gated_residual(
        x, branch, both(gate, first_gate, len(x)), row_index=first_frame_rows(x, num_tokens)
    )
    return x[:, :-length], x[:, -length:]
