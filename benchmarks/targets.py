"""What a kernel is to reach: a share of the ceiling measured in its run, and a lead over the others.

A target holds where it is larger than the noise of a launch: from 64 MB moved for what memory bounds, and at the
lengths named for attention. Shares of the matrix product's rate come from figures at 790 TFLOP/s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.bench import binding
from benchmarks.record import Row
from benchmarks.runs import OURS
from benchmarks.shapes import SHAPES, Shape

MEGA = 10**6
BEST = "the best other"
When = Callable[[Row, Shape], bool]


# what a target is for, in the words of the table
WHEN: dict[str, When] = {
    "from 64 MB": lambda row, shape: row["bytes"] >= 64 * MEGA,
    "from 256 MB": lambda row, shape: row["bytes"] >= 256 * MEGA,
    "head dim 128, from 8192 tokens": lambda row, shape: (
        shape.head_dim == 128 and shape.tokens >= 8192
    ),
    "head dim 72, 1024 tokens": lambda row, shape: (shape.head_dim, shape.tokens) == (72, 1024),
    "head dim 72, 256 tokens": lambda row, shape: (shape.head_dim, shape.tokens) == (72, 256),
}


@dataclass(frozen=True)
class Target:
    """Percent of the ceiling, and how many times as long others take (by name, or `BEST`); `when` is a key of WHEN."""

    cases: tuple[str, ...]
    direction: str
    when: str
    ceiling: float
    lead: dict[str, float] = field(default_factory=lambda: {BEST: 1.0})


NORMS = ("adaln", "adaln-rms", "gated_residual")
GATED = ("gated_adaln", "gated_adaln-frames", "gated_adaln-packed")
LONG = "head dim 128, from 8192 tokens"
# the first that applies to a row
TARGETS = (
    Target(NORMS, "forward", "from 256 MB", 95),
    Target(NORMS, "forward", "from 64 MB", 90),
    Target(NORMS, "backward", "from 64 MB", 90, {BEST: 1.0, "compile": 1.8}),
    Target(GATED, "forward", "from 256 MB", 95, {BEST: 1.0, "compile": 1.1}),
    Target(GATED, "forward", "from 64 MB", 90, {BEST: 1.0, "compile": 1.1}),
    Target(GATED, "backward", "from 64 MB", 90, {BEST: 1.0, "compile": 1.8}),
    Target(("qk_norm_rope",), "forward", "from 64 MB", 92, {BEST: 1.0, "compile": 1.2}),
    Target(("qk_norm_rope",), "backward", "from 64 MB", 88, {BEST: 1.0, "compile": 1.2}),
    Target(("attention",), "forward", LONG, round(100 * 690 / 790)),
    Target(("attention",), "backward", LONG, round(100 * 570 / 790), {BEST: 0.97}),
    Target(
        ("attention",), "forward", "head dim 72, 1024 tokens", round(100 * 400 / 790), {BEST: 1.2}
    ),
    Target(("attention",), "forward", "head dim 72, 256 tokens", 75, {BEST: 1.5}),
    Target(
        ("attention-window",), "forward", LONG, round(100 * 640 / 790), {BEST: 1.0, "flex": 1.3}
    ),
    Target(
        ("attention-window",), "backward", LONG, round(100 * 520 / 790), {BEST: 1.0, "flex": 1.3}
    ),
    Target(("patch_embed",), "forward", "from 64 MB", 85, {BEST: 1.0, "conv": 10, "eager": 1.5}),
    Target(("unpatchify",), "forward", "from 64 MB", 80),
)


def target(row: Row) -> Target | None:
    """Of a row at a named shape; sweeps have none."""
    shape = SHAPES.get(row["shape"])
    if shape is None:
        return None
    return next(
        (
            t
            for t in TARGETS
            if row["case"] in t.cases
            and row["direction"] == t.direction
            and WHEN[t.when](row, shape)
        ),
        None,
    )


def missed(cells: dict[str, Row], ours: Row, ceilings: dict[str, float]) -> list[str]:
    """What the faster of our kernels misses of its target, in words; [] where it reaches all or has none."""
    wanted = target(ours)
    if wanted is None:
        return []
    found = []
    _, percent = binding(ours, ceilings)
    if round(percent, 1) < wanted.ceiling:  # as they are shown
        found.append(f"{percent:.1f}% of the ceiling, not {wanted.ceiling:.0f}%")
    for name, lead in wanted.lead.items():
        others = [
            row
            for n, row in cells.items()
            if row["accurate"] and (n == name or (name == BEST and n not in OURS))
        ]
        if not others:
            continue
        ratio = min(row["ms"] for row in others) / ours["ms"]
        if round(ratio, 2) < lead:
            found.append(f"{ratio:.2f}x against {name}, not {lead:.2f}x")
    return found
