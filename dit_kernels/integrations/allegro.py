"""Allegro: three axes of rotary angles, a third of each head for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dit_kernels.integrations.fused import Fused, keeps_dtype
from dit_kernels.integrations.recognition import Row, adapts
from dit_kernels.integrations.shared import norm_rows


def block_rows(block: Any) -> Sequence[Row] | str:
    rows = [("norm1", "adaln"), ("norm2", "gated_adaln"), ("ff", "gated_residual")]
    if block.attn2 is not None:
        rows.insert(1, ("attn1", "gated_residual"))
    return norm_rows(*rows)(block)


@adapts(
    "AllegroTransformerBlock",
    "287038cc9076",
    kind="adaln",
    rows=block_rows,
    covers=("norm1", "norm2"),
)
def block(
    fused: Fused,
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Any = None,
    temb: Any = None,
    attention_mask: Any = None,
    encoder_attention_mask: Any = None,
    image_rotary_emb: Any = None,
) -> Any:
    x, table = hidden_states, self.scale_shift_table  # [6, C]
    norms = (self.norm1.weight, self.norm1.bias, self.norm2.weight, self.norm2.bias)
    if x.dim() != 3 or not keeps_dtype(x, temb, table, *norms):
        return NotImplemented
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = temb.reshape(len(x), 6, -1).unbind(1)
    gate_table = table[2]
    y = fused.adaln(self.norm1, x, shift, scale, shift_table=table[0], scale_table=table[1])
    branch = self.attn1(
        y,
        encoder_hidden_states=None,
        attention_mask=attention_mask,
        image_rotary_emb=image_rotary_emb,
    )
    if self.attn2 is not None:
        x = fused.gated_residual(x, branch, gate, gate_table=gate_table)
        branch = self.attn2(
            x,
            encoder_hidden_states=encoder_hidden_states,
            attention_mask=encoder_attention_mask,
            image_rotary_emb=None,
        )
        gate = gate_table = None
    x, y = fused.gated_adaln(
        self.norm2, x, branch, gate, shift_mlp, scale_mlp,
        gate_table=gate_table, shift_table=table[3], scale_table=table[4],
    )  # fmt: skip
    return fused.gated_residual(x, self.ff(y), gate_mlp, gate_table=table[5])
