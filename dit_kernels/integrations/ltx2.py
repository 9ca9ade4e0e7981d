"""LTX-2: video and audio tokens side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dit_kernels.integrations.fused import Fused, attend, fits, keeps_dtype, mask_of_heads
from dit_kernels.integrations.ltx import attention_rows
from dit_kernels.integrations.recognition import Row, adapts
from dit_kernels.integrations.shared import norm_rows


@dataclass(frozen=True)
class Modulation:
    """What get_mod_params gives, with the learned row not yet added: it is added in the op."""

    table: Tensor  # [n, C]
    values: tuple[Tensor, ...]  # n times [B, 1 | N, C]

    @staticmethod
    def of(table: Tensor, embedded: Tensor) -> Modulation:
        return Modulation(table, embedded.unflatten(-1, (len(table), -1)).unbind(2))

    def shift_scale(self, shift: int, scale: int) -> dict[str, Tensor]:
        return {
            "shift": self.values[shift], "shift_table": self.table[shift],
            "scale": self.values[scale], "scale_table": self.table[scale],
        }  # fmt: skip

    def gate(self, index: int) -> dict[str, Any]:
        return {"gate": self.values[index], "gate_table": self.table[index]}

    def added(self, index: int) -> Tensor:
        return self.values[index] + self.table[index]


NORMS = (
    "norm1", "audio_norm1", "norm2", "audio_norm2", "audio_to_video_norm", "video_to_audio_norm",
    "norm3", "audio_norm3",
)  # fmt: skip


@adapts(
    "LTX2VideoTransformerBlock",
    "879546c7a693",
    "e4f05c1cb336",  # to 0.39
    kind="adaln",
    rows=norm_rows(
        *((norm, "adaln" if norm.endswith("norm1") else "gated_adaln") for norm in NORMS),
        ("ff", "gated_residual"),
        ("audio_ff", "gated_residual"),
    ),
    covers=NORMS,
)
def block(
    fused: Fused,
    self: Any,
    hidden_states: Tensor,
    audio_hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    audio_encoder_hidden_states: Tensor,
    temb: Tensor,
    temb_audio: Tensor,
    temb_ca_scale_shift: Tensor,
    temb_ca_audio_scale_shift: Tensor,
    temb_ca_gate: Tensor,
    temb_ca_audio_gate: Tensor,
    temb_prompt: Tensor | None = None,
    temb_prompt_audio: Tensor | None = None,
    video_rotary_emb: Any = None,
    audio_rotary_emb: Any = None,
    ca_video_rotary_emb: Any = None,
    ca_audio_rotary_emb: Any = None,
    encoder_attention_mask: Any = None,
    audio_encoder_attention_mask: Any = None,
    self_attention_mask: Any = None,
    audio_self_attention_mask: Any = None,
    a2v_cross_attention_mask: Any = None,
    v2a_cross_attention_mask: Any = None,
    use_a2v_cross_attention: bool = True,
    use_v2a_cross_attention: bool = True,
    perturbation_mask: Any = None,
    all_perturbed: Any = None,
) -> Any:
    x, audio = hidden_states, audio_hidden_states
    tables = (
        self.video_a2v_cross_attn_scale_shift_table,
        self.audio_a2v_cross_attn_scale_shift_table,
    )
    weights = [getattr(self, name).weight for name in NORMS]
    if not (
        keeps_dtype(x, temb, temb_ca_scale_shift, temb_ca_gate, self.scale_shift_table, tables[0], *weights)
        and keeps_dtype(
            audio, temb_audio, temb_ca_audio_scale_shift, temb_ca_audio_gate,
            self.audio_scale_shift_table, tables[1], *weights,
        )
        and use_a2v_cross_attention
        and use_v2a_cross_attention
    ):  # fmt: skip
        return NotImplemented
    m = Modulation.of(self.scale_shift_table, temb)
    audio_m = Modulation.of(self.audio_scale_shift_table, temb_audio)
    cross = Modulation.of(tables[0][:4], temb_ca_scale_shift)
    audio_cross = Modulation.of(tables[1][:4], temb_ca_audio_scale_shift)
    cross_gate = Modulation.of(tables[0][4:], temb_ca_gate)
    audio_cross_gate = Modulation.of(tables[1][4:], temb_ca_audio_gate)

    # each stream's tokens to themselves
    perturbed = {}
    if self.perturbed_attn:
        perturbed = {"perturbation_mask": perturbation_mask, "all_perturbed": all_perturbed}
    branch = self.attn1(
        hidden_states=fused.adaln(self.norm1, x, **m.shift_scale(0, 1)),
        encoder_hidden_states=None,
        query_rotary_emb=video_rotary_emb,
        attention_mask=self_attention_mask,
        **perturbed,
    )
    audio_branch = self.audio_attn1(
        hidden_states=fused.adaln(self.audio_norm1, audio, **audio_m.shift_scale(0, 1)),
        encoder_hidden_states=None,
        query_rotary_emb=audio_rotary_emb,
        attention_mask=audio_self_attention_mask,
        **perturbed,
    )

    # to the text, which is modulated too
    text, audio_text = encoder_hidden_states, audio_encoder_hidden_states
    text_m = m.shift_scale(6, 7) if self.video_cross_attn_adaln else {}
    audio_text_m = audio_m.shift_scale(6, 7) if self.audio_cross_attn_adaln else {}
    if self.cross_attn_adaln:
        text = _modulated(text, self.prompt_scale_shift_table, temb_prompt, x)
        audio_text = _modulated(
            audio_text, self.audio_prompt_scale_shift_table, temb_prompt_audio, audio
        )
    x, y = fused.gated_adaln(self.norm2, x, branch, **m.gate(2), **text_m)
    branch = self.attn2(
        y,
        encoder_hidden_states=text,
        query_rotary_emb=None,
        attention_mask=encoder_attention_mask,
    )
    audio, y = fused.gated_adaln(
        self.audio_norm2, audio, audio_branch, **audio_m.gate(2), **audio_text_m
    )
    audio_branch = self.audio_attn2(
        y,
        encoder_hidden_states=audio_text,
        query_rotary_emb=None,
        attention_mask=audio_encoder_attention_mask,
    )

    # to each other: one norm, modulated for queries and for keys and values
    gate = m.gate(8) if self.video_cross_attn_adaln else {"gate": None}
    audio_gate = audio_m.gate(8) if self.audio_cross_attn_adaln else {"gate": None}
    x, query, memory = fused.gated_adaln(self.audio_to_video_norm, x, branch, **gate, **_two(cross))
    audio, audio_memory, audio_query = fused.gated_adaln(
        self.video_to_audio_norm, audio, audio_branch, **audio_gate, **_two(audio_cross)
    )
    branch = self.audio_to_video_attn(
        query,
        encoder_hidden_states=audio_memory,
        query_rotary_emb=ca_video_rotary_emb,
        key_rotary_emb=ca_audio_rotary_emb,
        attention_mask=a2v_cross_attention_mask,
    )
    audio_branch = self.video_to_audio_attn(
        audio_query,
        encoder_hidden_states=memory,
        query_rotary_emb=ca_audio_rotary_emb,
        key_rotary_emb=ca_video_rotary_emb,
        attention_mask=v2a_cross_attention_mask,
    )

    x, y = fused.gated_adaln(self.norm3, x, branch, **cross_gate.gate(0), **m.shift_scale(3, 4))
    x = fused.gated_residual(x, self.ff(y), **m.gate(5))
    audio, y = fused.gated_adaln(
        self.audio_norm3,
        audio,
        audio_branch,
        **audio_cross_gate.gate(0),
        **audio_m.shift_scale(3, 4),
    )
    return x, fused.gated_residual(audio, self.audio_ff(y), **audio_m.gate(5))


def _two(modulation: Modulation) -> dict[str, Tensor]:
    """scale, shift for one output of the norm, then scale, shift for the other."""
    second = {"shift2": modulation.added(3), "scale2": modulation.added(2)}
    return {**modulation.shift_scale(1, 0), **second}


def _modulated(text: Tensor, table: Tensor, embedded: Tensor | None, like: Tensor) -> Tensor:
    """There is no norm here: it stays torch's."""
    if embedded is None:
        shift, scale = table[None, None].to(device=like.device, dtype=like.dtype).unbind(2)
    else:
        shift, scale = (Modulation.of(table, embedded).added(i) for i in range(2))
    return text * (1 + scale) + shift


