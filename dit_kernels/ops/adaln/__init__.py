"""Adaptive layer norm: norm + modulation, gate + residual, and both in one pass."""

from __future__ import annotations

from torch import Tensor

from dit_kernels.ops.adaln import lists, reference
from dit_kernels.ops.arguments import (
    check_choice,
    check_eps,
    check_float,
    check_given,
    check_int32,
    check_modulation,
    check_shape,
)
from dit_kernels.ops.registration import FusedOp


def adaln(
    x: Tensor,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    norm: str = "layer",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    shift_table: Tensor | None = None,
    scale_table: Tensor | None = None,
    shift2: Tensor | None = None,
    scale2: Tensor | None = None,
    row_index: Tensor | None = None,
    rounding: str = "once",
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalise each token and modulate it.

        y  = norm(x) * (1 + scale + scale_table) + shift + shift_table
        y2 = norm(x) * (1 + scale2) + shift2                 where shift2 or scale2 is given

    Args:
        x: [B, N, C], any strides; also [..., C] with the dimensions between first and last as tokens,
            and [N_total, C] for a packed batch with `row_index` (without it each row is a sample).
        shift, scale, shift2, scale2: the modulation, of any strides and any float dtype:
            [B, C] a row a sample; [B, G, C] with G | N: token n reads row n // (N / G), a row a frame;
            [B, N, C] a row a token; [R, C] with `row_index`.
        norm: "layer" (subtracts the mean) or "rms".
        weight, bias: [C], the norm's own affine parameters.
        eps: added to the variance (mean square) under the root.
        shift_table, scale_table: [C], added to every row of shift or scale (`scale_shift_table + temb`).
        row_index: int32 [B, N] or [N_total]: the row of [R, C] modulation that each token reads.
        rounding: "once" computes in float32 and rounds at the store. "eager" rounds x's dtype where
            `F.layer_norm(x) * (1 + scale) + shift` does: after the norm, 1 + scale, the product, the sum.
        backend: "auto", "reference", "triton" or "cuda"; None leaves it to `use_backend`.

    Returns:
        y in x's shape and dtype, or (y, y2).

    Raises:
        ValueError: a shape or a value that does not fit; TypeError: a dtype; RuntimeError: the backend
        asked for is not there.

    Source: adaLN of "Scalable Diffusion Models with Transformers" (Peebles & Xie 2023), section 3.2.
    Statistics are accumulated in float32, in float64 for float64 input.
    """
    check_given("adaln", x=x)
    check_choice("adaln", "norm", norm, ("layer", "rms"))
    out = _call(
        "adaln", None, x, None, shift, scale,
        norm=norm, weight=weight, bias=bias, eps=eps, shift_table=shift_table, scale_table=scale_table,
        shift2=shift2, scale2=scale2, row_index=row_index, rounding=rounding, backend=backend,
    )  # fmt: skip
    return out[0] if len(out) == 1 else (out[0], out[1])


def gated_residual(
    residual: Tensor,
    branch: Tensor,
    gate: Tensor | None = None,
    *,
    gate_table: Tensor | None = None,
    gate_act: str = "none",
    branch_norm: str | None = None,
    branch_weight: Tensor | None = None,
    eps: float = 1e-6,
    row_index: Tensor | None = None,
    rounding: str = "once",
    backend: str | None = None,
) -> Tensor:
    """Add a gated branch to the residual stream.

        residual_out = residual + act(gate + gate_table) * branch_norm(branch)

    Args:
        residual, branch: [B, N, C] (or as `adaln`'s x), any strides; the dtypes may differ.
        gate: modulation in any of `adaln`'s four forms; None adds the branch as it is.
        gate_table: [C], added to every row of the gate.
        gate_act: "none" or "tanh".
        branch_norm: None or "rms": the sandwich norm of Mochi and Lumina2.
        branch_weight: [C], that norm's weight.
        eps: that norm's epsilon.
        row_index, backend: as in `adaln`.
        rounding: "once" rounds at the store; "eager" after the branch norm, after act(gate), after
            their product and after the sum.

    Returns:
        residual_out in residual's shape and dtype.

    Raises:
        ValueError, TypeError, RuntimeError: as `adaln`.

    Source: the gated branch of adaLN-Zero, Peebles & Xie 2023, figure 3. Accumulated in float32.
    """
    check_given("gated_residual", residual=residual, branch=branch)
    return _call(
        "gated_residual", residual, branch, gate, None, None,
        gate_table=gate_table, gate_act=gate_act, branch_norm=branch_norm, branch_weight=branch_weight,
        eps=eps, row_index=row_index, rounding=rounding, backend=backend,
    )[0]  # fmt: skip


def gated_adaln(
    residual: Tensor,
    branch: Tensor,
    gate: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    gate_table: Tensor | None = None,
    gate_act: str = "none",
    branch_norm: str | None = None,
    branch_weight: Tensor | None = None,
    norm: str = "layer",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    shift_table: Tensor | None = None,
    scale_table: Tensor | None = None,
    shift2: Tensor | None = None,
    scale2: Tensor | None = None,
    row_index: Tensor | None = None,
    rounding: str = "once",
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """`gated_residual` and the next sublayer's `adaln` in one pass over the tokens.

        residual_out = residual + act(gate + gate_table) * branch_norm(branch)
        y            = norm(residual_out) * (1 + scale + scale_table) + shift + shift_table

    y is computed from residual_out as it is stored, so the result is that of the two ops in a row.

    Args:
        residual, branch, gate, gate_table, gate_act, branch_norm, branch_weight: as `gated_residual`.
        shift, scale, norm, weight, bias, shift_table, scale_table, shift2, scale2: as `adaln`.
        eps: of both norms.
        row_index: one index for gate, shift and scale.
        rounding, backend: as in both.

    Returns:
        (residual_out, y), or (residual_out, y, y2) with shift2 or scale2, in residual's shape and dtype.

    Raises:
        ValueError, TypeError, RuntimeError: as `adaln`.

    Source: Peebles & Xie 2023, figure 3. Statistics are accumulated in float32.
    """
    check_given("gated_adaln", residual=residual, branch=branch)
    check_choice("gated_adaln", "norm", norm, ("layer", "rms"))
    return _call(
        "gated_adaln", residual, branch, gate, shift, scale,
        gate_table=gate_table, gate_act=gate_act, branch_norm=branch_norm, branch_weight=branch_weight,
        norm=norm, weight=weight, bias=bias, eps=eps, shift_table=shift_table, scale_table=scale_table,
        shift2=shift2, scale2=scale2, row_index=row_index, rounding=rounding, backend=backend,
    )  # fmt: skip


def _call(
    op: str,
    residual: Tensor | None,
    x: Tensor,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    *,
    eps: float,
    row_index: Tensor | None,
    rounding: str,
    backend: str | None,
    gate_table: Tensor | None = None,
    gate_act: str = "none",
    branch_norm: str | None = None,
    branch_weight: Tensor | None = None,
    norm: str = "none",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    shift_table: Tensor | None = None,
    scale_table: Tensor | None = None,
    shift2: Tensor | None = None,
    scale2: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The three public functions are one kernel family, hence one registered op."""
    check_choice(op, "rounding", rounding, ("once", "eager"))
    check_choice(op, "gate_act", gate_act, ("none", "tanh"))
    check_choice(op, "branch_norm", branch_norm, (None, "rms"))
    check_eps(op, eps)
    check_float(
        op, **{"residual": residual, "x" if residual is None else "branch": x}, gate=gate, shift=shift,
        scale=scale, gate_table=gate_table, branch_weight=branch_weight, weight=weight, bias=bias,
        shift_table=shift_table, scale_table=scale_table, shift2=shift2, scale2=scale2,
    )  # fmt: skip
    if branch_weight is not None and branch_norm is None:
        raise ValueError(f"{op}: branch_weight needs branch_norm='rms'; got branch_norm=None")
    if x.dim() < 2:
        raise ValueError(f"{op}: x must be [B, N, C] or [N, C]; got {list(x.shape)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(
            f"{op}: residual and branch must have one shape;"
            f" got {list(residual.shape)} and {list(x.shape)}"
        )
    shape = x.shape
    if x.dim() != 3:
        x = _as_tokens(x, packed=row_index is not None)
        residual = None if residual is None else _as_tokens(residual, packed=row_index is not None)
    samples, tokens, channels = x.shape
    for name, parameter in (
        ("weight", weight), ("bias", bias), ("branch_weight", branch_weight),
        ("gate_table", gate_table), ("shift_table", shift_table), ("scale_table", scale_table),
    ):  # fmt: skip
        check_shape(op, name, parameter, (channels,), "[C]")
    if row_index is not None:
        check_int32(op, "row_index", row_index, x)
        if tuple(row_index.shape) not in ((samples, tokens), (samples * tokens,)):
            raise ValueError(
                f"{op}: row_index must be [B, N] or [N_total];"
                f" got {list(row_index.shape)} for x {list(shape)}"
            )
        row_index = row_index.view(samples, tokens)
        given = (gate, shift, scale, shift2, scale2)
        rows = [len(m) for m in given if m is not None and m.dim()]
        if rows:
            samples = min(rows)
        else:  # tables alone: nothing is indexed
            row_index = None
    gate, gate_table = _table_alone(gate, gate_table, samples)
    shift, shift_table = _table_alone(shift, shift_table, samples)
    scale, scale_table = _table_alone(scale, scale_table, samples)
    for name, modulation in (
        ("gate", gate), ("shift", shift), ("scale", scale), ("shift2", shift2), ("scale2", scale2),
    ):  # fmt: skip
        if modulation is not None:
            check_modulation(op, name, modulation, x.shape, row_index, shape)

    two = shift2 is not None or scale2 is not None
    outputs = (residual is not None) + (norm != "none") + two
    out = _op(
        (residual, x, gate, gate_table, branch_weight, shift, scale, shift_table, scale_table,
         shift2, scale2, weight, bias, row_index),
        (norm, gate_act, branch_norm or "none", eps, rounding),
        backend,
        outputs=outputs,
        save=(0,) if residual is not None and norm != "none" else (),
    )  # fmt: skip
    if len(shape) == 3:
        return tuple(out)
    return tuple(y.view(shape) for y in out)


def _as_tokens(x: Tensor, packed: bool) -> Tensor:
    if x.dim() == 2:
        return x[None] if packed else x[:, None]
    return x.flatten(1, -2)


def _table_alone(
    modulation: Tensor | None, table: Tensor | None, rows: int
) -> tuple[Tensor | None, Tensor | None]:
    """A table with nothing to be added to is itself the row that every token reads.

    `rows` is B, or the rows that row_index may name.
    """
    if modulation is not None or table is None:
        return modulation, table
    return table.expand(rows, -1), None


def _fake(residual: Tensor | None, x: Tensor, *args: object) -> list[Tensor]:
    *_, shift2, scale2, _, _, _, norm, _, branch_norm, _, _, stats = args
    two = shift2 is not None or scale2 is not None
    made = lists.made(residual, x, two, str(norm), str(branch_norm), bool(stats))
    return [t for t in made if t is not None]


_op = FusedOp(
    "adaln",
    "Tensor? residual, Tensor x, Tensor? gate, Tensor? gate_table, Tensor? branch_weight, Tensor? shift,"
    " Tensor? scale, Tensor? shift_table, Tensor? scale_table, Tensor? shift2, Tensor? scale2,"
    " Tensor? weight, Tensor? bias, Tensor? row_index",
    "str norm, str gate_act, str branch_norm, float eps, str rounding",
    reference,
    _fake,
)
