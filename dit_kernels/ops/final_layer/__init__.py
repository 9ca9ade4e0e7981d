"""The DiT's last layer in one op: adaLN, projection, and tokens written straight to the video."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dit_kernels.ops import row_statistics
from dit_kernels.ops.arguments import (
    check_choice,
    check_eps,
    check_float,
    check_given,
    check_modulation,
    check_shape,
)
from dit_kernels.ops.final_layer import reference
from dit_kernels.ops.registration import FusedOp
from dit_kernels.ops.unpatchify import check_patches
from dit_kernels.ops.unpatchify.patches import empty_video

NAME = "final_layer"


def final_layer(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    grid: Sequence[int],
    patch_size: Sequence[int],
    channels: int,
    *,
    layout: str = "t h w c",
    norm: str = "layer",
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """Normalise, modulate, project and unpatchify.

        video = unpatchify(linear(norm(x) * (1 + scale) + shift))

    Args:
        x: [B, N, C], N = Gt * Gh * Gw, any strides.
        shift, scale: [B, C], [B, G, C] with G | N, or [B, N, C], or None.
        weight, bias: of the Linear, [pt * ph * pw * channels, C] and its rows.
        grid, patch_size, channels, layout: as `unpatchify`.
        norm: "layer" or "rms", without affine parameters.
        eps: of the norm.
        backend: "auto", "reference", "triton" or "cuda"; None leaves it to `use_backend`.

    Returns:
        video [B, channels, Gt * pt, Gh * ph, Gw * pw] in x's dtype.

    Raises:
        ValueError: a shape or a value that does not fit; TypeError: a dtype; RuntimeError: the backend
        asked for is not there.

    Source: Peebles & Xie 2023, section 3.2, "Transformer decoder". Computed in float32, rounded once.
    """
    check_given(NAME, x=x, weight=weight)
    check_choice(NAME, "norm", norm, ("layer", "rms"))
    check_eps(NAME, eps)
    check_float(NAME, x=x, shift=shift, scale=scale, weight=weight, bias=bias)
    grid, patch = check_patches(NAME, x, grid, patch_size, channels, layout)
    rows = patch[0] * patch[1] * patch[2] * channels
    check_shape(NAME, "weight", weight, (rows, x.shape[2]), "[pt * ph * pw * channels, C]")
    check_shape(NAME, "bias", bias, (rows,), "[pt * ph * pw * channels]")
    for name, modulation in (("shift", shift), ("scale", scale)):
        if modulation is not None:
            check_modulation(NAME, name, modulation, x.shape)
    return _op(
        (x, shift, scale, weight, bias), (grid, patch, channels, layout, norm, eps), backend
    )[0]


def _fake(
    x: Tensor, shift: object, scale: object, weight: object, bias: object, grid: Sequence[int],
    patch: Sequence[int], channels: int, layout: str, norm: str, eps: float, stats: bool,
) -> list[Tensor]:  # fmt: skip
    saved = row_statistics.empty(x, 2, norm) if stats else []
    return [empty_video(x, grid, patch, channels), *saved]


_op = FusedOp(
    NAME,
    "Tensor x, Tensor? shift, Tensor? scale, Tensor weight, Tensor? bias",
    "SymInt[] grid, int[] patch_size, int channels, str layout, str norm, float eps",
    reference,
    _fake,
)
