"""unpatchify by csrc/unpatchify.cu: a permutation, run forwards or backwards."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from dit_kernels.ops import cuda_extension

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
    size = [g * p for g, p in zip(grid, patch_size, strict=True)]
    video = tokens.new_empty((tokens.shape[0], channels, *size))
    _move(tokens, video, tokens, video, grid, patch_size, channels, layout, False)
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
    _move(grads[0], dtokens, dtokens, grads[0], grid, patch_size, channels, layout, True)
    return [dtokens]


def _move(
    read: Tensor,
    written: Tensor,
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
    length = dict(zip("thwc", (*patch_size, channels), strict=True))
    steps, step = {}, 1
    for axis in reversed(layout.split()):
        steps[axis] = step
        step *= length[axis]
    block_w = max(1, min(grid[2], _TILE // step))
    block_h = max(1, min(grid[1], _TILE // (step * block_w)))
    if block_w == grid[2]:
        # rows that are no multiple of 16 bytes: as many together as are
        rows = 16 // math.gcd(16, patch_size[1] * patch_size[2] * block_w * tokens.element_size())
        if rows * block_w * step <= 4 * _TILE:
            block_h = rows * -(-block_h // rows)
    cuda_extension.kernels().unpatchify(
        *cuda_extension.where(tokens), read, written, inverse, tokens.element_size(),
        tokens.shape[0], list(grid), list(patch_size), channels, [steps[axis] for axis in "thwc"],
        list(tokens.stride()), list(video.stride()), [block_h, block_w],
    )  # fmt: skip