def two_rows(attn: Any) -> Any:
    """Queries and keys may have angles of their own, so each has its call."""
    found: str | list[Row] = attention_rows(attn)
    return (
        found
        if isinstance(found, str)
        else [("norm_q", "qk_norm_rope"), ("norm_k", "qk_norm_rope")]
    )


@adapts(
    "LTX2AudioVideoAttnProcessor",
    "c7f66e53da99",
    kind="qk_norm_rope",
    rows=two_rows,
    covers=("norm_q", "norm_k"),
    helpers={
        "apply_interleaved_rotary_emb": ("1ba8a0ff4422",),
        "apply_split_rotary_emb": ("2d0505fe3cbc",),
    },
    processor=True,
)
def attention(
    fused: Fused,
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    query_rotary_emb: Any = None,
    key_rotary_emb: Any = None,
    **kwargs: Any,
) -> Any:
    context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
    if kwargs or not fits(hidden_states, self.norm_q.weight):
        return NotImplemented
    if self.rope_type not in ("interleaved", "split"):
        return NotImplemented
    attention_mask = mask_of_heads(self, attention_mask, context)
    gates = None if self.to_gate_logits is None else self.to_gate_logits(hidden_states)
    q, k, v = (
        projection(x).unflatten(2, (self.heads, -1))
        for projection, x in (
            (self.to_q, hidden_states), (self.to_k, context), (self.to_v, context)
        )
    )  # fmt: skip
    if query_rotary_emb is None:
        key_rotary_emb = None
    elif key_rotary_emb is None:
        key_rotary_emb = query_rotary_emb
    layout = "half" if self.rope_type == "split" else "interleaved"
    q, k = (
        fused.qk(
            x, None, norm, None, _angles(angles, self.heads, layout), over="hidden", layout=layout
        )[0]
        for x, norm, angles in ((q, self.norm_q, query_rotary_emb), (k, self.norm_k, key_rotary_emb))
    )  # fmt: skip
    out = attend(self.processor, q, k, v, attention_mask).to(q.dtype)
    if gates is not None:
        out = out * (2.0 * gates.sigmoid()).unsqueeze(-1)
    return self.to_out[1](self.to_out[0](out.flatten(2, 3)))


def _angles(angles: Any, heads: int, layout: str) -> Any:
    """cos and sin [B, N, H, D/2] of [B, N, C], each twice; or of [B, H, N, D/2]."""
    if angles is None:
        return None
    if layout == "half":
        return tuple(t.transpose(1, 2) for t in angles)
    return tuple(t[..., 0::2].unflatten(2, (heads, -1)) for t in angles)
