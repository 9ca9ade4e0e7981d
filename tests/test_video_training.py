"""Training: the loss, the averaged weights, checkpoints, and runs that were interrupted."""

import copy
import dataclasses
import math
import os
import signal
import subprocess
import sys

import pytest
import torch

from dit_kernels.video import training
from dit_kernels.video.checkpoints import read_checkpoint, write_checkpoint
from dit_kernels.video.model import ModelConfig, TextToVideo
from dit_kernels.video.training import (
    CHECKPOINT_NAME,
    Trainer,
    TrainingConfig,
    TrainingDiverged,
    flow_matching_loss,
    train,
)

SMALL = ModelConfig(
    size=16, frames=4, hidden_size=32, depth=2, num_heads=2, text_dim=32, text_depth=1
)
RUN = TrainingConfig(steps=6, batch_size=4, warmup_steps=2, checkpoint_every=3)


@pytest.fixture(autouse=True)
def one_thread():
    """The machine's other work must not decide how fast these tests are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def everything(trainer, folder):
    trainer.save(folder / "all.safetensors")
    return read_checkpoint(folder / "all.safetensors")


def assert_equal_runs(one, other):
    assert one[1] == other[1]
    assert one[0].keys() == other[0].keys()
    for name, tensor in one[0].items():
        assert torch.equal(tensor, other[0][name]), name


def test_the_loss_is_that_of_the_velocity():
    torch.manual_seed(0)
    clean, noise, predicted = torch.randn(3, 2, 1, 4, 8, 8, dtype=torch.float64)
    t = torch.tensor([0.3, 0.9], dtype=torch.float64)
    s = t[:, None, None, None, None]
    x_t = (1 - s) * clean + s * noise
    velocity = noise - clean
    implied = (x_t - predicted) / s
    expected = (implied - velocity).square().mean()
    loss = flow_matching_loss(predicted, clean, t)
    torch.testing.assert_close(loss, expected.float(), check_dtype=False)


def test_the_loss_stays_bounded_where_there_is_no_noise():
    clean = torch.zeros(1, 1, 4, 8, 8)
    loss = flow_matching_loss(clean + 0.1, clean, torch.zeros(1))
    torch.testing.assert_close(loss, torch.tensor(1.0))


def test_the_loss_falls():
    trainer = Trainer(SMALL, dataclasses.replace(RUN, steps=60, batch_size=8, warmup_steps=10))
    losses = [trainer.step() for _ in range(60)]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_a_run_depends_on_its_seed_alone(tmp_path):
    runs = []
    for seed, noise_outside in ((1, 0), (1, 99), (2, 0)):
        torch.manual_seed(noise_outside)  # the caller's generator is neither read nor moved
        trainer = Trainer(SMALL, dataclasses.replace(RUN, seed=seed))
        trainer.step()
        expected = torch.Generator().manual_seed(noise_outside)
        assert torch.equal(torch.rand(3), torch.rand(3, generator=expected))
        runs.append(everything(trainer, tmp_path))
    assert_equal_runs(runs[0], runs[1])
    weight = "model.text.embedding.weight"
    assert not torch.equal(runs[0][0][weight], runs[2][0][weight])


def test_a_resumed_run_ends_with_the_weights_of_an_unbroken_one(tmp_path):
    unbroken = Trainer(SMALL, RUN)
    train(unbroken, tmp_path / "unbroken")

    first = Trainer(SMALL, RUN)
    for _ in range(3):
        first.step()
    first.save(tmp_path / CHECKPOINT_NAME)
    first.step()  # lost with the process, and must leave no trace
    resumed = Trainer.load(tmp_path / CHECKPOINT_NAME)
    assert resumed.step_number == 3
    train(resumed, tmp_path / "resumed")

    assert_equal_runs(everything(unbroken, tmp_path), everything(resumed, tmp_path))
    for name in (CHECKPOINT_NAME, "model.safetensors"):
        files = [(tmp_path / run / name).read_bytes() for run in ("unbroken", "resumed")]
        assert files[0] == files[1], name


def test_a_killed_process_leaves_a_checkpoint_to_go_on_from(tmp_path):
    program = f"""
