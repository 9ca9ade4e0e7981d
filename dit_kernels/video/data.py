"""Where training clips come from: moving digits, or a folder of real videos."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from dit_kernels.video.digits import MovingDigits
from dit_kernels.video.memory import check_clips

DIGITS = "digits"


class Clips(Protocol):
    """An endless list of (clip, caption): the same for the same settings, seed and index."""

    @property
    def words(self) -> tuple[str, ...]:
        """Every word of the captions."""

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, list[str]]:
        """Clips [B, C, F, Y, X] float32 in [-1, 1], and their captions."""


@dataclasses.dataclass(frozen=True)
class ClipsConfig:
    """Which clips; they travel in the checkpoint, so that a resumed run sees the same ones."""

    data: str = DIGITS  # or a folder of videos, or a CSV
    most_digits: int = 1
    speeds: bool = False
    hold_out: bool = False  # no digit goes the one way that `digits.held_out` names for it
    wordings: bool = False  # captions in many wordings, a fifth of which are held out
    frame_step: int = 1  # of a real video every so many-th frame is taken


def open_clips(
    config: ClipsConfig, frames: int, size: int | tuple[int, int], channels: int, seed: int = 0
) -> Clips:
    """The clips of a training run.

    Raises:
        FileNotFoundError: no such folder or CSV.
        ValueError: sizes or settings that the clips can't have, a clip that can't fit in memory, or no
            video that can be read.
    """
    check_clips(1, frames, (size, size) if isinstance(size, int) else size, channels)
    if config.data == DIGITS:
        return MovingDigits(
            frames, size, seed, most_digits=config.most_digits, speeds=config.speeds,
            channels=channels, hold_out=config.hold_out, wordings=config.wordings,
        )  # fmt: skip
    from dit_kernels.video.real_clips import RealClips

    return RealClips(
        config.data, frames, size, seed=seed, channels=channels, frame_step=config.frame_step
    )
