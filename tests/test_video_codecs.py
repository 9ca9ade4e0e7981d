"""Codecs: what they promise of shapes, scale and time; the shipped one; and training one."""

import dataclasses

import diffusers
import pytest
import torch

from dit_kernels.video.autoencoder import (
    SHIPPED_CODEC,
    AutoencoderConfig,
    CausalAutoencoder,
    autoencoder_loss,
)
from dit_kernels.video.checkpoints import read_checkpoint
from dit_kernels.video.codec_training import CodecTrainer, CodecTrainingConfig, signal_to_noise
from dit_kernels.video.codecs import Identity, open_codec
from dit_kernels.video.data import ClipsConfig
from dit_kernels.video.digits import MovingDigits
from dit_kernels.video.evaluation import score_real
from dit_kernels.video.model import ModelConfig, TextToVideo
from dit_kernels.video.runs import train
from dit_kernels.video.sampling import generate
from dit_kernels.video.training import Trainer, TrainingConfig

TINY = AutoencoderConfig(latent_channels=4, width=4)
TINY_RUN = CodecTrainingConfig(steps=4, batch_size=2, frames=3, size=16, checkpoint_every=2)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A codec's file with random weights, for colours."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("codec") / "codec.safetensors"
    CausalAutoencoder(dataclasses.replace(TINY, channels=3)).save(path)
    return path


def test_identity_is_pixels():
    codec, video = open_codec("identity", 3), torch.randn(2, 3, 4, 8, 6)
    assert codec.latent_shape(4, 8, 6) == (3, 4, 8, 6)
    assert torch.equal(codec.decode(codec.encode(video)), video)


@pytest.mark.parametrize(
    "strides",
    [((1, 2, 2), (2, 2, 2)), ((2, 2, 2), (2, 2, 1)), ((1, 4, 4),)],
    ids=["2x4x4", "4x4x2", "1x4x4"],
)
def test_a_latent_frame_depends_on_no_later_frame(strides):
    config = AutoencoderConfig(channels=3, latent_channels=5, width=4, strides=strides)
    st, sy, sx = config.stride
    model = CausalAutoencoder(config).double()
    video = torch.randn(1, 3, 1 + 3 * st, 8, 12, dtype=torch.float64)
    latents = model.encode(video)
    assert latents.shape == (1, 5, 4, 8 // sy, 12 // sx)
    rebuilt = model.decode(latents)
    assert rebuilt.shape == video.shape
    for k in range(3):
        later = video.clone()
        later[:, :, 1 + k * st :] += 1
        assert torch.equal(model.encode(later)[:, :, : k + 1], latents[:, :, : k + 1])
        assert not torch.equal(model.encode(later)[:, :, k + 1], latents[:, :, k + 1])
        torch.testing.assert_close(
            model.encode(video[:, :, : 1 + k * st]), latents[:, :, : k + 1]
        )  # a shorter clip has the same latents
        other = latents.clone()
        other[:, :, k + 1 :] += 1
        assert torch.equal(model.decode(other)[:, :, : 1 + k * st], rebuilt[:, :, : 1 + k * st])


def test_the_loss_is_the_error_plus_the_divergence_from_a_unit_gaussian():
    video, rebuilt, mean = torch.randn(3, 2, 1, 3, 4, 4)
    log_variance = torch.randn(2, 1, 3, 4, 4)
    ours = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    unit = torch.distributions.Normal(torch.zeros(()), torch.ones(()))
    kl = torch.distributions.kl_divergence(ours, unit).mean()
    expected = (video - rebuilt).abs().mean() + 0.1 * kl
    torch.testing.assert_close(autoencoder_loss(video, rebuilt, mean, log_variance, 0.1), expected)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (
            (8, 16, 16),
            "frames must be 1 more than a multiple of 2 for this codec, such as 9; got 8",
        ),
        ((9, 18, 16), "height must be a multiple of 4 for this codec; got 18"),
        ((9, 16, 2), "width must be a multiple of 4 for this codec; got 2"),
    ],
)
def test_sizes_that_a_causal_codec_cannot_take(tiny, size, message):
    with pytest.raises(ValueError, match=message):
        open_codec(str(tiny), 3).latent_shape(*size)
    with pytest.raises(ValueError, match=r"1 \+ a multiple of 2 frames"):
        open_codec(str(tiny), 3).encode(torch.zeros(1, 3, *size))


