"""The clips of moving digits: what they show, and that they are the same every time."""

import hashlib

import numpy as np
import pytest
import torch

from dit_kernels.video.digits import (
    CAPTION_WORDS,
    DIGIT_SIZE,
    DIRECTIONS,
    SPEED,
    WORDINGS,
    MovingDigit,
    MovingDigits,
    all_captions,
    caption_of,
    captions_of_split,
    held_out_wording,
    load_scans,
    parse_caption,
    parse_captions,
    unseen_captions,
)
from dit_kernels.video.evaluation import motion_of

# the first clip of seed 0: its caption, and what its pixels hash to
FIRST = ("a three moving up", "69855f730a3b1779")


def ink(video):
    return (video[0].numpy() + 1) / 2


def test_captions_and_their_meaning_are_inverse():
    captions = all_captions()
    assert len(set(captions)) == 40
    assert "a seven moving left" in captions
    assert "an eight moving up" in captions
    assert "a one moving down" in captions
    assert [caption_of(parse_caption(caption)) for caption in captions] == captions
    assert {word for caption in captions for word in caption.split()} == set(CAPTION_WORDS)


def test_every_wording_says_the_same():
    said = {
        caption_of(MovingDigit(digit, way, speed, wording)): (digit, way, speed)
        for digit in range(10)
        for way in DIRECTIONS
        for speed in ("", "slowly")
        for wording in WORDINGS
    }
    assert len(said) == 10 * 4 * 2 * 36
    assert said["the digit seven drifting leftwards"] == (7, "left", "")
    assert said["a handwritten eight going to the top slowly"] == (8, "up", "slowly")
    for caption, meaning in said.items():
        found = parse_caption(caption)
        assert (found.digit, found.direction, found.speed) == meaning
        assert caption_of(found) == caption


def test_wordings_that_are_held_out_are_never_shown():
    unseen = unseen_captions()
    assert len(set(unseen)) == len(unseen) == 288
    assert all(held_out_wording(parse_caption(caption)) for caption in unseen)
    # the first forty ask for each pair of a digit and a direction once
    assert {(m.digit, m.direction) for m in map(parse_caption, unseen[:40])} == {
        (digit, way) for digit in range(10) for way in DIRECTIONS
    }
    clips = MovingDigits(wordings=True)
    shown = {clips[index][1] for index in range(1500)}
    assert len(shown) > 700
    assert not shown & set(unseen)
    words = {word for caption in (*shown, *unseen) for word in caption.split()}
    assert words == set(clips.words)
    assert torch.equal(clips[3][0], MovingDigits()[3][0])


@pytest.mark.parametrize("caption", ["", "a seven", "a dog moving left", "a seven moving away"])
def test_a_caption_outside_the_grammar_is_an_error(caption):
    with pytest.raises(ValueError, match="caption must read"):
        parse_caption(caption)


def test_held_out_scans_are_not_in_the_training_split():
    (train, train_digits), (test, test_digits) = load_scans("train"), load_scans("test")
    assert len(train) + len(test) == 1797
    assert len(test) == 359
    assert len(train) == len(train_digits)
    assert set(test_digits) == set(range(10))
    # The published scans have no duplicates, so one seen in both splits would be a leak.
    assert not {scan.tobytes() for scan in train} & {scan.tobytes() for scan in test}
    with pytest.raises(ValueError, match="split must be one of train, test; got 'dev'"):
        load_scans("dev")


