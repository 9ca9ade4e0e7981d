"""From captions to videos: noise is denoised along the flow, guided by the caption."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from dit_kernels.video.model import TextToVideo

# Spends more of the steps near noise, where the digit and its way are decided.
SHIFT = 3.0


@torch.no_grad()
def generate(
    model: TextToVideo,
    captions: Sequence[str],
    *,
    frames: int | None = None,
    size: int | tuple[int, int] | None = None,
    steps: int = 30,
    guidance: float = 2.5,
    seed: int = 0,
    on_step: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """One video a caption.

    Args:
        model: see `TextToVideo.load`.
        captions: B captions; "" leaves the choice to the model.
        frames: length of the videos; None for the length the model was trained with.
        size: height and width, one number for both; None for the training size.
        steps: evaluations of the model a video.
        guidance: 1 follows the model's own estimate; more follows the caption more closely.
        seed: video i starts from the noise of seed + i, whatever else is in the batch.
        on_step: called after each of the steps.

    Returns:
        Videos [B, Cin, F, Y, X], float32 in [-1, 1].

    Raises:
        ValueError: an unknown word, or a size, length or number of steps that can't be served.

    Source: Ho and Salimans, "Classifier-Free Diffusion Guidance"; the schedule is that of Esser et
        al., "Scaling Rectified Flow Transformers", eq. 23, by diffusers.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    config = model.config
    frames = config.frames if frames is None else frames
    size = config.size if size is None else size
    shape = (frames, *((size, size) if isinstance(size, int) else size))
    for name, length, patch in zip(
        ("frames", "height", "width"), shape, config.patch_size, strict=True
    ):
        if length < patch or length % patch:
            raise ValueError(
                f"{name} must be a multiple of {patch}, the model's patch; got {length}"
            )
    if steps < 1:
        raise ValueError(f"steps must be at least 1; got {steps}")

    device = model.text.position.device
    guided = guidance != 1
    text, mask = model.encode_text([*captions, *[""] * len(captions)] if guided else captions)
    x = initial_noise(len(captions), (config.channels, *shape), seed).to(device)
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=SHIFT)  # diffusers hides its methods
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), device=device)
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        twice = torch.cat([x, x]) if guided else x
        clean = model(twice, sigma.expand(len(twice)), text, mask).float()
        if guided:
            conditional, unconditional = clean.chunk(2)
            clean = unconditional + guidance * (conditional - unconditional)
        velocity = (x - clean) / sigma
        x = scheduler.step(velocity, timestep, x, return_dict=False)[0]
        on_step()
    return x.clamp(-1, 1)


def initial_noise(count: int, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Noise [count, *shape]; row i depends on seed + i alone, on every device."""
    rows = [
        torch.randn(shape, generator=torch.Generator().manual_seed(seed + i)) for i in range(count)
    ]
    return torch.stack(rows) if rows else torch.empty(0, *shape)


def to_frames(videos: torch.Tensor) -> torch.Tensor:
    """Videos [B, 1 or 3, F, Y, X] in [-1, 1] as pictures [B, F, Y, X, 3] uint8."""
    colours = videos.expand(-1, 3, -1, -1, -1).permute(0, 2, 3, 4, 1)
    return ((colours.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