def test_the_shipped_codec_gives_held_out_digits_back():
    codec = open_codec("causal", 1)
    video, _ = MovingDigits(9, 32, split="test").batch(range(16))
    latents = codec.encode(video)
    assert latents.shape == (16, *codec.latent_shape(9, 32, 32)) == (16, 8, 5, 8, 8)
    assert 0.8 < latents.std() < 1.2
    assert abs(latents.mean()) < 0.1
    assert signal_to_noise(CausalAutoencoder.load(), video) > 30
    larger, _ = MovingDigits(17, (48, 40), split="test").batch(range(4))
    assert signal_to_noise(CausalAutoencoder.load(), larger) > 30
    score = score_real(40, frames=9, codec=codec)
    assert score.digits >= 38  # of the clips themselves the judge reads 98%
    assert score.directions == 40


def test_the_shipped_codec_comes_from_the_default_settings():
    _, settings = read_checkpoint(SHIPPED_CODEC)
    clips = ClipsConfig(**settings["trained_with"]["clips"])
    assert (
        CodecTrainingConfig(**{**settings["trained_with"], "clips": clips}) == CodecTrainingConfig()
    )
    assert CausalAutoencoder.load().config == AutoencoderConfig()


def image_codec():
    return diffusers.AutoencoderKL(
        in_channels=3, out_channels=3, down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2, block_out_channels=(8, 16), latent_channels=4,
        norm_num_groups=4, scaling_factor=0.5, shift_factor=0.1,
    )  # fmt: skip


def video_codec():
    return diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True],
        latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0],
    )  # fmt: skip


@pytest.mark.parametrize("channels", [3, 1])
def test_a_diffusers_codec_of_images_is_used_frame_by_frame(tmp_path, channels):
    module = image_codec().eval()
    module.save_pretrained(tmp_path)
    codec = open_codec(str(tmp_path), channels)
    video = torch.rand(2, channels, 3, 16, 24) * 2 - 1
    latents = codec.encode(video)
    assert latents.shape[1:] == codec.latent_shape(3, 16, 24) == (4, 3, 8, 12)
    for frame in range(3):
        with torch.no_grad():
            alone = module.encode(video[:, :, frame].expand(-1, 3, -1, -1)).latent_dist.mode()
        torch.testing.assert_close(latents[:, :, frame], (alone - 0.1) * 0.5)
    assert codec.decode(latents).shape == video.shape
    with pytest.raises(ValueError, match="can't give 3 frames of 17 by 24 back"):
        codec.latent_shape(3, 17, 24)


def test_a_diffusers_codec_of_videos(tmp_path):
    module = video_codec().eval()
    module.save_pretrained(tmp_path)
    codec = open_codec(str(tmp_path), 3)
    video = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    latents = codec.encode(video)
    assert latents.shape[1:] == codec.latent_shape(5, 16, 16) == (4, 3, 8, 8)
    with torch.no_grad():
        mode = module.encode(video).latent_dist.mode()
    mean, std = (torch.tensor(v).view(-1, 1, 1, 1) for v in ([0.1, 0.2, 0.3, 0.4], [1.0, 2, 3, 4]))
    torch.testing.assert_close(latents, (mode - mean) / std)
    with torch.no_grad():
        expected = module.decode(mode).sample
    torch.testing.assert_close(codec.decode(latents), expected)
    with pytest.raises(ValueError, match="can't give 4 frames of 16 by 16 back"):
        codec.latent_shape(4, 16, 16)


def test_what_is_no_codec_says_so(tmp_path, tiny):
    with pytest.raises(FileNotFoundError, match="--codec takes identity, causal"):
        open_codec(str(tmp_path / "none"), 1)
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(ValueError, match=r"one of diffusers' AutoencoderKL.*says UNet2DModel"):
        open_codec(str(tmp_path), 1)
    with pytest.raises(ValueError, match="is a codec for 3 channels; the videos have 1"):
        open_codec(str(tiny), 1)
    model = tmp_path / "model.safetensors"
    TextToVideo(ModelConfig(size=16, hidden_size=32, depth=1, num_heads=2)).save(model)
    with pytest.raises(ValueError, match="has no codec in it"):
        open_codec(str(model), 1)


