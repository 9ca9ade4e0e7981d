"""DiT, PixArt, Latte: the models of diffusers' BasicTransformerBlock whose norms are modulated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dit_kernels.integrations.fused import Fused, keeps_dtype
from dit_kernels.integrations.recognition import Row, adapts
from dit_kernels.integrations.shared import norm_rows


def block_rows(block: Any) -> Sequence[Row] | str:
    if block.pos_embed is not None or block.only_cross_attention:
        return "it has positions of its own, or no self-attention"
    if block.norm_type == "ada_norm_zero" and block.attn2 is None:
        return norm_rows(("norm3", "gated_adaln"), ("ff", "gated_residual"))(block)
    if block.norm_type != "ada_norm_single":
        return f"norms of type {block.norm_type} are not modulated as the ops do it"
    rows = [("norm1", "adaln"), ("norm2", "gated_adaln"), ("ff", "gated_residual")]
    if block.attn2 is not None:
        rows.insert(1, ("attn1", "gated_residual"))
    return norm_rows(*rows)(block)


def covered(block: Any) -> Sequence[str]:
    # the first norm of ada_norm_zero is a layer that is replaced itself
    return ("norm3",) if block.norm_type == "ada_norm_zero" else ("norm1", "norm2")


@adapts("BasicTransformerBlock", "b70d124dbd9d", kind="adaln", rows=block_rows, covers=covered)
def block(
    fused: Fused,
    self: Any,
    hidden_states: Tensor,
    attention_mask: Any = None,
    encoder_hidden_states: Any = None,
    encoder_attention_mask: Any = None,
    timestep: Any = None,
    cross_attention_kwargs: Any = None,
    class_labels: Any = None,
    added_cond_kwargs: Any = None,
) -> Any:
    x = hidden_states
    if cross_attention_kwargs or self._chunk_size is not None or x.dim() != 3:
        return NotImplemented
    if self.norm_type == "ada_norm_zero":
        y, gate, shift_mlp, scale_mlp, gate_mlp = self.norm1(
            x, timestep, class_labels, hidden_dtype=x.dtype
        )
        if not keeps_dtype(x, gate):
            return NotImplemented
        branch = self.attn1(y, encoder_hidden_states=None, attention_mask=attention_mask)
        x, y = fused.gated_adaln(self.norm3, x, branch, gate, shift_mlp, scale_mlp)
        return fused.gated_residual(x, self.ff(y), gate_mlp)

    table = self.scale_shift_table  # [6, C]
    if not keeps_dtype(x, timestep, table, self.norm1.weight, self.norm2.weight):
        return NotImplemented
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = timestep.reshape(len(x), 6, -1).unbind(1)
    gate_table = table[2]
    y = fused.adaln(self.norm1, x, shift, scale, shift_table=table[0], scale_table=table[1])
    branch = self.attn1(y, encoder_hidden_states=None, attention_mask=attention_mask)
    if self.attn2 is not None:
        x = fused.gated_residual(x, branch, gate, gate_table=gate_table)
        branch = self.attn2(
            x, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask
        )
        gate = gate_table = None
    x, y = fused.gated_adaln(
        self.norm2, x, branch, gate, shift_mlp, scale_mlp,
        gate_table=gate_table, shift_table=table[3], scale_table=table[4],
    )  # fmt: skip
    return fused.gated_residual(x, self.ff(y), gate_mlp, gate_table=table[5])
