"""Norm and 3D rotary embedding of queries and keys, and the tables of angles."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dit_kernels.ops.arguments import (
    check_choice,
    check_eps,
    check_float,
    check_given,
    check_int,
    check_shape,
    triple,
)
from dit_kernels.ops.qk_norm_rope import lists, reference
from dit_kernels.ops.registration import FusedOp

NAME = "qk_norm_rope"


def qk_norm_rope(
    q: Tensor,
    k: Tensor | None = None,
    *,
    norm: str | None = "rms",
    over: str = "head",
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    eps: float = 1e-6,
    act: str | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    layout: str = "interleaved",
    sections: int = 1,
    rope_start: int = 0,
    rope_len: int | None = None,
    rounding: str = "once",
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Norm, activation and rotary embedding of q and k in one pass.

        n = act(norm(q) * q_weight + q_bias);   (a, b) -> (a cos - b sin, a sin + b cos)

    Args:
        q: [B, N, H, D], any strides: a view into a packed QKV projection is read in place.
        k: the same, or with other heads (GQA), or without cos of another length (cross-attention); or None.
        norm: "rms", "layer" or None.
        over: "head" normalises each head's D channels, weights [D]; "hidden" all H * D, weights [H * D].
        q_weight, k_weight, q_bias, k_bias: the norms' affine parameters.
        eps: added to the variance (mean square) under the root.
        act: None or "relu", between norm and rotation.
        cos, sin: [L, R] or [1|B, L, 1|H, R], R <= D / 2: row i turns token rope_start + i. The first 2R
            channels rotate (with `sections`, the first 2R / sections of each part); the rest pass.
        layout: "interleaved" turns channels (2i, 2i + 1), "half" (i, i + R), within each section.
        sections: number of equal parts of D, each with its own share of the angles.
        rope_start, rope_len: the tokens that rotate; rope_len is N - rope_start by default.
        rounding: "once" computes in float32 and rounds at the store; "eager" rounds after the norm,
            after the activation and after the rotation, which is itself in float32.
        backend: "auto", "reference", "triton" or "cuda"; None leaves it to `use_backend`.

    Returns:
        (q, k), contiguous, each in its own dtype; k is None where none was given.

    Raises:
        ValueError: a shape or a value that does not fit; TypeError: a dtype; RuntimeError: the backend
        asked for is not there.

    Source: RoFormer (Su et al. 2021), equation 34; QK-norm of Dehghani et al. 2023. Statistics are
    accumulated in float32, in float64 for float64 input.
    """
    check_given(NAME, q=q)
    check_choice(NAME, "norm", norm, (None, "rms", "layer"))
    check_choice(NAME, "over", over, ("head", "hidden"))
    check_choice(NAME, "act", act, (None, "relu"))
    check_choice(NAME, "layout", layout, ("interleaved", "half"))
    check_choice(NAME, "rounding", rounding, ("once", "eager"))
    check_eps(NAME, eps)
    check_float(
        NAME, q=q, k=k, q_weight=q_weight, k_weight=k_weight, q_bias=q_bias, k_bias=k_bias, cos=cos, sin=sin
    )  # fmt: skip
    for name, x in (("q", q), ("k", k)):
        if x is not None and x.dim() != 4:
            raise ValueError(f"{NAME}: {name} must be [B, N, H, D]; got {list(x.shape)}")
    if k is not None:
        same_length = cos is None or k.shape[1] == q.shape[1]
        if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3] or not same_length:
            raise ValueError(
                f"{NAME}: k must be [B, N, H', D] like q {list(q.shape)}, of another length only without cos;"
                f" got {list(k.shape)}"
            )
    elif k_weight is not None or k_bias is not None:
        raise ValueError(f"{NAME}: k_weight and k_bias need k; got k=None")
    for name, parameter, x in (
        ("q_weight", q_weight, q), ("q_bias", q_bias, q), ("k_weight", k_weight, k), ("k_bias", k_bias, k)
    ):  # fmt: skip
        if parameter is None or x is None:
            continue
        if norm is None:
            raise ValueError(f"{NAME}: {name} needs a norm; got norm=None")
        if over == "head":
            check_shape(NAME, name, parameter, (x.shape[3],), "[D]")
        else:
            check_shape(NAME, name, parameter, (x.shape[2] * x.shape[3],), "[H * D]")
    if (cos is None) != (sin is None):
        raise ValueError(f"{NAME}: cos and sin come together; got one of them")
    if cos is not None and sin is not None:
        _check_angles(q, k, cos, sin, sections, rope_start, rope_len)
    out = _op(
        (q, k, q_weight, k_weight, q_bias, k_bias, cos, sin),
        (norm or "none", over, eps, act or "none", layout, sections, rope_start, rounding),
        backend,
        outputs=1 if k is None else 2,
    )
    return out[0], None if k is None else out[1]


