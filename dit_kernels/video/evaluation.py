"""Does the video show what its caption asked for?

The judge shares nothing with the model: a support vector machine fitted on the real scans reads
the digit in the frames, and the direction is that of the measured shift of the ink. The same judge
on real clips of held-out handwriting says how far it can be trusted.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dit_kernels.video.checkpoints import atomic_path
from dit_kernels.video.codecs import Codec
from dit_kernels.video.digits import (
    DIGIT_SIZE,
    DIRECTIONS,
    SPEED,
    MovingDigit,
    MovingDigits,
    load_scans,
    parse_caption,
)
from dit_kernels.video.model import TextToVideo
from dit_kernels.video.sampling import EULER, generate

WINDOW = DIGIT_SIZE + 2  # the classifier's view: a digit and a pixel around it
TABLE = ("<!-- evaluation -->", "<!-- end of evaluation -->")  # the lines around it in a page
FAINT = 0.15  # ink below this is the background's noise


@dataclasses.dataclass
class Score:
    """How many of `total` videos showed the asked digit, and moved the asked way."""

    total: int = 0
    digits: int = 0
    directions: int = 0
    digits_by_digit: dict[int, list[int]] = dataclasses.field(default_factory=dict)

    def add(self, asked: MovingDigit, seen: MovingDigit) -> None:
        """Count one video; digits_by_digit[d] is [read right, asked for]."""
        right = asked.digit == seen.digit
        self.total += 1
        self.digits += right
        self.directions += asked.direction == seen.direction
        count = self.digits_by_digit.setdefault(asked.digit, [0, 0])
        count[0] += right
        count[1] += 1


def centre_of_ink(ink: np.ndarray) -> np.ndarray:
    """Centre of mass of a frame [Y, X] as (y, x), on a torus: a digit may cross an edge."""
    centre = []
    for axis, length in enumerate(ink.shape):
        weights = ink.sum(axis=1 - axis)
        turn = np.exp(2j * math.pi * np.arange(length) / length)
        centre.append(np.angle((weights * turn).sum()) * length / (2 * math.pi) % length)
    return np.array(centre)


def motion_of(ink: np.ndarray) -> np.ndarray:
    """Mean shift a frame, (dy, dx) in pixels, of frames [F, Y, X]."""
    size = np.array(ink.shape[1:])
    centres = np.stack([centre_of_ink(frame) for frame in ink])
    shifts = (np.diff(centres, axis=0) + size / 2) % size - size / 2  # the short way round
    return shifts.mean(axis=0)


def direction_of(motion: np.ndarray) -> str:
    """The direction nearest to a motion (dy, dx), or "still" below half a digit's speed."""
    if np.abs(motion).max() < SPEED / 2:
        return "still"
    return max(DIRECTIONS, key=lambda name: float(np.dot(DIRECTIONS[name], motion)))


def ink_of(video: torch.Tensor) -> np.ndarray:
    """Ink [F, Y, X] in [0, 1] of a video [1, F, Y, X] in [-1, 1], without faint background."""
    ink = ((video.float().mean(0) + 1) / 2).clamp(0, 1).cpu().numpy()
    return np.where(ink < FAINT, 0, ink)


