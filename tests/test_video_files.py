"""Videos written to files are read back, by other code than wrote them, and look the same."""

import av
import numpy as np
import pytest
import torch
from PIL import Image

from dit_kernels.video.files import (
    check_extension,
    enlarge,
    file_name_of,
    write_contact_sheet,
    write_video,
)
from dit_kernels.video.sampling import to_frames


@pytest.fixture
def frames():
    """A bright square that moves right by 4 pixels a frame, [6, 32, 32, 3]."""
    video = torch.full((6, 32, 32, 3), 10, dtype=torch.uint8)
    for i in range(6):
        video[i, 8:20, 4 * i : 4 * i + 8] = 240
    return video


def assert_shows(pictures, frames):
    """Enlarged pictures that passed through a lossy codec show the frames."""
    factor = pictures.shape[1] // frames.shape[1]
    small = pictures[:, factor // 2 :: factor, factor // 2 :: factor].astype(int)
    assert np.abs(small - frames.numpy().astype(int)).max() < 40


def test_mp4(tmp_path, frames):
    path = write_video(tmp_path / "new" / "x.mp4", frames)
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate == 8
        pictures = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
    assert pictures.shape == (6, 256, 256, 3)
    assert_shows(pictures, frames)


@pytest.mark.parametrize("codecs", [{"libx264", "mpeg4"}, {"mpeg4"}], ids=["x264", "mpeg4"])
def test_mp4_without_x264_is_still_an_mp4(tmp_path, frames, monkeypatch, codecs):
    monkeypatch.setattr(av, "codecs_available", codecs)
    path = write_video(tmp_path / "x.mp4", frames)
    with av.open(str(path)) as container:
        expected = "h264" if "libx264" in codecs else "mpeg4"
        assert container.streams.video[0].codec_context.name == expected
        assert sum(1 for _ in container.decode(video=0)) == 6


def test_mp4_of_odd_sides(tmp_path):
    path = write_video(tmp_path / "x.mp4", torch.zeros(2, 257, 301, 3, dtype=torch.uint8))
    with av.open(str(path)) as container:
        first = next(container.decode(video=0))
    assert (first.height, first.width) == (258, 302)


def test_gif(tmp_path, frames):
    path = write_video(tmp_path / "x.gif", frames)
    with Image.open(path) as image:
        assert image.n_frames == 6
        assert image.info["loop"] == 0  # for ever
        pictures = []
        for i in range(6):
            image.seek(i)
            pictures.append(np.array(image.convert("RGB")))
    assert_shows(np.stack(pictures), frames)


def test_gif_keeps_frames_that_are_alike(tmp_path):
    path = write_video(tmp_path / "x.gif", torch.zeros(4, 32, 32, 3, dtype=torch.uint8))
    with Image.open(path) as image:
        total = 0
        for i in range(image.n_frames):
            image.seek(i)
            total += image.info["duration"]
    assert total == 4 * 125  # Pillow may merge equal frames, but not the time they are shown


def test_png_has_the_frames_side_by_side(tmp_path, frames):
    path = write_video(tmp_path / "x.png", frames)
    sheet = np.array(Image.open(path))
    for i, frame in enumerate(frames.numpy()):
        left = 6 + i * (96 + 6)
        shown = sheet[6 : 6 + 96 : 3, left : left + 96 : 3]
        np.testing.assert_array_equal(shown, frame)


def test_contact_sheet_has_a_row_a_video_under_its_caption(tmp_path, frames):
    videos = [frames, frames.flip(0)[:3]]
    path = write_contact_sheet(tmp_path / "x.png", videos, ["one", "two"])
    sheet = np.array(Image.open(path))
    for row, video in enumerate(videos):
        top = 6 + row * (24 + 96 + 6)
        assert (sheet[top : top + 24] == 0).any()  # the caption's letters
        for i, frame in enumerate(video.numpy()):
            left = 6 + i * (96 + 6)
            shown = sheet[top + 24 : top + 24 + 96 : 3, left : left + 96 : 3]
            np.testing.assert_array_equal(shown, frame)


@pytest.mark.parametrize("name", ["x.avi", "x", "x.mp4.txt"])
def test_an_extension_that_cannot_be_written(tmp_path, frames, name):
    with pytest.raises(ValueError, match=r"must end in \.mp4, \.gif, \.png; got"):
        write_video(tmp_path / name, frames)
    assert check_extension("A.MP4") == ".mp4"


def test_a_place_that_cannot_be_written(tmp_path, frames):
    (tmp_path / "file").write_text("")
    for name in ("x.mp4", "x.gif", "x.png"):
        with pytest.raises(OSError, match="file"):
            write_video(tmp_path / "file" / name, frames)


def test_enlarging_repeats_pixels():
    frames = np.random.default_rng(0).integers(0, 256, (2, 20, 33, 3), dtype=np.uint8)
    large = enlarge(frames, 50)
    assert large.shape == (2, 60, 99, 3)
    np.testing.assert_array_equal(large[:, 1::3, 2::3], frames)
    assert enlarge(frames, 5).shape == frames.shape


def test_file_names():
    assert file_name_of("a seven moving left") == "a-seven-moving-left"
    assert file_name_of("") == "unconditional"


def test_videos_become_pictures():
    videos = torch.tensor([-1.0, -0.5, 0.0, 1.0, 7.0]).reshape(1, 1, 1, 1, 5)
    pictures = to_frames(videos)
    assert pictures.shape == (1, 1, 1, 5, 3)
    assert pictures[0, 0, 0, :, 0].tolist() == [0, 64, 128, 255, 255]
    colours = torch.rand(2, 3, 4, 6, 5) * 2 - 1
    assert to_frames(colours).shape == (2, 4, 6, 5, 3)
    assert torch.equal(to_frames(colours)[..., 1], to_frames(colours[:, 1:2])[..., 0])