import os, signal, torch
from dit_kernels.video.data import ClipsConfig
from dit_kernels.video.model import ModelConfig
from dit_kernels.video.training import Trainer, TrainingConfig, train
torch.set_num_threads(1)
def on_step(done, loss):
    if done == 4:
        os.kill(os.getpid(), signal.SIGKILL)
train(Trainer({SMALL!r}, {RUN!r}), {str(tmp_path)!r}, on_step)
"""
    killed = subprocess.run([sys.executable, "-c", program], check=False)
    assert killed.returncode == -signal.SIGKILL
    resumed = Trainer.load(tmp_path / CHECKPOINT_NAME)
    assert resumed.step_number == 3
    train(resumed, tmp_path)
    unbroken = Trainer(SMALL, RUN)
    train(unbroken, tmp_path / "unbroken")
    assert_equal_runs(everything(unbroken, tmp_path), everything(resumed, tmp_path))


def test_the_average_follows_the_weights():
    trainer = Trainer(SMALL, dataclasses.replace(RUN, ema_decay=0.5))
    expected = {name: p.clone() for name, p in trainer.ema.named_parameters()}
    for step in range(3):
        trainer.step()
        decay = min(0.5, (1 + step) / (10 + step))
        for name, parameter in trainer.model.named_parameters():
            expected[name].lerp_(parameter.detach(), 1 - decay)
    for name, parameter in trainer.ema.named_parameters():
        torch.testing.assert_close(parameter, expected[name])


def test_the_learning_rate_rises_stays_and_falls_to_zero():
    trainer = Trainer(SMALL, dataclasses.replace(RUN, steps=100, warmup_steps=10, decay_share=0.4))
    rates = []
    for trainer.step_number in range(101):
        rates.append(trainer._rate())
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert set(rates[9:61]) == {1.0}
    assert rates[60:] == pytest.approx([1 - i / 40 for i in range(41)])


def test_captions_are_dropped_at_the_asked_rate():
    trainer = Trainer(SMALL, dataclasses.replace(RUN, batch_size=400, caption_dropout=0.25))
    _, captions, t, _, _ = trainer._draw()
    assert 60 < captions.count("") < 140
    assert ((t > 0) & (t < 1)).all()
    assert 0.65 < t.mean() < 0.80  # logit-normal, mean 1.2: more noise than not


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_weights(tmp_path, monkeypatch):
    trainer = Trainer(SMALL, RUN)
    loss = training.flow_matching_loss
    monkeypatch.setattr(
        training,
        "flow_matching_loss",
        lambda *args: loss(*args) * (float("nan") if trainer.step_number == 4 else 1),
    )
    with pytest.raises(TrainingDiverged, match="the loss became nan at step 4") as error:
        train(trainer, tmp_path)
    assert str(tmp_path / CHECKPOINT_NAME) in str(error.value)
    assert Trainer.load(tmp_path / CHECKPOINT_NAME).step_number == 3
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_a_checkpoint_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    write_checkpoint(path, {"a": torch.ones(3)}, {"step": 1})

    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        write_checkpoint(path, {"a": torch.zeros(3)}, {"step": 2})
    tensors, settings = read_checkpoint(path)
    assert settings == {"step": 1}
    assert torch.equal(tensors["a"], torch.ones(3))
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_what_is_not_a_checkpoint_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        read_checkpoint(tmp_path / "none")
    (tmp_path / "text").write_text("hello" * 10)
    with pytest.raises(ValueError, match="is not a checkpoint of this package"):
        read_checkpoint(tmp_path / "text")
    write_checkpoint(tmp_path / "other", {"a": torch.ones(1)}, {})
    with pytest.raises(ValueError, match="is not a training checkpoint"):
        Trainer.load(tmp_path / "other")
    with pytest.raises(ValueError, match="has no text-to-video model in it"):
        TextToVideo.load(tmp_path / "other")


def test_a_model_is_read_from_a_training_checkpoint_and_from_a_model_file(tmp_path):
    trainer = Trainer(SMALL, RUN)
    path = train(trainer, tmp_path)
    for file in (tmp_path / CHECKPOINT_NAME, path):
        model = TextToVideo.load(file)
        assert model.config == SMALL
        assert not model.training
        for name, parameter in model.named_parameters():
            averaged = trainer.ema.get_parameter(name)
            kept = averaged if file != path else averaged.half().float()
            assert torch.equal(parameter, kept), name


def test_a_checkpoint_of_a_later_version_says_so(tmp_path):
    model = TextToVideo(SMALL)
    settings = dataclasses.asdict(SMALL) | {"colour": "red"}
    write_checkpoint(tmp_path / "later", model.state_dict(), {"model": settings})
    with pytest.raises(ValueError, match="settings this version does not know: colour"):
        TextToVideo.load(tmp_path / "later")


def test_a_step_in_parts_is_the_step(tmp_path):
    whole, parts = (
        Trainer(SMALL, dataclasses.replace(RUN, accumulate=n, bf16=False, optimizer="adamw"))
        for n in (1, 4)
    )
    assert whole.step() == pytest.approx(parts.step(), rel=1e-5)
    for (name, one), other in zip(
        whole.model.named_parameters(), parts.model.parameters(), strict=True
    ):
        torch.testing.assert_close(one.grad, other.grad, msg=lambda text, name=name: name + text)
    with pytest.raises(ValueError, match="accumulate must divide the clips of a step; got 3 and 4"):
        Trainer(SMALL, dataclasses.replace(RUN, accumulate=3))


def test_given_frames_are_clean_at_time_zero_and_not_in_the_loss(monkeypatch):
    model = dataclasses.replace(SMALL, frames=8)  # two patches of four frames
    trainer = Trainer(model, dataclasses.replace(RUN, given_share=0.5, batch_size=64, bf16=False))
    clean, _, t, noise, given = trainer._draw()
    count = given.sum(1)
    assert 16 < (count > 0).sum() < 48
    assert (count == 1).sum() > 8
    assert count.max() == 7
    assert torch.equal(given, torch.arange(8) < count[:, None])  # the first ones
    seen = []

    def forward(self, x, times, *text):
        seen.append((x, times))
        return torch.where(given[:, None, :, None, None], 1e6, clean + 0.1)

    monkeypatch.setattr(TextToVideo, "forward", forward)
    expected = (0.01 / t.clamp(min=training.SMALLEST_TIME).square()).mean()
    torch.testing.assert_close(
        trainer._loss(clean, [""] * 64, t, noise, given), expected, rtol=1e-4, atol=0
    )
    ((x, times),) = seen
    for row in range(64):
        known = int(count[row])
        assert torch.equal(x[row, :, :known], clean[row, :, :known])
        noisy = torch.lerp(clean[row], noise[row], t[row])[:, known:]
        torch.testing.assert_close(x[row, :, known:], noisy)
        assert times[row].tolist() == [0 if known >= 4 else t[row], t[row]]


def test_nothing_is_given_by_default():
    *_, given = Trainer(SMALL, RUN)._draw()
    assert given is None


def test_the_first_steps_can_be_on_small_clips():
    config = dataclasses.replace(
        RUN, small_steps=1, small_batch_size=6, small_frames=4, small_size=16
    )
    trainer = Trainer(dataclasses.replace(SMALL, frames=8, size=20), config)
    assert trainer._draw()[0].shape == (6, 1, 4, 16, 16)
    assert trainer.tokens(0) == 6 * 1 * 4 * 4
    trainer.step()
    assert trainer._draw()[0].shape == (4, 1, 8, 20, 20)
    assert trainer.tokens(1) == 4 * 2 * 5 * 5
    trainer.step()


def test_steps_on_longer_and_larger_clips():
    config = dataclasses.replace(
        RUN, vary_every=3, small_steps=1, small_batch_size=6, small_size=16
    )
    trainer = Trainer(SMALL, config)
    shapes = []
    for step in range(6):
        trainer.step_number = step
        shapes.append(tuple(trainer._draw()[0].shape))
        count, _, *size = shapes[-1]
        assert trainer.tokens(step) == count * math.prod(size) // 4**3
    usual, longer, larger = (4, 1, 4, 16, 16), (2, 1, 8, 16, 16), (2, 1, 4, 24, 24)
    assert shapes == [(6, 1, 4, 16, 16), longer, larger, usual, longer, larger]
    with pytest.raises(ValueError, match="vary_every must be 0, or at least 3; got 2"):
        Trainer(SMALL, dataclasses.replace(RUN, vary_every=2))
    with pytest.raises(ValueError, match=r"patch"):  # 30 is no multiple of a patch
        Trainer(dataclasses.replace(SMALL, size=20), config)


def test_a_run_begins_with_the_weights_of_another(tmp_path):
    first = Trainer(SMALL, RUN)
    first.step()
    first.finish(tmp_path)
    weights = TextToVideo.load(tmp_path / "model.safetensors")
    words = ("new", *reversed(SMALL.words), "words")
    trainer = Trainer(dataclasses.replace(SMALL, words=words, text_length=40, size=24), RUN)
    fresh = copy.deepcopy(trainer.model.text.state_dict())
    trainer.start_from(weights)
    for model in (trainer.model, trainer.ema):
        for name, tensor in model.state_dict().items():
            known = weights.state_dict()[name]
            if name == "text.position":
                assert torch.equal(tensor[:32], known)
                assert torch.equal(tensor[32:], fresh["position"][32:])
            elif name == "text.embedding.weight":
                assert torch.equal(tensor[:2], known[:2])
                assert torch.equal(tensor[3:-1].flip(0), known[2:])
                assert torch.equal(tensor[[2, -1]], fresh["embedding.weight"][[2, -1]])
            else:
                assert torch.equal(tensor, known), name
    x, t = torch.randn(1, 1, 4, 16, 16), torch.tensor([0.5])
    with torch.no_grad():
        text = [model.encode_text(["a seven moving left"]) for model in (weights, trainer.ema)]
        assert torch.equal(text[0][0], text[1][0])
        assert torch.equal(weights(x, t, *text[0]), trainer.ema(x, t, *text[1]))
    trainer.step()


def test_words_in_another_order_keep_their_meaning():
    words = tuple(reversed(SMALL.words))
    one, other = Trainer(SMALL, RUN), Trainer(dataclasses.replace(SMALL, words=words), RUN)
    other.start_from(one.ema)
    with torch.no_grad():
        text = [t.ema.encode_text(["a seven moving left"])[0] for t in (one, other)]
    assert torch.equal(*text)


def test_curves_and_logs_show_every_step_once(tmp_path):
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def stop(done, loss):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(Trainer(SMALL, RUN), tmp_path, stop)
    trainer = Trainer.load(tmp_path / CHECKPOINT_NAME)
    assert len(trainer.losses) == 3
    train(trainer, tmp_path)
    logs = EventAccumulator(str(tmp_path / "logs")).Reload()
    events = logs.Scalars("loss")
    assert [event.step for event in events] == list(range(6))
    assert [event.value for event in events] == pytest.approx(trainer.losses)
    with Image.open(tmp_path / "loss.png") as curve:
        assert curve.width > 400
        assert len(curve.convert("RGB").getcolors(1 << 20)) > 10


def test_checkpoints_of_the_first_version_are_read(tmp_path):
    trainer = Trainer(SMALL, RUN)
    trainer.step()
    trainer.save(tmp_path / "new")
    tensors, settings = read_checkpoint(tmp_path / "new")
    del tensors["losses"]
    for name in ("codec", "codec_fingerprint", "text_encoder", "text_length", "objective"):
        del settings["model"][name]
    for name in ("small_steps", "small_batch_size", "small_frames", "small_size", "accumulate",
                 "given_share", "vary_every", "init", "clips"):  # fmt: skip
        del settings["training"][name]
    write_checkpoint(tmp_path / "old", tensors, settings)
    old = Trainer.load(tmp_path / "old")
    assert (old.config, old.model.config, old.step_number) == (RUN, SMALL, 1)
    assert old.step() == trainer.step()
    assert TextToVideo.load(tmp_path / "old").config == SMALL


def test_bf16_is_left_out_where_a_gpu_only_emulates_it(monkeypatch):
    trainer = Trainer(SMALL, RUN)
    assert trainer._bf16()
    trainer.device = torch.device("cuda")
    for fast in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: fast)  # noqa: B023
        assert trainer._bf16() == fast
