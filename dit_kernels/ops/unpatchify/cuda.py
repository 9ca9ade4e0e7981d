"""unpatchify by csrc/unpatchify.cu: a permutation, run forwards or backwards."""

from __future__ import annotations

import functools
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
    (gt, gh, gw), (pt, ph, pw) = grid, patch_size
    video = tokens.new_empty((tokens.shape[0], channels, gt * pt, gh * ph, gw * pw))
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
    steps, block = _arranged(layout, *patch_size, channels, *grid[1:], tokens.element_size())
    cuda_extension.kernels().unpatchify(
        *cuda_extension.where(tokens), read, written, inverse, grid, patch_size, channels, steps, block
    )  # fmt: skip


@functools.lru_cache(4096)
def _arranged(
    layout: str, pt: int, ph: int, pw: int, channels: int, gh: int, gw: int, size: int
) -> tuple[tuple[int, ...], tuple[int, int]]:
    """From one t, h, w and c to the next among a patch's values, and (rows, columns) of patches of a block."""
    length = {"t": pt, "h": ph, "w": pw, "c": channels}
    steps, step = {}, 1
    for axis in reversed(layout.split()):
        steps[axis] = step
        step *= length[axis]
    block_w = max(1, min(gw, _TILE // step))
    block_h = max(1, min(gh, _TILE // (step * block_w)))
    if block_w == gw:
        # rows that are no multiple of 16 bytes: as many together as are
        rows = 16 // math.gcd(16, ph * pw * block_w * size)
        if rows * block_w * step <= 4 * _TILE:
            block_h = rows * -(-block_h // rows)
    return tuple(steps[axis] for axis in "thwc"), (block_h, block_w)