@pytest.mark.parametrize(
    ("frames", "size"),
    [(8, 32), (1, 14), (16, 32), (5, (20, 45))],
    ids=["8x32", "1x14", "16x32", "5x20x45"],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_frame_shows_the_captioned_digit_moving_as_captioned(frames, size, split):
    data = MovingDigits(frames, size, seed=3, split=split)
    scans, digits = load_scans(split)
    by_digit = {digit: scans[digits == digit] for digit in range(10)}
    for index in range(20):
        video, caption = data[index]
        asked = parse_caption(caption)
        height, width = (size, size) if isinstance(size, int) else size
        assert video.shape == (1, frames, height, width)
        assert video.dtype == torch.float32
        assert video.min() >= -1
        assert video.max() <= 1
        # The ink of each frame is that of one scan of the digit: none is lost at the edges.
        amounts = ink(video).sum(axis=(1, 2))
        totals = by_digit[asked.digit].sum(axis=(1, 2))
        np.testing.assert_allclose(amounts, amounts[0], rtol=1e-5)
        assert np.isclose(totals, amounts[0], rtol=1e-5).any()
        if frames > 1:
            step = SPEED * np.array(DIRECTIONS[asked.direction])
            for before, after in zip(ink(video), ink(video)[1:], strict=False):
                np.testing.assert_array_equal(np.roll(before, step, axis=(0, 1)), after)


def test_a_path_that_fits_never_leaves_the_frame():
    data = MovingDigits(frames=8, size=32)
    for index in range(50):
        video, _ = data[index]
        shown = ink(video)
        for axis in (1, 2):
            used = shown.max(axis=(0, 3 - axis)) > 0
            spread = np.flatnonzero(used)
            assert spread[-1] - spread[0] < DIGIT_SIZE + 7 * SPEED


def test_clips_depend_on_seed_index_and_split_alone():
    first, again = MovingDigits(seed=5), MovingDigits(seed=5)
    again[9]  # what was asked for before must not matter
    assert torch.equal(first[7][0], again[7][0])
    assert first[7][1] == again[7][1]
    for other in (MovingDigits(seed=6)[7], MovingDigits(seed=5, split="test")[7], first[8]):
        assert not torch.equal(first[7][0], other[0])


def test_a_batch_is_its_clips():
    data = MovingDigits()
    videos, captions = data.batch(range(4, 7))
    assert videos.shape == (3, 1, 8, 32, 32)
    for row, index in enumerate(range(4, 7)):
        assert torch.equal(videos[row], data[index][0])
        assert captions[row] == data[index][1]


def test_all_captions_come_up_about_as_often():
    data = MovingDigits()
    seen = [parse_caption(data[index][1]) for index in range(800)]
    for direction in DIRECTIONS:
        assert 140 < sum(m.direction == direction for m in seen) < 260
    for digit in range(10):
        assert 45 < sum(m.digit == digit for m in seen) < 115


def test_a_quarter_of_the_captions_can_be_held_out():
    trained, unseen = captions_of_split("train"), captions_of_split("test")
    assert sorted(trained + unseen) == sorted(all_captions())
    assert [parse_caption(caption).digit for caption in unseen] == list(range(10))
    assert {parse_caption(caption).direction for caption in unseen} == set(DIRECTIONS)
    clips = MovingDigits(5, 24, most_digits=2, speeds=True, hold_out=True)
    shown = [one for index in range(600) for one in parse_captions(clips[index][1])]
    plain = {caption_of(MovingDigit(one.digit, one.direction)) for one in shown}
    assert plain == set(trained)
    with pytest.raises(ValueError, match="split must be one of train, test; got 'all'"):
        captions_of_split("all")


def test_sizes_and_lengths_that_cannot_be():
    with pytest.raises(ValueError, match="size must be at least 14"):
        MovingDigits(size=(32, 13))
    with pytest.raises(ValueError, match="frames must be at least 1; got 0"):
        MovingDigits(frames=0)


def test_motion_is_measured_across_the_edge():
    video, caption = MovingDigits(frames=16, size=32, seed=1)[0]
    asked = parse_caption(caption)
    assert isinstance(asked, MovingDigit)
    expected = SPEED * np.array(DIRECTIONS[asked.direction])
    np.testing.assert_allclose(motion_of(ink(video)), expected, atol=1e-4)


def test_captions_of_speeds_and_of_two_digits():
    slow, fast = MovingDigit(7, "left", "slowly"), MovingDigit(8, "up", "quickly")
    assert caption_of(slow) == "a seven moving left slowly"
    assert (
        caption_of(MovingDigit(1, "up"), fast) == "a one moving up and an eight moving up quickly"
    )
    for shown in ((slow,), (fast, slow), (MovingDigit(0, "down"), fast)):
        assert parse_captions(caption_of(*shown)) == shown
    assert parse_caption(caption_of(slow)) == slow
    with pytest.raises(ValueError, match="caption must read"):
        parse_caption("a seven moving left slowly quickly")
    with pytest.raises(ValueError, match="caption must read"):
        parse_captions("a seven moving left and")


def test_speeds_are_as_captioned():
    data = MovingDigits(frames=5, size=40, seed=2, speeds=True)
    seen = set()
    for index in range(30):
        video, caption = data[index]
        asked = parse_caption(caption)
        seen.add(asked.speed)
        step = {"slowly": 1, "": 2, "quickly": 4}[asked.speed] * np.array(
            DIRECTIONS[asked.direction]
        )
        for before, after in zip(ink(video), ink(video)[1:], strict=False):
            np.testing.assert_array_equal(np.roll(before, step, axis=(0, 1)), after)
    assert seen == {"slowly", "", "quickly"}
    assert set(data.words) == {*CAPTION_WORDS, "slowly", "quickly"}


def test_two_digits_are_both_there():
    data = MovingDigits(frames=6, size=64, seed=1, most_digits=2, channels=3)
    scans, digits = load_scans("train")
    counts = []
    for index in range(10):
        video, caption = data[index]
        assert video.shape == (3, 6, 64, 64)
        assert torch.equal(video[0], video[2])
        asked = parse_captions(caption)
        counts.append(len(asked))
        frames = ink(video)
        for (
            moving
        ) in asked:  # somewhere in the first frame, a scan of the digit, and it moves as said
            step = 2 * np.array(DIRECTIONS[moving.direction])
            found = [
                (y, x)
                for y in range(0, 64, 2) for x in range(0, 64, 2)
                if _shows(frames, scans[digits == moving.digit], (y, x), step)
            ]  # fmt: skip
            assert found, caption
    assert set(counts) == {1, 2}
    assert set(data.words) == {*CAPTION_WORDS, "and"}


def _shows(frames, scans, corner, step):
    """Whether one of the scans moves by step a frame from a corner, under what else is brighter."""
    left = np.ones(len(scans), dtype=bool)
    for i, frame in enumerate(frames):
        rows, columns = (
            (c + i * s + np.arange(DIGIT_SIZE)) % n
            for c, s, n in zip(corner, step, frame.shape, strict=True)
        )
        left &= (frame[np.ix_(rows, columns)] >= scans - 1e-6).all(axis=(1, 2))
        if not left.any():
            return False
    return bool(left.any())


def test_clips_of_the_first_version_stay_as_they_were():
    """The shipped weights were trained on them."""
    video, caption = MovingDigits(seed=0)[0]
    assert caption == FIRST[0]
    assert hashlib.sha256(video.numpy().tobytes()).hexdigest()[:16] == FIRST[1]
