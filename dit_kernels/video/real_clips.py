"""Clips of real videos: a folder of them with a caption file beside each, or a CSV.

    cat.mp4 + cat.txt                    in a folder, at any depth
    video,caption                        in a CSV; paths are from the CSV's folder
    cat.mp4,a cat jumps off a chair

A video is decoded by FFmpeg (PyAV), scaled to cover the size that is asked for, and cut to its
middle. A clip begins anywhere in its video.
"""

from __future__ import annotations

import csv
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dit_kernels.video.text import words_of

VIDEO_EXTENSIONS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".gif")
PATH_COLUMNS, CAPTION_COLUMNS = ("video", "path", "file"), ("caption", "text", "prompt")

# Scaled videos are kept up to this many bytes; past it the least recently used is decoded again.
KEPT_BYTES = 2 << 30


class RealClips:
    """An endless list of (clip, caption), the same for the same files, seed and index.

    Every video is decoded once at the start. One that can't be used is skipped; `skipped` says which,
    and why.

    Args:
        source: a folder or a .csv.
        frames: frames in a clip, F.
        size: height and width in pixels, (Y, X) or one number for both.
        seed: chooses the clips.
        channels: 3 for colours, 1 for grey.
        frame_step: every so many-th frame of the video is taken.

    Raises:
        FileNotFoundError: no such folder or CSV.
        ValueError: a CSV without the columns, or no video that can be used.
    """

    def __init__(
        self,
        source: str | Path,
        frames: int,
        size: int | tuple[int, int],
        *,
        seed: int = 0,
        channels: int = 3,
        frame_step: int = 1,
    ) -> None:
        for name, value in (("frames", frames), ("frame_step", frame_step)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        if channels not in (1, 3):
            raise ValueError(f"real videos have 3 channels, or 1 for grey; got {channels}")
        self.frames, self.seed, self.channels, self.frame_step = frames, seed, channels, frame_step
        self.size = (size, size) if isinstance(size, int) else size
        self.skipped: list[tuple[Path, str]] = []
        self.videos: list[tuple[Path, str, int]] = []  # file, caption, frames in it
        self._kept: OrderedDict[Path, np.ndarray] = OrderedDict()
        for path, caption in self._listed(Path(source)):
            try:
                self.videos.append((path, caption, self._checked_length(path)))
            except (OSError, ValueError) as error:
                self.skipped.append((path, " ".join(str(error).split())))
        if not self.videos:
            reasons = "; ".join(f"{path.name}: {reason}" for path, reason in self.skipped[:3])
            raise ValueError(
                f"no video in {source} can be used" + (f": {reasons}" if reasons else "")
            )

    @property
    def captions(self) -> list[str]:
        """The caption of each video."""
        return [caption for _, caption, _ in self.videos]

    @property
    def words(self) -> tuple[str, ...]:
        """Every word of the captions."""
        return tuple(sorted({word for caption in self.captions for word in words_of(caption)}))

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        """One clip [C, F, Y, X] float32 in [-1, 1], and its video's caption."""
        rng = np.random.default_rng((self.seed, index))
        path, caption, length = self.videos[rng.integers(len(self.videos))]
        first = rng.integers(length - self._span + 1)
        clip = self._video(path)[first : first + self._span : self.frame_step]
        return torch.from_numpy(clip).permute(3, 0, 1, 2).float() / 127.5 - 1, caption

    def batch(self, indices: Sequence[int]) -> tuple[torch.Tensor, list[str]]:
        """Clips [B, C, F, Y, X] and their captions."""
        clips, captions = zip(*(self[i] for i in indices), strict=True)
        return torch.stack(clips), list(captions)

    @property
    def _span(self) -> int:
        """Frames of video from a clip's first to its last."""
        return (self.frames - 1) * self.frame_step + 1

    def _listed(self, source: Path) -> Iterator[tuple[Path, str]]:
        """Files and their captions; a file without one is skipped."""
        if source.is_dir():
            for path in sorted(source.rglob("*")):
                if path.suffix.lower() in VIDEO_EXTENSIONS:
                    beside = path.with_suffix(".txt")
                    if beside.is_file():
                        yield path, " ".join(beside.read_text("utf-8", "replace").split())
                    else:
                        self.skipped.append((path, f"no caption: {beside.name} is not there"))
            return
        if not source.is_file():
            raise FileNotFoundError(f"no folder of videos, and no CSV, at {source}")
        with source.open(newline="", encoding="utf-8-sig", errors="replace") as file:
            table = csv.DictReader(file)
            titles = {title.strip().lower(): title for title in table.fieldnames or ()}
            columns = [
                next((titles[name] for name in names if name in titles), None)
                for names in (PATH_COLUMNS, CAPTION_COLUMNS)
            ]
            if None in columns:
                raise ValueError(
                    f"{source} must be a CSV with the columns video and caption; got {', '.join(titles) or 'nothing'}"
                )
            for row in table:
                name, caption = ((row[column] or "").strip() for column in columns if column)
                yield source.parent / name, caption

    def _checked_length(self, path: Path) -> int:
        length = len(self._video(path))
        if length < self._span:
            raise ValueError(f"{length} frames are too few for a clip of {self._span}")
        return length

    def _video(self, path: Path) -> np.ndarray:
        """All frames of a file, scaled, [F, Y, X, C] uint8."""
        found = self._kept.pop(path, None)
        if found is None:
            found = read_video(path, self.size, self.channels)
            size = found.nbytes + sum(video.nbytes for video in self._kept.values())
            while self._kept and size > KEPT_BYTES:
                size -= self._kept.popitem(last=False)[1].nbytes
        self._kept[path] = found
        return found


def read_video(
    path: str | Path, size: tuple[int, int] | None = None, channels: int = 3
) -> np.ndarray:
    """The frames of a video (or the one of a picture), [F, Y, X, C] uint8.

    Args:
        path: what FFmpeg can read.
        size: (Y, X): frames are scaled to cover it, and cut to their middle; None leaves them.
        channels: 3, or 1 for grey.

    Raises:
        OSError, ValueError: the file is not there, is damaged, or has no video in it.
    """
    import av

    if not Path(path).is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError("no video in the file")
            container.streams.video[0].thread_type = "AUTO"
            pictures = [_scaled(frame, size, channels) for frame in container.decode(video=0)]
    except av.FFmpegError as error:
        raise ValueError(f"it can't be decoded: {error}") from error
    if not pictures:
        raise ValueError("no frame can be decoded")
    return np.stack(pictures)


def _scaled(frame: Any, size: tuple[int, int] | None, channels: int) -> np.ndarray:
    """One frame [Y, X, C], scaled to cover size and cut to its middle."""
    height, width = size or (frame.height, frame.width)
    scale = max(height / frame.height, width / frame.width)
    rows, columns = max(height, round(scale * frame.height)), max(width, round(scale * frame.width))
    picture = frame.to_ndarray(
        format="rgb24" if channels == 3 else "gray",
        height=rows,
        width=columns,
        interpolation="AREA",
    ).reshape(rows, columns, channels)
    top, left = (rows - height) // 2, (columns - width) // 2
    return picture[top : top + height, left : left + width]
