"""unpatchify by csrc/unpatchify.cu: a permutation, run forwards or backwards."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

from torch import Tensor

from dit_kernels.ops import cuda_extension
from dit_kernels.ops.unpatchify.patches import empty_video, steps

_TILE = 4096  # values of a block
_MOST = 16384  # values of a patch: what fits shared memory


def supports(
    tokens: Tensor, grid: Sequence[int], patch_size: Sequence[int], channels: int, layout: str
) -> str | None:
    values = patch_size[0] * patch_size[1] * patch_size[2] * channels
    if not 0 < values <= _MOST:
        return f"a patch has 1 to {_MOST} values; got {tuple(patch_size)} of {channels} channels"
    return cuda_extension.unsupported(tokens)


def forward(
    tokens: Tensor,
    grid: Sequence[int],
    patch_size: Sequence[int],
    channels: int,
    layout: str,
    stats: bool,
) -> list[Tensor]:
    video = empty_video(tokens, grid, patch_size, channels)
    _move(tokens, video, grid, patch_size, channels, layout, False)
    return [video]


def backward(
    grads: list[Tensor | None],
    tokens: Tensor,
    saved: list[Tensor],
    grid: Sequence[int],
    patch_size: Sequence[int],
    channels: int,
    layout: str,
    needs: list[bool],
) -> list[Tensor]:
    if not needs[0]:
        return []
    dtokens = tokens.new_empty(tokens.shape)
    if grads[0] is None:
        return [dtokens.zero_()]
    _move(dtokens, grads[0], grid, patch_size, channels, layout, True)
    return [dtokens]


def _move(
    tokens: Tensor,
    video: Tensor,
    grid: Sequence[int],
    patch_size: Sequence[int],
    channels: int,
    layout: str,
    inverse: bool,
) -> None:
    if tokens.numel() == 0:
        return
    read, written = (video, tokens) if inverse else (tokens, video)
    axes, block = _arranged(layout, *patch_size, channels, *grid[1:], tokens.element_size())
    cuda_extension.kernels().unpatchify(
        *cuda_extension.where(tokens), read, written, inverse, grid, patch_size, channels, axes, block
    )  # fmt: skip


@functools.lru_cache(4096)
def _arranged(
    layout: str, pt: int, ph: int, pw: int, channels: int, gh: int, gw: int, size: int
) -> tuple[tuple[int, ...], tuple[int, int]]:
    """The steps of a patch's axes, and (rows, columns) of patches of a block."""
    values = pt * ph * pw * channels
    block_w = max(1, min(gw, _TILE // values))
    block_h = max(1, min(gh, _TILE // (values * block_w)))
    if block_w == gw:
        # rows that are no multiple of 16 bytes: as many together as are
        rows = 16 // math.gcd(16, ph * pw * block_w * size)
        if rows * block_w * values <= 4 * _TILE:
            block_h = rows * -(-block_h // rows)
    return steps(layout, pt, ph, pw, channels), (block_h, block_w)
