"""Codecs: the space a video model works in, pixels or the latents of an autoencoder.

identity          pixels
causal            the small causal autoencoder that ships with the package
codec.safetensors one that `dit-kernels train-codec` wrote
a folder          any of diffusers' AutoencoderKL*, as `save_pretrained` writes them
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dit_kernels.video.autoencoder import SHIPPED_CODEC, CausalAutoencoder

IDENTITY, CAUSAL = "identity", "causal"

Shape = tuple[int, int, int, int]


class Codec(Protocol):
    """Video in [-1, 1] to latents of about unit variance, and back."""

    fingerprint: str

    def latent_shape(self, frames: int, height: int, width: int) -> Shape:
        """(Z, f, h, w) of the latents of one clip; ValueError if the codec can't give it back."""

    def encode(self, video: Tensor) -> Tensor:
        """Latents [B, Z, f, h, w] of video [B, C, F, Y, X]."""

    def decode(self, latents: Tensor) -> Tensor:
        """Video [B, C, F, Y, X], float32, of latents."""


class Identity:
    """Pixels as they are.

    Args:
        channels: C of the videos.
    """

    fingerprint = ""

    def __init__(self, channels: int) -> None:
        self.channels = channels

    def latent_shape(self, frames: int, height: int, width: int) -> Shape:
        return self.channels, frames, height, width

    def encode(self, video: Tensor) -> Tensor:
        return video

    def decode(self, latents: Tensor) -> Tensor:
        return latents


class Frozen:
    """A network from a file, which is used but not trained: its weights stay in that file.

    It is no submodule of the model that uses it, so that they are in no checkpoint; it follows the
    tensors it is given to their device, and copies of the model share it.
    """

    module: Any

    def on(self, device: torch.device) -> Any:
        return self.module.to(device)

    def __deepcopy__(self, memo: dict[int, Any]) -> Frozen:
        return self


class CausalCodec(Frozen):
    """The causal autoencoder of `dit-kernels train-codec`.

    Args:
        path: its file.
        channels: C of the videos.
    """

    def __init__(self, path: Path, channels: int) -> None:
        self.module = autoencoder = CausalAutoencoder.load(path)
        self.fingerprint = fingerprint_of(path)
        if autoencoder.config.channels != channels:
            raise ValueError(
                f"{path} is a codec for {autoencoder.config.channels} channels; the videos have {channels}"
            )

    def latent_shape(self, frames: int, height: int, width: int) -> Shape:
        config = self.module.config
        st, sy, sx = config.stride
        check_size(frames, height, width, st, sy, sx)
        return config.latent_channels, 1 + (frames - 1) // st, height // sy, width // sx

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        return self.on(video.device).encode(video)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        return self.on(latents.device).decode(latents)


