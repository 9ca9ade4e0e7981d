"""DDPM with a learned variance: its formulas, against diffusers' scheduler and torch's Gaussians."""

import math

import pytest
import torch

from dit_kernels.video import ddpm
from dit_kernels.video.model import ModelConfig, TextToVideo
from dit_kernels.video.sampling import generate
from dit_kernels.video.training import Trainer, TrainingConfig

SMALL = ModelConfig(
    size=16, frames=4, hidden_size=32, depth=2, num_heads=2, text_dim=32, text_depth=1,
    objective="ddpm",
)  # fmt: skip


@pytest.fixture(scope="module")
def scheduler():
    from diffusers import DDPMScheduler

    return DDPMScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02, clip_sample=False)


def test_noise_is_added_as_diffusers_does(scheduler):
    clean, noise = torch.randn(2, 3, 1, 4, 2, 2)
    t = torch.tensor([0, 400, 999])
    torch.testing.assert_close(
        ddpm.add_noise(clean, t, noise), scheduler.add_noise(clean, noise, t)
    )


def test_the_bound_is_the_divergence_of_two_gaussians(scheduler):
    """Of the posterior q(x_{t-1} | x_t, x_0) and the model's, whose means the scheduler gives."""
    clean, noise, eps, v = (0.5 * torch.randn(1, 1, 2, 4, 4) for _ in range(4))
    for step in (1, 300, 999):
        t = torch.tensor([step])
        x_t = ddpm.add_noise(clean, t, noise)
        at, before = scheduler.alphas_cumprod[step], scheduler.alphas_cumprod[step - 1]
        beta = 1 - at / before
        lower = beta * (1 - before) / (1 - at)

        def mean_of(x_0, x_t=x_t, at=at, before=before, beta=beta):
            return (
                before.sqrt() * beta / (1 - at) * x_0
                + (1 - beta).sqrt() * (1 - before) / (1 - at) * x_t
            )

        guessed = (x_t - (1 - at).sqrt() * eps) / at.sqrt()
        share = (v + 1) / 2
        variance = (share * beta.log() + (1 - share) * lower.log()).exp()
        expected = torch.distributions.kl_divergence(
            torch.distributions.Normal(mean_of(clean), lower.sqrt()),
            torch.distributions.Normal(mean_of(guessed), variance.sqrt()),
        ) / math.log(2)
        bound = ddpm.variational_bound(eps, v, clean, x_t, t)
        torch.testing.assert_close(bound, expected, rtol=1e-3, atol=1e-5)


def test_the_last_step_is_a_code_length_of_256_levels():
    levels = torch.linspace(-1, 1, 256).view(1, 1, 1, 16, 16)
    t = torch.zeros(1, dtype=torch.long)
    bits = torch.stack(
        [
            ddpm.variational_bound(
                (ddpm.add_noise(level.expand_as(levels), t, torch.zeros(()))  # noise-free x_0 ...
                 - ddpm.signal_levels()[0].sqrt() * 0.1) / (1 - ddpm.signal_levels()[0]).sqrt(),
                torch.zeros_like(levels), level.expand_as(levels),
                ddpm.add_noise(level.expand_as(levels), t, torch.zeros(())), t,
            ).float()[0, 0, 0, 0, 0]  # ... and a prediction of 0.1, whatever the level is
            for level in levels.flatten()
        ]
    )  # fmt: skip
    total = (2.0**-bits).sum()
    torch.testing.assert_close(total, torch.ones(()), rtol=1e-3, atol=0)  # all levels together: 1


def test_the_variance_learns_from_the_bound_and_the_noise_does_not():
    clean, noise = torch.randn(2, 2, 1, 4, 4, 4)
    t = torch.tensor([10, 700])
    predicted = torch.randn(2, 2, 4, 4, 4, requires_grad=True)
    x_t = ddpm.add_noise(clean, t, noise)
    ddpm.ddpm_loss(predicted, clean, x_t, t, noise).sum().backward()
    eps = predicted.detach()[:, :1]
    torch.testing.assert_close(predicted.grad[:, :1], 2 * (eps - noise))
    assert (predicted.grad[:, 1:] != 0).all()


def test_a_model_learns_and_every_scheduler_samples_it():
    trainer = Trainer(SMALL, TrainingConfig(steps=60, batch_size=8, warmup_steps=10))
    losses = [trainer.step() for _ in range(60)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert trainer.model.dit.out_channels == 2
    for scheduler in ("euler", "ddim", "dpm++", "ddpm"):
        videos = generate(trainer.ema, ["a one moving up"], steps=4, scheduler=scheduler)
        assert videos.shape == (1, 1, 4, 16, 16)
        assert videos.isfinite().all()


def test_a_model_that_sees_the_noise_sees_the_clean_video():
    """denoise turns the mixture into DDPM's scale, and the noise into the clean video."""
    clean, noise = torch.randn(2, 1, 1, 4, 8, 8)
    model = TextToVideo(SMALL)
    seen = []
    model.forward = lambda x, t, *text: seen.append((x, t)) or torch.cat((noise, noise), dim=1)
    for step in (0, 500, 998):
        scale = ddpm.noise_scales()[step].float()
        t = scale / (1 + scale)
        x = (1 - t) * clean + t * noise
        guess = model.denoise(x, t, None, None)
        torch.testing.assert_close(guess, clean, rtol=1e-3, atol=1e-3)
        x_t, time = seen.pop()
        torch.testing.assert_close(x_t, ddpm.add_noise(clean, torch.tensor([step]), noise), rtol=1e-3, atol=1e-3)  # fmt: skip
        assert round(1000 * time.item()) == step