def rope_3d(
    grid: Sequence[int],
    dims: Sequence[int],
    theta: float = 10000.0,
    *,
    offset: Sequence[int] = (0, 0, 0),
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Angles of the 3D rotary embedding, a row a patch.

        angle(n, i) = (position of n on its axis + offset) * theta^(-2i / dims[axis]),  i < dims[axis] / 2

    Args:
        grid: (Gt, Gh, Gw) in patches; rows run with w fastest.
        dims: channels a head gives to each axis (t, h, w), even; (44, 42, 42) for a head dim of 128.
        theta: base of the frequencies.
        offset: added to the positions of each axis, in patches (negative for centred grids).
        device: of the tables.

    Returns:
        (cos, sin), float32 [Gt * Gh * Gw, sum(dims) / 2], the axes side by side in the order t, h, w.
        The angles are computed in float64.

    Raises:
        ValueError: not three axes, an odd or negative dim, a theta that is not positive.
        TypeError: no numbers.

    Source: RoFormer (Su et al. 2021), section 3.2.2, an axis at a time.
    """
    grid = triple("rope_3d", "grid", grid, least=0)
    dims = triple("rope_3d", "dims", dims, least=0)
    if any(d % 2 for d in dims):
        raise ValueError(f"rope_3d: dims must be even; got {tuple(dims)}")
    if len(offset) != 3:
        raise ValueError(f"rope_3d: offset must be 3 numbers (t, h, w); got {offset!r}")
    for name, number in (("theta", theta), *(("offset", o) for o in offset)):
        if not isinstance(number, (int, float)) and not hasattr(number, "__float__"):
            raise TypeError(f"rope_3d: {name} must be a number; got {number!r}")
    if not 0 < theta < math.inf:
        raise ValueError(f"rope_3d: theta must be a finite number above 0; got {theta}")
    angles = []
    for axis, (length, dim) in enumerate(zip(grid, dims, strict=True)):
        position = torch.arange(length, dtype=torch.float64, device=device) + offset[axis]
        frequency = theta ** (
            -torch.arange(0, dim, 2, dtype=torch.float64, device=device) / max(dim, 1)
        )
        shape = [1, 1, 1, dim // 2]
        shape[axis] = length
        angles.append(torch.outer(position, frequency).view(shape).expand(*grid, -1))
    angle = torch.cat(angles, dim=-1).flatten(0, 2)
    return angle.cos().float(), angle.sin().float()


def _check_angles(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    sections: int,
    rope_start: int,
    rope_len: int | None,
) -> None:
    samples, tokens, heads, dim = q.shape
    check_int(NAME, "sections", sections)
    check_int(NAME, "rope_start", rope_start)
    check_int(NAME, "rope_len", 0 if rope_len is None else rope_len)
    length = tokens - rope_start if rope_len is None else rope_len
    if length < 0 or rope_start + length > tokens:
        raise ValueError(
            f"{NAME}: rope_start and rope_len must lie within the {tokens} tokens;"
            f" got {rope_start} and {length}"
        )
    if sin.shape != cos.shape:
        raise ValueError(
            f"{NAME}: cos and sin must have one shape; got {list(cos.shape)} and {list(sin.shape)}"
        )
    fits = cos.dim() in (2, 4) and cos.shape[-1] <= dim // 2
    if cos.dim() == 2:
        fits = fits and cos.shape[0] == length
    elif cos.dim() == 4:
        fits = fits and (cos.shape[0] == 1 or cos.shape[0] == samples)
        fits = fits and cos.shape[1] == length and (cos.shape[2] == 1 or cos.shape[2] == heads)
        if k is not None and cos.shape[2] != 1 and k.shape[2] != cos.shape[2]:
            raise ValueError(
                f"{NAME}: cos of {cos.shape[2]} heads does not fit k of {k.shape[2]} heads"
            )
    if not fits:
        raise ValueError(
            f"{NAME}: cos must be [L, R] or [1|B, L, 1|H, R] with L = {length} and R <= D / 2 = {dim // 2};"
            f" got {list(cos.shape)} for q {list(q.shape)}"
        )
    if sections < 1 or dim % sections or cos.shape[-1] % sections:
        raise ValueError(
            f"{NAME}: sections must divide D and R; got {sections} for D = {dim}, R = {cos.shape[-1]}"
        )
    if 2 * (cos.shape[-1] // sections) > dim // sections:
        raise ValueError(
            f"{NAME}: 2R / sections must fit in D / sections; got R = {cos.shape[-1]}, D = {dim},"
            f" sections = {sections}"
        )


def _fake(q: Tensor, k: Tensor | None, *args: object) -> list[Tensor]:
    norm, over, *_, stats = args[6:]
    outputs = lists.empty_outputs(q, k)
    return outputs + lists.empty_statistics(q, k, str(norm), str(over)) if stats else outputs


_op = FusedOp(
    NAME,
    "Tensor q, Tensor? k, Tensor? q_weight, Tensor? k_weight, Tensor? q_bias, Tensor? k_bias, Tensor? cos,"
    " Tensor? sin",
    "str norm, str over, float eps, str act, str layout, int sections, SymInt rope_start, str rounding",
    reference,
    _fake,
)