class DiffusersCodec(Frozen):
    """Any of diffusers' AutoencoderKL*: those for video as they are, those for images frame by frame.

    Args:
        path: a folder with config.json and weights, as `save_pretrained` writes it.
        channels: C of the videos; grey ones are shown to a codec for colours as grey.
    """

    def __init__(self, path: Path, channels: int) -> None:
        import diffusers

        settings = json.loads((path / "config.json").read_text())
        name = settings.get("_class_name", "")
        if not name.startswith("AutoencoderKL") or not hasattr(diffusers, name):
            raise ValueError(
                f"{path} must hold one of diffusers' AutoencoderKL*; its config.json says {name or 'nothing'}"
            )
        self.kind = getattr(diffusers, name)
        self.module = self.kind.from_pretrained(path, local_files_only=True)
        self.module.eval().requires_grad_(False)
        self.fingerprint = fingerprint_of(*sorted(path.glob("*.safetensors")))
        self.channels = channels
        config = self.module.config
        self.module_channels = config.get("in_channels", 3)
        if channels not in (1, self.module_channels):
            raise ValueError(
                f"{path} is a codec for {self.module_channels} channels; the videos have {channels}"
            )
        self.of_images = any(isinstance(m, nn.Conv2d) for m in self.module.encoder.modules())
        self.of_images &= not any(isinstance(m, nn.Conv3d) for m in self.module.modules())
        self.scale, self.shift = _statistics(config)

    @functools.lru_cache(maxsize=64)  # noqa: B019 - codecs live as long as the process
    def latent_shape(self, frames: int, height: int, width: int) -> Shape:
        with torch.device("meta"):
            double = self.kind.from_config(self.module.config).eval()  # shapes without arithmetic
        video = torch.empty(1, self.module_channels, frames, height, width, device="meta")
        try:
            latents = self._encode(double, video)
            rebuilt = self._decode(double, latents)
        except RuntimeError as error:
            raise ValueError(
                f"the codec can't take {frames} frames of {height} by {width}: {error}"
            ) from error
        if rebuilt.shape != video.shape:
            raise ValueError(
                f"the codec can't give {frames} frames of {height} by {width} back: "
                f"they come out as {rebuilt.shape[2]} of {rebuilt.shape[3]} by {rebuilt.shape[4]}"
            )
        return tuple(latents.shape[1:])  # type: ignore[return-value]

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        colours = video.expand(-1, self.module_channels, -1, -1, -1)
        latents = self._encode(self.on(video.device), colours)
        return (latents - self.shift.to(latents)) * self.scale.to(latents)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        module = self.on(latents.device)
        video = self._decode(module, latents / self.scale.to(latents) + self.shift.to(latents))
        return video.float() if self.channels > 1 else video.float().mean(1, keepdim=True)

    @torch.no_grad()
    def _encode(self, module: Any, video: Tensor) -> Tensor:
        dtype = next(module.parameters()).dtype
        if self.of_images:
            frames = module.encode(video.to(dtype).transpose(1, 2).flatten(0, 1))
            latents = frames.latent_dist.mode().unflatten(0, (video.shape[0], -1))
            return latents.transpose(1, 2).float()
        return module.encode(video.to(dtype)).latent_dist.mode().float()

    @torch.no_grad()
    def _decode(self, module: Any, latents: Tensor) -> Tensor:
        dtype = next(module.parameters()).dtype
        if self.of_images:
            frames = module.decode(latents.to(dtype).transpose(1, 2).flatten(0, 1)).sample
            return frames.unflatten(0, (latents.shape[0], -1)).transpose(1, 2)
        return module.decode(latents.to(dtype)).sample


CODEC_NAME = "codec.safetensors"  # what `dit-kernels train-codec` makes, in its folder


def open_codec(name: str, channels: int) -> Codec:
    """The codec of a name: see the top of this file.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: it holds no codec, or one for other videos.
    """
    if name == IDENTITY:
        return Identity(channels)
    path = SHIPPED_CODEC if name == CAUSAL else Path(name)
    if (path / CODEC_NAME).is_file():
        path /= CODEC_NAME
    if path.is_dir() and (path / "config.json").is_file():
        return DiffusersCodec(path, channels)
    if not path.is_file():
        raise FileNotFoundError(
            f"no codec at {path}; --codec takes {IDENTITY}, {CAUSAL}, a codec.safetensors of "
            "`dit-kernels train-codec`, or the folder of a diffusers AutoencoderKL"
        )
    return CausalCodec(path, channels)


def check_size(frames: int, height: int, width: int, st: int, sy: int, sx: int) -> None:
    """What a causal autoencoder of this stride can take.

    Raises:
        ValueError: another number of frames, or another size.
    """
    if frames < 1 or (frames - 1) % st:
        near = 1 + st * max(0, round((frames - 1) / st))
        raise ValueError(
            f"frames must be 1 more than a multiple of {st} for this codec, such as {near}; got {frames}"
        )
    for name, length, stride in (("height", height, sy), ("width", width, sx)):
        if length < stride or length % stride:
            raise ValueError(f"{name} must be a multiple of {stride} for this codec; got {length}")


def fingerprint_of(*paths: Path) -> str:
    """What tells a codec's weights from others."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def _statistics(config: Any) -> tuple[Tensor, Tensor]:
    """Scale and shift that make a diffusers codec's latents of about unit variance."""
    means, stds = config.get("latents_mean"), config.get("latents_std")
    if means is not None and stds is not None:
        return 1 / torch.tensor(stds).view(-1, 1, 1, 1), torch.tensor(means).view(-1, 1, 1, 1)
    scale = config.get("scaling_factor") or 1.0
    return torch.tensor(float(scale)), torch.tensor(float(config.get("shift_factor") or 0.0))
