"""Qwen-Image and Qwen-Image-Edit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dit_kernels.integrations.flux import clipped
from dit_kernels.integrations.fused import Fused, attend, fits, keeps_dtype
from dit_kernels.integrations.recognition import adapts
from dit_kernels.integrations.shared import norm_rows, qk_rows


@adapts(
    "QwenImageTransformerBlock",
    "8b2cee775f21",
    kind="adaln",
    rows=norm_rows(
        ("img_norm1", "adaln"),
        ("txt_norm1", "adaln"),
        ("img_norm2", "gated_adaln"),
        ("txt_norm2", "gated_adaln"),
        ("img_mlp", "gated_residual"),
        ("txt_mlp", "gated_residual"),
    ),
    covers=("img_norm1", "txt_norm1", "img_norm2", "txt_norm2"),
)
def block(
    fused: Fused,
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    encoder_hidden_states_mask: Any,
    temb: Tensor,
    image_rotary_emb: Any = None,
    joint_attention_kwargs: Any = None,
    modulate_index: Tensor | None = None,
) -> Any:
    x, text = hidden_states, encoder_hidden_states
    if not (keeps_dtype(x, temb) and keeps_dtype(text, temb)):
        return NotImplemented
    modulation = self.img_mod(temb)
    if modulate_index is not None and len(modulation) != 2 * len(x):
        # one sample's is every sample's
        modulation = torch.cat([half.expand(len(x), -1) for half in modulation.chunk(2)])
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=-1)
    if self.zero_cond_t:
        temb = temb.chunk(2, dim=0)[0]
    c_shift, c_scale, c_gate, c_shift_mlp, c_scale_mlp, c_gate_mlp = self.txt_mod(temb).chunk(
        6, dim=-1
    )
    rows: dict[str, Any] = {}
    if modulate_index is not None:
        # modulation [2 B, C]: the samples' rows, then those of their given images; 0 or else a token
        samples = torch.arange(len(x), device=x.device)[:, None]
        rows["row_index"] = (samples + len(x) * (modulate_index != 0)).to(torch.int32)

    y = fused.adaln(self.img_norm1, x, shift, scale, **rows)
    c_y = fused.adaln(self.txt_norm1, text, c_shift, c_scale)
    branch, c_branch = self.attn(
        hidden_states=y,
        encoder_hidden_states=c_y,
        encoder_hidden_states_mask=encoder_hidden_states_mask,
        image_rotary_emb=image_rotary_emb,
        **(joint_attention_kwargs or {}),
    )
    x, y = fused.gated_adaln(self.img_norm2, x, branch, gate, shift_mlp, scale_mlp, **rows)
    x = fused.gated_residual(x, self.img_mlp(y), gate_mlp, **rows)
    text, c_y = fused.gated_adaln(self.txt_norm2, text, c_branch, c_gate, c_shift_mlp, c_scale_mlp)
    text = fused.gated_residual(text, self.txt_mlp(c_y), c_gate_mlp)
    return clipped(text), clipped(x)


@adapts(
    "QwenDoubleStreamAttnProcessor2_0",
    "96ab5de01880",
    "52010537c9fb",  # 0.40, 0.41
    "57152ce3a0b1",  # 0.39
    kind="qk_norm_rope",
    rows=qk_rows("norm_q", "norm_k", "norm_added_q", "norm_added_k"),
    covers=("norm_q", "norm_k", "norm_added_q", "norm_added_k"),
    helpers={"apply_rotary_emb_qwen": ("7419232164b6",)},
    processor=True,
)
def attention(
    fused: Fused,
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    encoder_hidden_states_mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
    image_rotary_emb: Any = None,
    **kwargs: Any,
) -> Any:
    x, text = hidden_states, encoder_hidden_states
    if kwargs or text is None or attention_mask is not None or not fits(x, self.norm_q.weight):
        return NotImplemented
    if encoder_hidden_states_mask is not None:
        image_mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        attention_mask = torch.cat([encoder_hidden_states_mask, image_mask], dim=1)[:, None, None]
    dim = self.inner_dim // self.heads
    q, k, v = (p(x).unflatten(-1, (-1, dim)) for p in (self.to_q, self.to_k, self.to_v))
    c_q, c_k, c_v = (
        p(text).unflatten(-1, (-1, dim))
        for p in (self.add_q_proj, self.add_k_proj, self.add_v_proj)
    )
    rotation = c_rotation = None
    if image_rotary_emb is not None:
        rotation, c_rotation = ((f.real, f.imag) for f in image_rotary_emb)  # complex [N, D / 2]
    q, k = fused.qk(q, k, self.norm_q, self.norm_k, rotation)
    c_q, c_k = fused.qk(c_q, c_k, self.norm_added_q, self.norm_added_k, c_rotation)
    q, k, v = (torch.cat(pair, dim=1) for pair in ((c_q, q), (c_k, k), (c_v, v)))
    out = attend(self.processor, q, k, v, attention_mask).flatten(2, 3).to(q.dtype)
    length = text.shape[1]
    text, out = out[:, :length], self.to_out[0](out[:, length:].contiguous())
    if len(self.to_out) > 1:
        out = self.to_out[1](out)
    return out, self.to_add_out(text.contiguous())
