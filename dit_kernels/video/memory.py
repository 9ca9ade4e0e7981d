"""Refuse what can't fit in a machine's memory, before time is spent on it and the system ends the process.

Every estimate is a lower bound, from sizes alone: what is refused could not have been made; what is
let through may still be too much.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

FLOAT = 4  # bytes
# the matrices of a block over hidden_size squared: modulation 6, attention 4, feed-forward 8
BLOCK_MATRICES = 18
# float32 copies of the weights in training: themselves, their average and gradients, two moments
COPIES = 5
# of a container
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def machine_memory(device: torch.device) -> int:
    """Bytes that a process on the device can have at most."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for limit in map(Path, LIMITS):
        if limit.is_file() and (text := limit.read_text().strip()).isdecimal():
            found.append(int(text))
    return min(found)


def check_fits(what: str, least: int, device: torch.device) -> None:
    """`what` takes at least so many bytes.

    Raises:
        ValueError: the machine has less.
    """
    memory = machine_memory(device)
    if least > memory:
        raise ValueError(
            f"{what} take at least {_gigabytes(least)} of memory;"
            f" {device.type if device.type == 'cuda' else 'this machine'} has {_gigabytes(memory)}"
        )


def check_clips(count: int, frames: int, size: Sequence[int], channels: int) -> None:
    """Clips as float32 on the CPU.

    Raises:
        ValueError: they can't fit.
    """
    numbers = math.prod((count, channels, frames, *size))
    check_fits(
        f"{numbers:,} pixels ({_clips(count, frames, size)})", FLOAT * numbers, torch.device("cpu")
    )


def check_weights(hidden_size: int, depth: int, copies: int = 1) -> None:
    """The matrices of a DiT's blocks.

    Raises:
        ValueError: they can't fit.
    """
    count = BLOCK_MATRICES * depth * hidden_size**2
    check_fits(
        f"{count:,} parameters ({depth} blocks of width {hidden_size})",
        copies * FLOAT * count,
        torch.device("cpu"),
    )


def check_generation(
    model: Any, count: int, frames: int, size: Sequence[int], *, guided: bool
) -> None:
    """Videos of a `TextToVideo`: in a block each token has its channels and twice the feed-forward's;
    then each pixel has three floats.

    Raises:
        ValueError: they can't fit.
    """
    latent_size = model.codec.latent_shape(frames, *size)[1:]
    tokens = count * math.prod(model.dit.grid(latent_size))
    dit = model.dit.config
    width = round((1 + 2 * dit["mlp_ratio"]) * dit["hidden_size"])
    least = max(
        FLOAT * width * tokens * (2 if guided else 1),
        FLOAT * 3 * count * math.prod((frames, *size)),
    )
    check_fits(f"{tokens:,} tokens ({_clips(count, frames, size)})", least, model.device)


def check_step(
    model: Any, count: int, parts: int, frames: int, size: Sequence[int], bytes_a_number: int
) -> None:
    """A step of training: its clips, and of the part that is computed at a time what each block keeps
    for backward: its input, and twice the feed-forward's width.

    Raises:
        ValueError: it can't fit.
    """
    latent_size = model.codec.latent_shape(frames, *size)[1:]
    tokens = count * math.prod(model.dit.grid(latent_size))
    dit = model.dit.config
    width = round((1 + 2 * dit["mlp_ratio"]) * dit["hidden_size"])
    kept = bytes_a_number * width * dit["depth"] * tokens // parts
    pixels = FLOAT * model.config.channels * count * math.prod((frames, *size))
    check_fits(
        f"{tokens:,} tokens a step ({_clips(count, frames, size)})",
        max(kept, pixels),
        model.device,
    )


def _clips(count: int, frames: int, size: Sequence[int]) -> str:
    clips = "a clip" if count == 1 else f"{count} clips"
    return f"{clips} of {frames} frame{'s'[: frames != 1]} of {size[0]} x {size[1]}"


def _gigabytes(count: int) -> str:
    return f"{count / 2**30:,.{0 if count > 10 << 30 else 1}f} GiB"
