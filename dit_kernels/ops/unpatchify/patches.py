"""Where the values of a patch lie: among a token's, and in the video."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from torch import Tensor


def empty_video(
    tokens: Tensor, grid: Sequence[int], patch_size: Sequence[int], channels: int
) -> Tensor:
    (gt, gh, gw), (pt, ph, pw) = grid, patch_size
    return tokens.new_empty((tokens.shape[0], channels, gt * pt, gh * ph, gw * pw))


@functools.lru_cache(4096)
def steps(layout: str, pt: int, ph: int, pw: int, channels: int) -> tuple[int, ...]:
    """From one t, h, w and c to the next among the values of a patch."""
    sizes = {"t": pt, "h": ph, "w": pw, "c": channels}
    found, step = {}, 1
    for axis in reversed(layout.split()):
        found[axis] = step
        step *= sizes[axis]
    return tuple(found[axis] for axis in "thwc")
