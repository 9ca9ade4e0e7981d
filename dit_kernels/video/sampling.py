"""From captions to videos: noise is denoised step by step, guided by the caption.

The model says what clean video it sees; a scheduler of diffusers takes the step. Each scheduler
works on x = signal * clean + noise * eps in its own scale; the model is always shown
(1 - t) clean + t eps of the same share of noise, so that every scheduler serves every model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_kernels.video.model import TextToVideo, pair
from dit_kernels.video.runs import random_generator

# Spends more of the steps near noise, where the digit and its way are decided.
SHIFT = 3.0

EULER, DDIM, DPM, ANCESTRAL = "euler", "ddim", "dpm++", "ddpm"
SCHEDULERS = {
    EULER: "Euler steps along the flow",
    DDIM: "DDIM",
    DPM: "DPM-Solver++, second order",
    ANCESTRAL: "DDPM, with fresh noise each step",
}


@torch.no_grad()
def generate(
    model: TextToVideo,
    captions: Sequence[str],
    *,
    frames: int | None = None,
    size: int | tuple[int, int] | None = None,
    steps: int = 30,
    guidance: float = 3.0,
    seed: int = 0,
    scheduler: str = EULER,
    given: Tensor | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> Tensor:
    """One video a caption.

    Args:
        model: see `TextToVideo.load`.
        captions: B captions; "" leaves the choice to the model.
        frames: length of the videos; None for the length the model was trained with.
        size: height and width, one number for both; None for the training size.
        steps: evaluations of the model a video.
        guidance: 1 follows the model's own estimate; more follows the caption more closely.
        seed: video i starts from the noise of seed + i, whatever else is in the batch.
        scheduler: "euler", "ddim", "dpm++" or "ddpm".
        given: the first frames of every video, [C, G, Y, X] in [-1, 1], with G < frames; their time is
            zero while the others are denoised, and they come back as they are.
        on_step: called after each of the steps.

    Returns:
        Videos [B, C, F, Y, X], float32 in [-1, 1].

    Raises:
        ValueError: an unknown word, or a size, length, scheduler or number of steps that can't be served.

    Source: Ho and Salimans, "Classifier-Free Diffusion Guidance"; the Euler schedule is that of Esser
        et al., "Scaling Rectified Flow Transformers", eq. 23, by diffusers.
    """
    config = model.config
    frames = config.frames if frames is None else frames
    height, width = config.height_width if size is None else pair(size)
    if steps < 1:
        raise ValueError(f"steps must be at least 1; got {steps}")
    latent_shape = model.codec.latent_shape(frames, height, width)
    check_patches(model, latent_shape)
    known, clean = _given_latents(model, given, (frames, height, width), latent_shape)

    guided = guidance != 1
    text, mask = model.encode_text([*captions, *[""] * len(captions)] if guided else captions)
    path = _Path(scheduler, steps, model.device)
    x = initial_noise(len(captions), latent_shape, seed).to(model.device)
    # fresh noise of a video, too, depends on its own seed alone
    generators = [random_generator(seed + i, 1) for i in range(len(x))]
    for step in range(path.steps):
        level, scale = path.level(step), path.scale(step)
        seen = x * scale
        if clean is not None:
            seen = torch.where(known.view(-1, 1, 1), clean, seen)
        twice = torch.cat([seen, seen]) if guided else seen
        guess = model.denoise(twice, level, text, mask, None if clean is None else known)
        if guided:
            conditional, unconditional = guess.chunk(2)
            guess = unconditional + guidance * (conditional - unconditional)
        x = path.step(step, guess, x, generators)
        on_step()
    if clean is not None:
        x = torch.where(known.view(-1, 1, 1), clean, x)
    videos = model.codec.decode(x).clamp(-1, 1)
    if given is not None:
        videos[:, :, : given.shape[1]] = given.to(
            videos
        )  # exactly, whatever the codec made of them
    return videos


def check_patches(model: TextToVideo, latent_shape: Sequence[int]) -> None:
    """Whether the model's patch divides a clip's latents.

    Raises:
        ValueError: it does not.
    """
    size = latent_shape[1:]
    video = model.codec.latent_shape(model.config.frames, *model.config.height_width)
    pixels = model.config.frames, *model.config.height_width
    names = ("frames", "height", "width")
    for name, length, patch, latent, full in zip(
        names, size, model.config.patch_size, video[1:], pixels, strict=True
    ):
        if length < patch or length % patch:
            if latent == full:
                raise ValueError(
                    f"{name} must be a multiple of {patch}, the model's patch; got {length}"
                )
            raise ValueError(
                f"{name} of the codec's latents must be a multiple of {patch}, the model's patch; got {length}"
            )


def _given_latents(
    model: TextToVideo, given: Tensor | None, size: Sequence[int], latent_shape: Sequence[int]
) -> tuple[Tensor, Tensor | None]:
    """Which latent frames are known, bool [f], and latents [Z, f, h, w] that hold them."""
    known = torch.zeros(latent_shape[1], dtype=torch.bool, device=model.device)
    if given is None:
        return known, None
    expected = (model.config.channels, *size[1:])
    if (given.shape[0], *given.shape[2:]) != expected or not 0 < given.shape[1] < size[0]:
        raise ValueError(
            f"given must be [{expected[0]}, G, {expected[1]}, {expected[2]}] with 0 < G < {size[0]} frames; "
            f"got {list(given.shape)}"
        )
    # A codec takes some lengths only; given frames past the last of those are kept, but not seen.
    for count in range(given.shape[1], 0, -1):
        try:
            latent_frames = model.codec.latent_shape(count, *size[1:])[1]
        except ValueError:
            continue
        clean = torch.zeros(latent_shape, device=model.device)
        clean[:, :latent_frames] = model.codec.encode(given[None, :, :count].to(model.device))[0]
        known[:latent_frames] = True
        return known, clean
    raise ValueError(f"the codec can't take a clip of the {given.shape[1]} given frames, or fewer")


class _Path:
    """A scheduler of diffusers, as levels of noise and steps between them."""

    def __init__(self, name: str, steps: int, device: torch.device) -> None:
        import diffusers

        if name not in SCHEDULERS:
            raise ValueError(f"scheduler must be one of {', '.join(SCHEDULERS)}; got {name!r}")
        self.name = name
        self.scheduler: Any  # diffusers hides its methods
        if name == EULER:
            self.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=SHIFT)
            self.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), device=device)
        else:
            options = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "prediction_type": "sample", "timestep_spacing": "trailing"}  # fmt: skip
            if name == DPM:
                options |= {"algorithm_type": "dpmsolver++", "final_sigmas_type": "zero"}
                self.scheduler = diffusers.DPMSolverMultistepScheduler(**options)
            elif name == DDIM:
                self.scheduler = diffusers.DDIMScheduler(clip_sample=False, **options)
            else:
                self.scheduler = diffusers.DDPMScheduler(clip_sample=False, **options)
            if steps > len(self.scheduler.betas):
                raise ValueError(f"steps must be at most 1000 for {name}; got {steps}")
            self.scheduler.set_timesteps(steps, device=device)
        self.steps = len(self.scheduler.timesteps)

    def level(self, step: int) -> Tensor:
        """Noise over signal and noise, t in (0, 1]."""
        if self.name == EULER:
            return self.scheduler.sigmas[step]
        ratio = self._ratio(step)
        return (ratio / (1 + ratio)).float()

    def scale(self, step: int) -> Tensor | float:
        """What turns the scheduler's x into (1 - t) clean + t noise."""
        if self.name == EULER:
            return 1.0
        ratio = self._ratio(step)
        return ((1 + ratio.square()).sqrt() / (1 + ratio)).float()

    def step(
        self, step: int, clean: Tensor, x: Tensor, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """x of the next level, given the clean video that the model sees in this one's."""
        timestep = self.scheduler.timesteps[step]
        if self.name == EULER:
            clean = (x - clean) / self.scheduler.sigmas[step]  # a velocity
        options = {"generator": list(generators)} if self.name == ANCESTRAL else {}
        return self.scheduler.step(clean, timestep, x, return_dict=False, **options)[0]

    def _ratio(self, step: int) -> Tensor:
        """sigma_t: noise over signal."""
        level = self.scheduler.alphas_cumprod[self.scheduler.timesteps[step].long().cpu()].double()
        return ((1 - level) / level).sqrt().to(self.scheduler.timesteps.device)


def initial_noise(count: int, shape: tuple[int, ...], seed: int) -> Tensor:
    """Noise [count, *shape]; row i depends on seed + i alone, on every device."""
    rows = [
        torch.randn(shape, generator=torch.Generator().manual_seed(seed + i)) for i in range(count)
    ]
    return torch.stack(rows) if rows else torch.empty(0, *shape)


def to_frames(videos: Tensor) -> Tensor:
    """Videos [B, 1 or 3, F, Y, X] in [-1, 1] as pictures [B, F, Y, X, 3] uint8."""
    colours = videos.expand(-1, 3, -1, -1, -1).permute(0, 2, 3, 4, 1)
    return ((colours.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
