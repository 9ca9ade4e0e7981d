"""Shapes named after the models that have them, and the sweeps that vary one size at a time.

tokens = Gt * Gh * Gw after the patch; text tokens come on top.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Shape:
    """One model at one size.

    Args:
        batch, grid, channels, heads, head_dim, text: of its tokens.
        rope: channels of a head for (t, h, w), or None.
        qk_norm: None or "head" or "hidden".
        patch, in_channels: of its input.
        window: (t, h, w) in patches of the windowed runs, or None.
        lengths: of the sequences of a packed batch, which sum to the tokens; () for a batch of one length.
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
    lengths: tuple[int, ...] = ()

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
        lengths = tuple(min(length, 17 + 20 * i) for i, length in enumerate(self.lengths[:3]))
        if lengths:
            grid = (1, 1, sum(lengths))
        return replace(
            self, batch=min(self.batch, 2), grid=grid, heads=min(self.heads, 2), text=min(self.text, 5),
            window=window, lengths=lengths,
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
    "dit-s-1024": Shape(32, (1, 32, 32), 384, 6, 64, **_DIT),
    "dit-b-1024": Shape(32, (1, 32, 32), 768, 12, 64, **_DIT),
    "dit-l-1024": Shape(32, (1, 32, 32), 1024, 16, 64, **_DIT),
    "wan-1.3b-720p": Shape(
        1, (21, 45, 80), 1536, 12, 128, rope=(44, 42, 42), qk_norm="hidden", window=(6, 9, 10)
    ),
    "wan-14b-480p": Shape(1, (21, 30, 52), 5120, 40, 128, rope=(44, 42, 42), qk_norm="hidden"),
    # what fits a CPU in seconds
    "tiny-image": Shape(2, (1, 8, 8), 192, 4, 48, **_DIT),
    "tiny-video": Shape(
        1, (4, 8, 8), 256, 4, 64, rope=(24, 20, 20), qk_norm="head", window=(3, 5, 5)
    ),
}  # fmt: skip

QUICK = ("dit-xl-256", "dit-xl-1024", "wan-1.3b-480p", "flux-1024")
CPU = ("tiny-image", "tiny-video")
CPU_QUICK = CPU[1:]


@dataclass(frozen=True)
class Sweep:
    """One size varied; the cases that it is about, and what is on the x axis."""

    cases: tuple[str, ...]
    axis: str
    points: dict[float, Shape]


def _grid(tokens: int) -> tuple[int, int, int]:
    """A square frame where the tokens allow one, else a video of 16 x 16 frames."""
    side = math.isqrt(tokens)
    return (1, side, side) if side * side == tokens and side <= 64 else (tokens // 256, 16, 16)


def _window(share: int) -> tuple[int, int, int]:
    return 24 // share, 32 // share, 32 // share


# lengths of images and clips of several sizes, as a packed batch of training mixes them
_MIXES = {
    1: (16384,),
    2: (12288, 4096),
    8: (8192, 4096, 2048, 1024, 512, 256, 128, 128),
    32: (2048,) * 4 + (512,) * 12 + (128,) * 16,
    64: (256,) * 64,
}
_WAN = Shape(1, (21, 30, 52), 1536, 12, 128, rope=(44, 42, 42), qk_norm="hidden")

SWEEPS: dict[str, Sweep] = {
    "tokens": Sweep(
        ("adaln", "gated_adaln", "qk_norm_rope", "attention"),
        "tokens",
        {n: replace(_WAN, grid=_grid(n)) for n in (256 << i for i in range(10))},
    ),
    "channels": Sweep(
        ("adaln", "gated_adaln"),
        "channels",
        {
            c: Shape(1, (16, 32, 32), c, c // 64, 64)
            for c in (384, 768, 1024, 1152, 1536, 1920, 2048, 2432, 3072, 4096, 5120, 6144, 8192)
        },
    ),
    "window": Sweep(
        ("attention-window",),
        "share of the keys in the window",
        {
            1 / share**3: replace(_WAN, grid=(24, 32, 32), window=_window(share))
            for share in (8, 4, 2, 1)
        },
    ),
    "batch": Sweep(
        ("gated_adaln", "attention"),
        "batch",
        {b: replace(SHAPES["dit-xl-256"], batch=b) for b in (1, 4, 16, 64, 256, 512)},
    ),
    "packed": Sweep(
        ("gated_adaln-packed", "attention-packed"),
        "sequences in a packed batch",
        {n: replace(_WAN, grid=(1, 1, sum(mix)), lengths=mix) for n, mix in _MIXES.items()},
    ),
}


def swept(names: tuple[str, ...], most_tokens: int) -> Iterator[tuple[str, float, Shape]]:
    """(sweep, x, shape) of the points with at most so many tokens, text and batch included."""
    for name in names:
        for x, shape in SWEEPS[name].points.items():
            if shape.batch * shape.tokens <= most_tokens:
                yield name, x, shape
