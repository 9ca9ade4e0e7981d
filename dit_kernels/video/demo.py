"""The demonstration: several captions to videos, and one picture that shows them all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dit_kernels.video.files import file_name_of, write_contact_sheet, write_video
from dit_kernels.video.model import TextToVideo
from dit_kernels.video.sampling import generate, to_frames

CAPTIONS = (
    "a zero moving right",
    "a two moving up",
    "a three moving left",
    "a four moving down",
    "a five moving right",
    "a six moving up",
    "a seven moving left",
    "an eight moving down",
)


def make_demo(
    model: TextToVideo, folder: str | Path, on_step: Callable[[], None] = lambda: None
) -> list[Path]:
    """Write an MP4 and a GIF a caption, and `contact-sheet.png` with all of them.

    Args:
        model: see `TextToVideo.load`.
        folder: where to write; made if missing.
        on_step: called after each step of sampling, of which there are 30.

    Returns:
        The files, the contact sheet first.
    """
    folder = Path(folder)
    videos = list(to_frames(generate(model, CAPTIONS, on_step=on_step)))
    paths = [write_contact_sheet(folder / "contact-sheet.png", videos, CAPTIONS)]
    for caption, frames in zip(CAPTIONS, videos, strict=True):
        for extension in (".mp4", ".gif"):
            paths.append(write_video(folder / (file_name_of(caption) + extension), frames))
    return paths
