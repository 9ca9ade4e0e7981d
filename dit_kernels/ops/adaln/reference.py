"""adaLN in plain torch: the formula that every backend is checked against.

    residual_out = residual + act(gate) * branch_norm(branch)
    y            = norm(residual_out) * (1 + scale) + shift

`rounding="once"` computes in float32 (float64 for float64 inputs) and rounds each output once.
`rounding="eager"` is the same formula as people write it in PyTorch, rounding wherever it rounds.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def supports(*args: Any) -> str | None:
    return None


def forward(
    residual: Tensor | None,  # [B, N, C]
    x: Tensor,  # [B, N, C]; the branch where there is a residual
    gate: Tensor
    | None,  # gate, shift, scale, shift2, scale2: [B, C], [B, G, C], [B, N, C] or [R, C]
    gate_table: Tensor | None,  # tables, weights and bias: [C]
    branch_weight: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    shift_table: Tensor | None,
    scale_table: Tensor | None,
    shift2: Tensor | None,
    scale2: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    row_index: Tensor | None,  # [B, N] int32
    norm: str,  # "layer" | "rms" | "none"
    gate_act: str,  # "none" | "tanh"
    branch_norm: str,  # "none" | "rms"
    eps: float,
    rounding: str,
    stats: bool,
) -> list[Tensor]:
    """[residual_out], [y], [y2], then with stats [branch_rstd], [mean], [rstd]: whichever exist."""
    dtype = x.dtype if residual is None else residual.dtype
    exact = torch.promote_types(dtype, torch.float32)
    once = rounding == "once"

    def rows(modulation: Tensor, table: Tensor | None) -> Tensor:
        """One row a token, [B, N, C], or [B, 1, C] to broadcast."""
        if once:
            modulation = modulation.to(exact)
        if table is not None:
            modulation = modulation + (table.to(exact) if once else table)
        if row_index is not None:
            return modulation[row_index.long()]
        if modulation.dim() == 2:
            return modulation[:, None]
        groups = modulation.shape[1]
        return modulation.repeat_interleave(x.shape[1] // groups, dim=1) if groups else modulation

    def modulate(
        n: Tensor,
        shift: Tensor | None,
        scale: Tensor | None,
        shift_table: Tensor | None = None,
        scale_table: Tensor | None = None,
    ) -> Tensor:
        if scale is not None:
            n = n * (1 + rows(scale, scale_table))
        if shift is not None:
            n = n + rows(shift, shift_table)
        return n.to(dtype)

    outputs: list[Tensor] = []
    statistics: list[Tensor] = []
    if residual is not None:
        branch = x.to(exact) if once else x
        if branch_norm == "rms":
            statistics.append(_rstd(x.to(exact), eps))
            branch = _norm(branch, "rms", branch_weight, None, eps)
        if gate is not None:
            g = rows(gate, gate_table)
            branch = (g.tanh() if gate_act == "tanh" else g) * branch
        x = ((residual.to(exact) if once else residual) + branch).to(dtype)
        outputs.append(x)
    if norm != "none":
        n = _norm(x.to(exact) if once else x, norm, weight, bias, eps)
        outputs.append(modulate(n, shift, scale, shift_table, scale_table))
        if shift2 is not None or scale2 is not None:
            outputs.append(modulate(n, shift2, scale2))
        if stats:
            x = x.to(exact)
            if norm == "layer":
                mean = x.mean(-1, keepdim=True)
                statistics.append(mean[..., 0])
                x = x - mean
            statistics.append(_rstd(x, eps))
    return outputs + statistics if stats else outputs


def eager(*args: Any) -> list[Tensor]:
    """The formula as people write it: what the accuracy rule compares with."""
    return forward(*args[:-1], rounding="eager", stats=False)  # type: ignore[misc]


def _norm(x: Tensor, kind: str, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """torch's own norm in x's dtype; parameters of another dtype are met in float32, as FP32LayerNorm does."""
    dtype, size = x.dtype, (x.shape[-1],)
    if any(p is not None and p.dtype != dtype for p in (weight, bias)):
        x = x.to(torch.promote_types(dtype, torch.float32))
        weight = None if weight is None else weight.to(x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
    if kind == "layer":
        return F.layer_norm(x, size, weight, bias, eps).to(dtype)
    normed = F.rms_norm(x, size, weight, eps)
    return (normed if bias is None else normed + bias).to(dtype)


def _rstd(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.square().mean(-1) + eps)


def cost(residual: Tensor | None, x: Tensor, *args: Any) -> dict[str, tuple[int, int]]:
    """(FLOPs, least bytes) of one call: each token tensor read or written once.

    Forward reads the inputs and writes the outputs. Backward reads the gradients and the row that was
    normalised, with a gate or a branch norm the branch too, and writes dresidual and dbranch (or dx).
    """
    gate, _, _, _, _, _, _, shift2, scale2, _, _, _, norm, _, branch_norm, *_ = args
    token = x.numel() * x.element_size()
    gated = residual is not None
    outputs = gated + (norm != "none") + (shift2 is not None or scale2 is not None)
    inputs = 1 + gated
    reads_branch = gate is not None or branch_norm != "none"
    per_token = sum(
        m.numel() * m.element_size()
        for m in args
        if isinstance(m, Tensor) and m.dim() == 3 and m.shape[:2] == x.shape[:2]
    )
    saved = (norm != "none") + (gated and reads_branch)
    forward = (inputs + outputs) * token + per_token
    backward = (outputs + saved + inputs) * token + 2 * per_token
    return {"forward": (0, forward), "backward": (0, backward)}


def example_inputs(
    dtype: torch.dtype, device: str = "cpu"
) -> dict[str, tuple[str, dict[str, Any]]]:
    """case -> (function, keyword arguments): every form of the op, small."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    def chunks(*shape: int, parts: int) -> tuple[Tensor, ...]:
        return randn(*shape[:-1], parts * shape[-1]).chunk(parts, dim=-1)

    def index(rows: int, *shape: int) -> Tensor:
        return torch.randint(rows, shape, generator=generator).to(device, torch.int32)

    shift, scale = chunks(2, 40, parts=2)
    gate3, shift3, scale3 = chunks(2, 3, 40, parts=3)
    gate1, shift1, scale1 = chunks(2, 48, parts=3)
    return {
        "sample-chunks": ("adaln", dict(x=randn(2, 12, 40), shift=shift, scale=scale)),
        "frame-table": ("adaln", dict(
            x=randn(2, 12, 40), shift=shift3, scale=scale3, shift_table=randn(40), scale_table=randn(40))),
        "token-rms": ("adaln", dict(
            x=randn(1, 7, 72), shift=randn(1, 7, 72), scale=randn(1, 7, 72), norm="rms", weight=randn(72))),
        "packed-rows": ("adaln", dict(
            x=randn(13, 33), shift=randn(4, 33), scale=randn(4, 33), row_index=index(4, 13))),
        "affine-only": ("adaln", dict(x=randn(2, 5, 64), weight=randn(64), bias=randn(64), eps=1e-5)),
        "two-outputs": ("adaln", dict(
            x=randn(2, 6, 40), shift=shift, scale=scale, shift2=randn(2, 40), scale2=randn(2, 40))),
        "gate": ("gated_residual", dict(residual=randn(2, 6, 40), branch=randn(2, 6, 40), gate=scale)),
        "sandwich": ("gated_residual", dict(
            residual=randn(2, 6, 48), branch=randn(2, 6, 48), gate=gate1, gate_act="tanh",
            branch_norm="rms", branch_weight=randn(48), eps=1e-5)),
        "block": ("gated_adaln", dict(
            residual=randn(2, 9, 48), branch=randn(2, 9, 48), gate=gate1, shift=shift1, scale=scale1)),
        "block-frame-tables": ("gated_adaln", dict(
            residual=randn(2, 12, 40), branch=randn(2, 12, 40), gate=gate3, shift=shift3, scale=scale3,
            gate_table=randn(40), shift_table=randn(40), scale_table=randn(40))),
        "block-rows-sandwich": ("gated_adaln", dict(
            residual=randn(2, 5, 40), branch=randn(2, 5, 40), gate=randn(3, 40), scale=randn(3, 40),
            gate_act="tanh", branch_norm="rms", branch_weight=randn(40), norm="rms", weight=randn(40),
            row_index=index(3, 2, 5))),
        "block-two-outputs": ("gated_adaln", dict(
            residual=randn(2, 4, 40), branch=randn(2, 4, 40), gate=scale, shift=shift, scale=scale,
            shift2=shift, scale2=scale)),
    }  # fmt: skip
