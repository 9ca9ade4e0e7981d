"""Sana-Video's blocks. Its linear attention is left: it needs q and k both turned and not."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dit_kernels.integrations.fused import Fused, keeps_dtype
from dit_kernels.integrations.recognition import adapts
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
