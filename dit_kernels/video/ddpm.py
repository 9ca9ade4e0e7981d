"""Denoising diffusion with a learned variance, as in the DiT paper.

x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise for a step t of 0 ... 999. The model predicts the
noise and, in as many further channels, v: how far the logarithm of the variance of x_{t-1} given
x_t lies between its two bounds, the posterior's (v = -1) and beta_t (v = 1).
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

STEPS = 1000
FIRST_BETA, LAST_BETA = 1e-4, 0.02
LEVEL = 1 / 255  # half the distance of two of the 256 levels of a pixel in [-1, 1]


@functools.cache
def signal_levels() -> Tensor:
    """abar_t [1000], float64: the share of the signal's power at each step."""
    betas = torch.linspace(FIRST_BETA, LAST_BETA, STEPS, dtype=torch.float64)
    return torch.cumprod(1 - betas, 0)


@functools.cache
def noise_scales() -> Tensor:
    """sigma_t = sqrt((1 - abar_t) / abar_t) [1000], float64: noise over signal, rising."""
    levels = signal_levels()
    return ((1 - levels) / levels).sqrt()


def add_noise(clean: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """x_t [B, ...] for clean x_0 [B, ...] and steps t int64 [B] or, for [B, C, F, Y, X], [B, F]."""
    level = _like(signal_levels(), t, clean)
    return level.sqrt() * clean + (1 - level).sqrt() * noise


def ddpm_loss(predicted: Tensor, clean: Tensor, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """|noise - predicted noise|^2 + the variational bound in bits, for the variance alone.

    Args:
        predicted: the model's noise and v, [B, 2C, F, Y, X].
        clean, x_t, noise: [B, C, F, Y, X].
        t: steps int64 [B].

    Returns:
        float32 [B, C, F, Y, X]; its mean is the loss.

    Source: Nichol and Dhariwal, "Improved Denoising Diffusion Probabilistic Models", eqs. 4, 15 and 16;
        Peebles and Xie, "Scalable Diffusion Models with Transformers", section 3.1.
    """
    eps, v = predicted.float().chunk(2, dim=1)
    bound = variational_bound(eps.detach(), v, clean.float(), x_t.float(), t)
    return (noise.float() - eps).square() + bound


def variational_bound(eps: Tensor, v: Tensor, clean: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """Bits to say x_{t-1} with the model's Gaussian where the posterior's is known, elementwise.

    At step 0 it is the code length of a pixel of 256 levels instead.
    """
    levels = signal_levels()
    before = torch.cat((levels.new_ones(1), levels[:-1]))
    betas = 1 - levels / before
    posterior = betas * (1 - before) / (1 - levels)
    # the posterior of step 0 has no variance; step 1's stands in for it, as in the paper's code
    lower = torch.cat((posterior[1:2], posterior[1:])).log()
    clean_part = betas * before.sqrt() / (1 - levels)
    noisy_part = (1 - before) * (1 - betas).sqrt() / (1 - levels)

    def at(values: Tensor) -> Tensor:
        return _like(values, t, clean)

    share = (v + 1) / 2
    log_variance = share * at(betas.log()) + (1 - share) * at(lower)
    predicted = (x_t - at((1 - levels).sqrt()) * eps) / at(levels.sqrt())
    mean = at(clean_part) * predicted + at(noisy_part) * x_t
    true_mean = at(clean_part) * clean + at(noisy_part) * x_t
    divergence = 0.5 * (
        log_variance - at(lower) - 1
        + (at(lower) - log_variance).exp()
        + (true_mean - mean).square() * (-log_variance).exp()
    )  # fmt: skip
    code_length = -_pixel_log_likelihood(clean, mean, 0.5 * log_variance)
    first = (t == 0).view(-1, *[1] * (clean.dim() - 1))
    return torch.where(first, code_length, divergence) / math.log(2)


def _pixel_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Logarithm of a Gaussian's mass on the level of a pixel that x lies on."""
    scale = (-log_std).exp()
    above = torch.special.ndtr((x + LEVEL - mean) * scale)
    below = torch.special.ndtr((x - LEVEL - mean) * scale)
    above = torch.where(x > 1 - 2 * LEVEL, torch.ones_like(above), above)
    below = torch.where(x < -1 + 2 * LEVEL, torch.zeros_like(below), below)
    return (above - below).clamp(min=1e-12).log()


def _like(values: Tensor, t: Tensor, video: Tensor) -> Tensor:
    """values[t], float32, for broadcasting over video: t is [B] or, a time a frame, [B, F]."""
    chosen = values.to(video.device)[t].float()
    shape = (-1, *[1] * (video.dim() - 1)) if t.dim() == 1 else (len(t), 1, -1, 1, 1)
    return chosen.view(shape)