def centred_window(ink: np.ndarray) -> np.ndarray:
    """The [WINDOW, WINDOW] part of a frame [Y, X] around its centre of ink."""
    frame = np.pad(ink, [(0, max(0, WINDOW - length)) for length in ink.shape])
    shift = np.array(frame.shape) // 2 - np.round(centre_of_ink(frame)).astype(int)
    top, left = (length // 2 - WINDOW // 2 for length in frame.shape)
    return np.roll(frame, shift, axis=(0, 1))[top : top + WINDOW, left : left + WINDOW]


class DigitReader:
    """Reads the digit of a clip: a support vector machine fitted on the training scans."""

    def __init__(self) -> None:
        from sklearn.svm import SVC

        scans, digits = load_scans("train")
        windows = [centred_window(np.pad(scan, DIGIT_SIZE)) for scan in scans]
        self.classifier = SVC(C=10, gamma="scale").fit(
            np.stack(windows).reshape(len(scans), -1), digits
        )

    def read(self, ink: np.ndarray) -> int:
        """The digit that the frames [F, Y, X] show, by the sum of their decisions."""
        windows = np.stack([centred_window(frame) for frame in ink]).reshape(len(ink), -1)
        votes = self.classifier.decision_function(windows).sum(axis=0)
        return int(self.classifier.classes_[votes.argmax()])


@functools.cache
def digit_reader() -> DigitReader:
    """The one reader; fitting it takes a second."""
    return DigitReader()


def watch(video: torch.Tensor) -> MovingDigit:
    """What a video [1, F, Y, X] in [-1, 1] shows; its direction may be "still"."""
    ink = ink_of(video)
    direction = direction_of(motion_of(ink)) if len(ink) > 1 else "still"
    return MovingDigit(digit_reader().read(ink), direction)


def spread_over(captions: Sequence[str], count: int) -> list[str]:
    """Count captions: round and round, or of fewer than there are always the same ones, each taken so
    that its pair of digit and direction, then its digit, then its direction is one asked least yet."""
    if count >= len(captions):
        return [captions[i % len(captions)] for i in range(count)]
    used: Counter[object] = Counter()
    left = [captions[i] for i in np.random.default_rng(0).permutation(len(captions))]
    chosen = []
    for _ in range(count):
        _, i = min((tuple(used[one] for one in _asked(c)), i) for i, c in enumerate(left))
        chosen.append(left.pop(i))
        used.update(_asked(chosen[-1]))
    return chosen


def _asked(caption: str) -> tuple[tuple[int, str], int, str]:
    """Pair, digit and direction of a caption."""
    moving = parse_caption(caption)
    return (moving.digit, moving.direction), moving.digit, moving.direction


def score_generated(
    model: TextToVideo,
    captions: Sequence[str],
    count: int = 200,
    *,
    steps: int = 30,
    guidance: float = 3.0,
    seed: int = 0,
    scheduler: str = EULER,
    batch_size: int = 40,
    on_videos: Callable[[int], None] = lambda count: None,
) -> Score:
    """Generate count videos, of captions that `spread_over` takes, and watch them."""
    asked = spread_over(captions, count)
    score = Score()
    for first in range(0, count, batch_size):
        some = asked[first : first + batch_size]
        videos = generate(
            model, some, steps=steps, guidance=guidance, seed=seed + first, scheduler=scheduler
        )
        for caption, video in zip(some, videos, strict=True):
            score.add(parse_caption(caption), watch(video))
        on_videos(len(some))
    return score


def score_real(
    count: int = 200,
    *,
    frames: int = 8,
    size: int | tuple[int, int] = 32,
    seed: int = 0,
    codec: Codec | None = None,
) -> Score:
    """Watch count real clips of handwriting that neither model nor judge was fitted on.

    With a codec they are watched after they went through it, which bounds what a model in its latents
    can reach.
    """
    data = MovingDigits(frames, size, seed=seed, split="test")
    score = Score()
    for index in range(count):
        video, caption = data[index]
        if codec is not None:
            video = codec.decode(codec.encode(video[None]))[0].clamp(-1, 1)
        score.add(parse_caption(caption), watch(video))
    return score


def write_figures(
    path: str | Path, name: str, rows: dict[str, Score], settings: dict[str, Any]
) -> dict[str, Any]:
    """Put a model's figures into a JSON file, beside those of the other models in it.

    Args:
        path: the file.
        name: the model's; what the file says of a model of this name is replaced.
        rows: what was watched, the model's own videos and real ones.
        settings: what they were made with.

    Returns:
        All that is in the file now.

    Raises:
        ValueError: the file is there, and holds something else.
    """
    path = Path(path)
    figures = read_figures(path)
    figures[name] = {
        "settings": settings,
        "rows": {row: dataclasses.asdict(score) for row, score in rows.items()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(figures, indent=1) + "\n")
    return figures


def read_figures(path: str | Path) -> dict[str, Any]:
    """What `write_figures` wrote; nothing of a file that is not there.

    Raises:
        ValueError: the file holds something else.
    """
    path = Path(path)
    try:
        figures = json.loads(path.read_text()) if path.is_file() else {}
        if not all("rows" in model for model in figures.values()):
            raise ValueError("there are models without rows")
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no figures of `dit-kernels evaluate`: {error}") from error
    return figures


def table_of(figures: dict[str, Any]) -> str:
    """The figures of `write_figures` as a Markdown table, a row for each thing watched."""
    lines = ["| videos | count | digit as asked | direction as asked |", "|---|---|---|---|"]
    for model in figures.values():
        for row, score in model["rows"].items():
            cells = [f"{score[key] / score['total']:.1%}" for key in ("digits", "directions")]
            line = f"| {row} | {score['total']} | {cells[0]} | {cells[1]} |"
            if line not in lines:
                lines.append(line)
    return "\n".join(lines if figures else [*lines, "| not measured | - | - | - |"])


def write_table(path: str | Path, figures: dict[str, Any]) -> None:
    """Write the table to a page: between the two lines that mark its place, or as the whole page."""
    page = table_place(path).sub(lambda _: table_of(figures) + "\n", _page(path))
    with atomic_path(path) as temporary:
        temporary.write_text(page)


def table_place(path: str | Path) -> re.Pattern[str]:
    """What finds the place for the table in a page.

    Raises:
        ValueError: the page has none.
    """
    begin, end = TABLE
    place = re.compile(f"(?<={re.escape(begin)}\n).*?(?={re.escape(end)})", re.DOTALL)
    if not place.search(_page(path)):
        raise ValueError(f"{path} has no place for the table: the lines {begin} and {end}")
    return place


def _page(path: str | Path) -> str:
    begin, end = TABLE
    return Path(path).read_text() if Path(path).is_file() else f"{begin}\n{end}\n"
