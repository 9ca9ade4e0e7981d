"""Shapes named after the models that have them.

tokens = Gt * Gh * Gw after the patch; text tokens come on top.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """One model at one size.

    Args:
        batch, grid, channels, heads, head_dim, text: of its tokens.
        rope: channels of a head for (t, h, w), or None.
        qk_norm: None or "head" or "hidden".
        patch, in_channels: of its input.
        window: (t, h, w) in patches of the windowed runs, or None.
    """

    batch: int
    grid: tuple[int, int, int]
    channels: int
    heads: int
    head_dim: int
    text: int = 0
    rope: tuple[int, int, int] | None = None
    qk_norm: str | None = None
    patch: tuple[int, int, int] = (1, 2, 2)
    in_channels: int = 16
    window: tuple[int, int, int] | None = None

    @property
    def patches(self) -> int:
        return math.prod(self.grid)

    @property
    def tokens(self) -> int:
        return self.patches + self.text

    def small(self) -> Shape:
        """The same form with few tokens: what the float64 oracle can check."""
        grid = tuple(min(n, most) for n, most in zip(self.grid, (3, 6, 7), strict=True))
        window = self.window and tuple(min(w, n) for w, n in zip(self.window, grid, strict=True))
        heads = min(self.heads, 2)
        return Shape(
            min(self.batch, 2), grid, self.channels, heads, self.head_dim, min(self.text, 5),
            self.rope, self.qk_norm, self.patch, self.in_channels, window,
        )  # fmt: skip


_DIT = {"patch": (1, 2, 2), "in_channels": 4}

SHAPES: dict[str, Shape] = {
    "dit-s-256": Shape(256, (1, 16, 16), 384, 6, 64, **_DIT),
    "dit-b-256": Shape(256, (1, 16, 16), 768, 12, 64, **_DIT),
    "dit-l-256": Shape(256, (1, 16, 16), 1024, 16, 64, **_DIT),
    "dit-xl-256": Shape(256, (1, 16, 16), 1152, 16, 72, **_DIT),
    "dit-xl-1024": Shape(32, (1, 32, 32), 1152, 16, 72, **_DIT),
    "wan-1.3b-480p": Shape(
        1, (21, 30, 52), 1536, 12, 128, rope=(44, 42, 42), qk_norm="hidden", window=(6, 8, 8)
    ),
    "wan-14b-720p": Shape(1, (21, 45, 80), 5120, 40, 128, rope=(44, 42, 42), qk_norm="hidden"),
    "hunyuan-video": Shape(
        1, (33, 45, 80), 3072, 24, 128, text=256, rope=(16, 56, 56), qk_norm="head"
    ),
    "cogvideox-5b": Shape(1, (13, 30, 45), 3072, 48, 64, text=226, rope=(16, 24, 24), qk_norm="head"),
    "ltx-video": Shape(
        1, (21, 16, 24), 2048, 32, 64, rope=(22, 22, 20), qk_norm="hidden", patch=(1, 1, 1),
        in_channels=128,
    ),
    "flux-1024": Shape(1, (1, 64, 64), 3072, 24, 128, text=512, rope=(16, 56, 56), qk_norm="head"),
    "mochi": Shape(1, (28, 30, 53), 3072, 24, 128, text=256, qk_norm="head", in_channels=12),
    # what fits a CPU in seconds
    "tiny-image": Shape(2, (1, 8, 8), 192, 4, 48, **_DIT),
    "tiny-video": Shape(
        1, (4, 8, 8), 256, 4, 64, rope=(24, 20, 20), qk_norm="head", window=(3, 5, 5)
    ),
}  # fmt: skip

QUICK = ("dit-xl-256", "dit-xl-1024", "wan-1.3b-480p", "flux-1024")
CPU = ("tiny-image", "tiny-video")
