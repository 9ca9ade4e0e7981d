"""Videos to files that a person can open: MP4, GIF, or a PNG with the frames side by side."""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

EXTENSIONS = (".mp4", ".gif", ".png")
FRAMES_A_SECOND = 8
SMALLEST_SIDE = 256  # smaller videos are enlarged to at least this many pixels
SHEET_SIDE = 96  # the same for the frames of a contact sheet
SHEET_GAP = 6


def check_extension(path: str | Path) -> str:
    """The extension of a path, in lower case.

    Raises:
        ValueError: it is not one that can be written.
    """
    extension = Path(path).suffix.lower()
    if extension not in EXTENSIONS:
        raise ValueError(f'the file name must end in {", ".join(EXTENSIONS)}; got "{path}"')
    return extension


def check_writable(path: str | Path) -> None:
    """A file can be written there, or replaced; its folder is made.

    Raises:
        OSError: it can't.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; a file is to be written there")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:  # it names the temporary file
        raise OSError(error.errno, f"nothing can be written to {path.parent}") from error


def write_video(path: str | Path, frames: torch.Tensor, caption: str = "") -> Path:
    """Write one video in the format its extension names; its folder is made if missing.

    Args:
        path: ends in .mp4, .gif, or .png (the frames side by side).
        frames: [F, Y, X, 3] uint8.
        caption: written above the frames of a PNG.

    Returns:
        The path.

    Raises:
        ValueError: an unknown extension.
        OSError: the file can't be written.
    """
    path = Path(path)
    extension = check_extension(path)
    if extension == ".png":
        return write_contact_sheet(path, [frames], [caption])
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = enlarge(frames.numpy(), SMALLEST_SIDE)
    if extension == ".mp4":
        _write_mp4(path, pictures)
    else:
        _write_gif(path, pictures)
    return path


def write_contact_sheet(
    path: str | Path, videos: Sequence[torch.Tensor], captions: Sequence[str]
) -> Path:
    """Write one PNG with a row a video: its caption, and below it its frames side by side.

    Args:
        path: ends in .png.
        videos: each [F, Y, X, 3] uint8.
        captions: one a video; "" for none.

    Returns:
        The path.
    """
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=16)
    rows = [enlarge(video.numpy(), SHEET_SIDE) for video in videos]
    heads = [24 if caption else 0 for caption in captions]
    width = max(len(row) * (row.shape[2] + SHEET_GAP) for row in rows) + SHEET_GAP
    height = sum(h + row.shape[1] + SHEET_GAP for h, row in zip(heads, rows, strict=True))
    sheet = Image.new("RGB", (width, height + SHEET_GAP), "white")
    draw = ImageDraw.Draw(sheet)
    y = SHEET_GAP
    for row, caption, head in zip(rows, captions, heads, strict=True):
        draw.text((SHEET_GAP, y), caption, fill="black", font=font)
        for i, picture in enumerate(row):
            sheet.paste(
                Image.fromarray(picture),
                (SHEET_GAP + i * (row.shape[2] + SHEET_GAP), y + head),
            )
        y += head + row.shape[1] + SHEET_GAP
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path


def file_name_of(caption: str) -> str:
    """A caption as a file name without extension: `a-seven-moving-left`."""
    return re.sub(r"[^a-z0-9]+", "-", caption.lower()).strip("-") or "unconditional"


def enlarge(frames: np.ndarray, smallest_side: int) -> np.ndarray:
    """Repeat pixels a whole number of times until the short side of [F, Y, X, 3] is big enough."""
    factor = max(1, math.ceil(smallest_side / min(frames.shape[1:3])))
    return frames.repeat(factor, axis=1).repeat(factor, axis=2)


def _write_mp4(path: Path, pictures: np.ndarray) -> None:
    import av

    # 4:2:0 colour, the only one every player takes, needs even sides.
    odd = [(0, 0), (0, pictures.shape[1] % 2), (0, pictures.shape[2] % 2), (0, 0)]
    pictures = np.pad(pictures, odd, mode="edge")
    with av.open(str(path), mode="w", format="mp4") as container:
        codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        stream = container.add_stream(codec, rate=Fraction(FRAMES_A_SECOND))
        stream.height, stream.width = pictures.shape[1:3]
        stream.pix_fmt = "yuv420p"
        if codec == "libx264":
            stream.options = {"crf": "15"}
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def _write_gif(path: Path, pictures: np.ndarray) -> None:
    from PIL import Image

    first, *others = [Image.fromarray(picture) for picture in pictures]
    first.save(
        path,
        save_all=True,
        append_images=others,
        duration=1000 // FRAMES_A_SECOND,
        loop=0,
    )
