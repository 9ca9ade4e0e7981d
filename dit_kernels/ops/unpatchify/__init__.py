"""Tokens back to video."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dit_kernels.ops.arguments import check_float, check_given, check_int, triple
from dit_kernels.ops.registration import FusedOp
from dit_kernels.ops.unpatchify import reference
from dit_kernels.ops.unpatchify.patches import empty_video

NAME = "unpatchify"


def unpatchify(
    tokens: Tensor,
    grid: Sequence[int],
    patch_size: Sequence[int],
    channels: int,
    *,
    layout: str = "t h w c",
    backend: str | None = None,
) -> Tensor:
    """Put each token's patch in its place: the inverse of cutting a video into patches.

        video[b, c, gt*pt + t, gh*ph + h, gw*pw + w] = tokens[b, (gt, gh, gw), (t, h, w, c)]

    Args:
        tokens: [B, N, pt * ph * pw * channels], N = Gt * Gh * Gw, any strides.
        grid: (Gt, Gh, Gw) in patches, w fastest.
        patch_size: (pt, ph, pw).
        channels: of the video.
        layout: order of the patch's axes in tokens' last dimension, the four letters t h w c with spaces:
            "t h w c" (DiT, Wan), "c t h w" (HunyuanVideo), "h w t c" (Cosmos).
        backend: "auto", "reference", "triton" or "cuda"; None leaves it to `use_backend`.

    Returns:
        video [B, channels, Gt * pt, Gh * ph, Gw * pw], contiguous, in tokens' dtype.

    Raises:
        ValueError: a shape or layout that does not fit; TypeError: a dtype; RuntimeError: the backend
        asked for is not there.

    Source: `unpatchify` of Peebles & Xie 2023, appendix A, with time.
    """
    check_given(NAME, tokens=tokens)
    check_float(NAME, tokens=tokens)
    grid, patch = check_patches(NAME, tokens, grid, patch_size, channels, layout)
    width = patch[0] * patch[1] * patch[2] * channels
    if tokens.shape[2] != width:
        raise ValueError(
            f"{NAME}: tokens must be [B, N, pt * ph * pw * channels = {width}]; got {list(tokens.shape)}"
        )
    return _op((tokens,), (grid, patch, channels, layout), backend)[0]


def check_patches(
    op: str,
    tokens: Tensor,
    grid: Sequence[int],
    patch_size: Sequence[int],
    channels: int,
    layout: str,
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """grid and patch_size as triples that fit tokens [B, N, ...] and a layout of the four axes."""
    grid = triple(op, "grid", grid, least=0)
    patch = triple(op, "patch_size", patch_size)
    check_int(op, "channels", channels, least=1)
    if not isinstance(layout, str):
        raise TypeError(f"{op}: layout must be a string such as 't h w c'; got {layout!r}")
    if sorted(layout.split()) != ["c", "h", "t", "w"]:
        raise ValueError(f"{op}: layout must hold t, h, w and c once each; got {layout!r}")
    if tokens.dim() != 3 or tokens.shape[1] != grid[0] * grid[1] * grid[2]:
        raise ValueError(
            f"{op}: tokens must be [B, N, ...] with N = {grid[0] * grid[1] * grid[2]} for grid {grid};"
            f" got {list(tokens.shape)}"
        )
    return grid, patch


def _fake(
    tokens: Tensor,
    grid: Sequence[int],
    patch: Sequence[int],
    channels: int,
    layout: str,
    stats: bool,
) -> list[Tensor]:
    return [empty_video(tokens, grid, patch, channels)]


_op = FusedOp(
    NAME,
    "Tensor tokens",
    "SymInt[] grid, int[] patch_size, int channels, str layout",
    reference,
    _fake,
)