LATENT = ModelConfig(
    codec="causal", frames=5, size=16, patch_size=(1, 2, 2), hidden_size=32, depth=1, num_heads=2,
    text_dim=32, text_depth=1,
)  # fmt: skip


def test_a_model_is_trained_and_sampled_in_latents(tmp_path):
    config = TrainingConfig(steps=2, batch_size=2, given_share=0.5, checkpoint_every=1)
    trainer = Trainer(LATENT, config)
    assert trainer.tokens(0) == 2 * 3 * 2 * 2
    path = train(trainer, tmp_path)
    assert Trainer.load(tmp_path / "checkpoint.safetensors").model.config == trainer.model.config
    model = TextToVideo.load(path)
    assert not [name for name in model.state_dict() if "codec" in name]  # it stays in its own file
    videos = generate(model, ["a one moving up"], frames=9, size=(16, 24), steps=2)
    assert videos.shape == (1, 1, 9, 16, 24)
    with pytest.raises(ValueError, match="1 more than a multiple of 2"):
        generate(model, ["a one moving up"], frames=8)
    with pytest.raises(ValueError, match="height of the codec's latents must be a multiple of 2"):
        generate(model, ["a one moving up"], size=(20, 16))


def test_given_frames_are_whole_latents(tmp_path, monkeypatch):
    model = TextToVideo(LATENT).eval()
    seen = []
    denoise = TextToVideo.denoise
    monkeypatch.setattr(
        TextToVideo,
        "denoise",
        lambda self, x, t, *rest: seen.append((x, rest[-1])) or denoise(self, x, t, *rest),
    )
    clip, _ = MovingDigits(5, 16)[0]
    for count, known in ((1, 1), (2, 1), (3, 2), (4, 2)):
        videos = generate(model, [""], steps=1, given=clip[:, :count], guidance=1)
        assert torch.equal(videos[0, :, :count], clip[:, :count])
        x, given = seen.pop()
        assert given.tolist() == [True] * known + [False] * (3 - known)
        torch.testing.assert_close(x[:, :, :known], model.codec.encode(clip[None])[:, :, :known])


def test_another_codec_than_the_one_trained_with_is_refused(tmp_path):
    codec = tmp_path / "codec.safetensors"
    CausalAutoencoder(TINY).save(codec)
    config = dataclasses.replace(LATENT, codec=str(codec))
    TextToVideo(config).save(tmp_path / "model.safetensors")
    assert TextToVideo.load(tmp_path / "model.safetensors").config.codec_fingerprint
    torch.manual_seed(1)
    CausalAutoencoder(TINY).save(codec)
    with pytest.raises(ValueError, match="trained with another codec than"):
        TextToVideo.load(tmp_path / "model.safetensors")


def test_a_codecs_loss_falls_and_its_latents_get_unit_variance(tmp_path):
    run = dataclasses.replace(
        TINY_RUN, steps=60, batch_size=4, learning_rate=5e-3, warmup_steps=5, checkpoint_every=60
    )
    trainer = CodecTrainer(TINY, run)
    path = train(trainer, tmp_path)
    assert sum(trainer.losses[-10:]) < 0.6 * sum(trainer.losses[:10])
    latents = CausalAutoencoder.load(path).encode(trainer.data.batch(range(500, 532))[0])
    assert (latents.mean((0, 2, 3, 4)).abs() < 0.3).all()
    assert ((latents.std((0, 2, 3, 4)) - 1).abs() < 0.3).all()


def test_a_resumed_codec_is_that_of_an_unbroken_run(tmp_path):
    unbroken = train(CodecTrainer(TINY, TINY_RUN), tmp_path / "unbroken")

    def stop(done, loss):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(CodecTrainer(TINY, TINY_RUN), tmp_path / "broken", stop)
    resumed = CodecTrainer.load(tmp_path / "broken" / "checkpoint.safetensors")
    assert resumed.step_number == 2
    broken = train(resumed, tmp_path / "broken")
    assert unbroken.read_bytes() == broken.read_bytes()


def test_identity_has_no_fingerprint():
    assert Identity(1).fingerprint == ""
    assert TextToVideo(ModelConfig(size=16, hidden_size=32, depth=1, num_heads=2)).config.codec_fingerprint == ""  # fmt: skip
