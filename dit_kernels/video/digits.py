"""Moving handwritten digits: short clips made from real scans, with a caption each.

scikit-learn ships 1,797 scanned digits of 8x8 pixels. Each is enlarged to 14x14 and moved at a
constant speed over a black frame. A fifth of the scans is held out for testing, so a test clip
shows handwriting that no training clip showed. Prompts can be held out too, of two kinds. With
`wordings` captions say the same in 36 ways, of which a fifth are never in training. With `hold_out`
no training clip shows a digit going the one way that `held_out` names for it, so that a model which
shows it must have learned digits and directions apart.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # (dy, dx) a frame
CAPTION_WORDS = ("a", "an", "moving", *DIGIT_WORDS, *DIRECTIONS)

DIGIT_SIZE = 14  # pixels on a side
SPEED = 2  # pixels a frame
GRID = 2  # pixels between the places where a digit can start
SPEEDS = {"slowly": 1, "": SPEED, "quickly": 4}  # said last, or not at all
SPLITS = ("train", "test")

# the first of each is plain
NOUNS = ("a", "the digit", "a handwritten")
VERBS = ("moving", "going", "sliding", "drifting")
WAYS = {
    "left": ("left", "to the left", "leftwards"),
    "right": ("right", "to the right", "rightwards"),
    "up": ("up", "to the top", "upwards"),
    "down": ("down", "to the bottom", "downwards"),
}
Wording = tuple[int, int, int]  # of NOUNS, VERBS and WAYS
PLAIN: Wording = (0, 0, 0)
WORDINGS: tuple[Wording, ...] = tuple(itertools.product(range(3), range(4), range(3)))
MORE_WORDS = tuple(
    word
    for word in dict.fromkeys(" ".join((*NOUNS, *VERBS, *sum(WAYS.values(), ()))).split())
    if word not in CAPTION_WORDS
)
_ONE = re.compile(
    rf"(?P<noun>an?|{'|'.join(NOUNS[1:])}) (?P<digit>{'|'.join(DIGIT_WORDS)}) (?P<verb>{'|'.join(VERBS)})"
    rf" (?P<way>{'|'.join(sum(WAYS.values(), ()))})( (?P<speed>slowly|quickly))?"
)


@dataclass(frozen=True)
class MovingDigit:
    """What a caption says of one digit: which one, which way it goes, how fast, and in which words."""

    digit: int
    direction: str
    speed: str = ""
    wording: Wording = PLAIN


def caption_of(*moving: MovingDigit) -> str:
    """The caption of moving digits: `a seven moving left`, `a two moving up slowly and a one moving down`."""
    return " and ".join(_phrase_of(one) for one in moving)


def parse_caption(caption: str) -> MovingDigit:
    """The moving digit that a caption of one asks for; the inverse of `caption_of`.

    Raises:
        ValueError: the caption is not `a <digit> moving <direction>`, with or without a speed, nor the
            same in another wording.
    """
    if found := _ONE.fullmatch(" ".join(caption.lower().split())):
        noun = "a" if found["noun"] == "an" else found["noun"]
        way = next(way for way, said in WAYS.items() if found["way"] in said)
        wording = NOUNS.index(noun), VERBS.index(found["verb"]), WAYS[way].index(found["way"])
        return MovingDigit(DIGIT_WORDS.index(found["digit"]), way, found["speed"] or "", wording)
    raise ValueError(
        f'caption must read "a <{"|".join(DIGIT_WORDS)}> moving <{"|".join(DIRECTIONS)}> [slowly|quickly]"; '
        f'got "{caption}"'
    )


def parse_captions(caption: str) -> tuple[MovingDigit, ...]:
    """Every moving digit that a caption asks for.

    Raises:
        ValueError: a part between two "and"s is not as `parse_caption` takes it.
    """
    return tuple(parse_caption(part) for part in caption.lower().split(" and "))


def _phrase_of(moving: MovingDigit) -> str:
    word = DIGIT_WORDS[moving.digit]
    noun, verb, way = moving.wording
    article = "an" if noun == 0 and word == "eight" else NOUNS[noun]
    said = f"{article} {word} {VERBS[verb]} {WAYS[moving.direction][way]} {moving.speed}"
    return said.strip()


def held_out_wording(moving: MovingDigit) -> bool:
    """Whether training never shows what the caption says in these words: seven or eight of 36 wordings."""
    way = list(DIRECTIONS).index(moving.direction)
    return (sum(moving.wording) + moving.digit + way) % 5 == 0


def unseen_captions() -> list[str]:
    """Captions of one digit at the plain speed, in wordings held out from training; the forty pairs of
    digit and direction in turn."""
    ways = [
        [m for w in WORDINGS if held_out_wording(m := MovingDigit(digit, way, "", w))]
        for digit in range(10)
        for way in DIRECTIONS
    ]
    turns = itertools.zip_longest(*ways)
    return [caption_of(m) for m in itertools.chain.from_iterable(turns) if m is not None]


def held_out(digit: int, direction: str) -> bool:
    """Whether training with hold_out never shows this digit going this way: one way a digit."""
    return direction == list(DIRECTIONS)[digit % len(DIRECTIONS)]


def all_captions() -> list[str]:
    """Every caption of one digit at the plain speed, digits in order, each in the four directions."""
    return [caption_of(MovingDigit(d, way)) for d in range(10) for way in DIRECTIONS]


def captions_of_split(split: str) -> list[str]:
    """Of `all_captions`, the thirty that training with hold_out shows ("train"), or the other ten ("test")."""
    _check_split(split)
    asked = [parse_caption(caption) for caption in all_captions()]
    return [caption_of(m) for m in asked if held_out(m.digit, m.direction) == (split == "test")]


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}; got {split!r}")


@functools.lru_cache(maxsize=len(SPLITS))
def load_scans(split: str) -> tuple[np.ndarray, np.ndarray]:
    """The enlarged scans of one split.

    Args:
        split: "train" (four fifths of the scans) or "test" (the held-out fifth).

    Returns:
        Scans [N, 14, 14] float32 in [0, 1], ink is 1; digits [N] int64.

    Raises:
        ValueError: another split.
    """
    _check_split(split)
    from sklearn.datasets import load_digits

    data = load_digits()
    small = torch.from_numpy(data.images).float()[:, None] / 16
    scans = F.interpolate(small, size=(DIGIT_SIZE, DIGIT_SIZE), mode="bicubic").clamp(0, 1)[:, 0]
    order = np.random.default_rng(0).permutation(len(scans))
    held_out = len(scans) // 5
    chosen = order[:held_out] if split == "test" else order[held_out:]
    return scans.numpy()[chosen], data.target[chosen].astype(np.int64)


class MovingDigits:
    """An endless list of (video, caption), the same for the same seed and index on every machine.

    A digit whose path fits in the frame stays inside it; a longer path leaves at one edge and
    comes back at the opposite one, so the direction never changes. Digits start two pixels apart,
    which is a quarter of the places to learn a digit at and looks no different.

    Args:
        frames: frames in a clip, F.
        size: height and width in pixels, (Y, X) or one number for both; at least 14.
        seed: chooses the whole list.
        split: "train" or "test" scans.
        most_digits: a clip shows one digit, up to so many.
        speeds: also digits that move slowly or quickly.
        channels: C of the clips; all are the same grey.
        hold_out: no digit goes the way that `held_out` names for it.
        wordings: captions in other words than the plain ones, but for those that are held out.
    """

    def __init__(
        self,
        frames: int = 8,
        size: int | tuple[int, int] = 32,
        seed: int = 0,
        split: str = "train",
        *,
        most_digits: int = 1,
        speeds: bool = False,
        channels: int = 1,
        hold_out: bool = False,
        wordings: bool = False,
    ) -> None:
        self.frames = frames
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        self.seed = seed
        self.split = split
        self.most_digits = most_digits
        self.speeds = speeds
        self.channels = channels
        self.hold_out = hold_out
        self.wordings = wordings
        if frames < 1:
            raise ValueError(f"frames must be at least 1; got {frames}")
        if min(self.size) < DIGIT_SIZE:
            raise ValueError(
                f"size must be at least {DIGIT_SIZE}, the size of a digit; got {self.size}"
            )
        if most_digits < 1 or channels < 1:
            raise ValueError(
                f"digits and channels must be at least 1; got {most_digits} and {channels}"
            )
        self.scans, self.digits = load_scans(split)

    @property
    def words(self) -> tuple[str, ...]:
        """Every word of the captions."""
        more = MORE_WORDS if self.wordings else ()
        more += ("and",) if self.most_digits > 1 else ()
        return CAPTION_WORDS + more + (tuple(filter(None, SPEEDS)) if self.speeds else ())

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        """One clip [C, F, Y, X] float32 in [-1, 1] (ink is 1), and its caption."""
        rng = np.random.default_rng((self.seed, SPLITS.index(self.split), index))
        canvas = np.zeros((self.frames, *self.size), dtype=np.float32)
        count = 1 if self.most_digits == 1 else rng.integers(1, self.most_digits + 1)
        shown = [self._draw(canvas, rng) for _ in range(count)]
        clip = torch.from_numpy(canvas * 2 - 1)
        return clip.expand(self.channels, *clip.shape), caption_of(*shown)

    def batch(self, indices: Sequence[int]) -> tuple[torch.Tensor, list[str]]:
        """Clips [B, C, F, Y, X] and their captions."""
        clips, captions = zip(*(self[i] for i in indices), strict=True)
        return torch.stack(clips), list(captions)

    def _draw(self, canvas: np.ndarray, rng: np.random.Generator) -> MovingDigit:
        """Move a scan over canvas [F, Y, X]; where two digits overlap the brighter shows."""
        scan = rng.integers(len(self.scans))
        digit = int(self.digits[scan])
        ways = [way for way in DIRECTIONS if not (self.hold_out and held_out(digit, way))]
        direction = ways[rng.integers(len(ways))]
        speed = list(SPEEDS)[rng.integers(len(SPEEDS))] if self.speeds else ""
        travel = SPEEDS[speed] * (self.frames - 1)
        rows_columns = []
        for step, length in zip(DIRECTIONS[direction], self.size, strict=True):
            room = length - DIGIT_SIZE
            if step == 0:
                first = GRID * rng.integers(room // GRID + 1)
            elif travel <= room:
                first = GRID * rng.integers((room - travel) // GRID + 1)
                first += travel if step < 0 else 0
            else:
                first = GRID * rng.integers(length // GRID)
            path = first + step * SPEEDS[speed] * np.arange(self.frames)
            rows_columns.append((path[:, None] + np.arange(DIGIT_SIZE)) % length)  # [F, 14]
        rows, columns = rows_columns
        frame = np.arange(self.frames)[:, None, None]
        where = frame, rows[:, :, None], columns[:, None, :]
        canvas[where] = np.maximum(canvas[where], self.scans[scan])
        if not self.wordings:
            return MovingDigit(digit, direction, speed)
        said = [MovingDigit(digit, direction, speed, wording) for wording in WORDINGS]
        said = [moving for moving in said if not held_out_wording(moving)]
        return said[rng.integers(len(said))]
