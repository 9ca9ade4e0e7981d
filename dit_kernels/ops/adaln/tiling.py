"""How the Triton kernels of adaLN cut a row: its parts and tiles."""

from __future__ import annotations

import functools
from typing import NamedTuple

from dit_kernels.ops import triton_rows

# channels of each tensor in a thread, at most: the more tensors and column sums, the fewer
HELD = {"norm": 40, "gated": 24, "backward": 24}


def split_row(channels: int, warps: int) -> tuple[int, ...]:
    """Powers of two that cover a row: equal parts, which are reduced as one, where each gives a thread 16 bytes."""
    equal = channels & -channels
    if equal >= 256 * warps and channels // equal <= 5:
        return (equal,) * (channels // equal)
    return triton_rows.split(channels, 16)


class Config(NamedTuple):
    """`resident`: warps that a multiprocessor holds at the registers this kernel takes (see the audit)."""

    parts: tuple[int, ...]
    num_warps: int
    num_stages: int
    resident: int


@functools.cache
def configure(channels: int, kernel: str, sums: int = 0) -> Config:
    """By the row's length and the form alone: a new number of tokens changes nothing.

    Few warps a row keep its reductions cheap; the multiprocessor is filled by the number of programs. From
    8192 channels on the backward's column sums do not all fit the register file.

    Args:
        sums: column sums of the backward, each a float32 register a channel.
    """
    held = HELD[kernel] if sums <= 3 else HELD[kernel] // 2
    warps = 1
    while channels > held * 32 * warps and warps < 16:
        warps *= 2
    return Config(split_row(channels, warps), warps, 2, 8 if kernel == "backward" else 14)
