"""A causal 3D autoencoder: a clip to a small latent clip and back, frame by frame in time.

    video [B, C, 1 + st*k, sy*h, sx*w]  ->  latent [B, Z, 1 + k, h, w]

Causal: a latent frame depends on its own and earlier frames only, and the first latent frame on
the first frame alone. So a given picture is one latent frame, and a longer clip begins with the
latents of a shorter one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_kernels.video.checkpoints import read_checkpoint, write_checkpoint

SHIPPED_CODEC = Path(__file__).parent / "weights" / "codec.safetensors"


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """What is needed to build the autoencoder again; the defaults are those of the shipped one."""

    channels: int = 1
    latent_channels: int = 8
    width: int = 32  # of the first stage; each stage after it has twice as many channels
    strides: tuple[tuple[int, int, int], ...] = ((1, 2, 2), (2, 2, 2))  # (t, y, x), a stage each

    @property
    def stride(self) -> tuple[int, int, int]:
        """Frames, rows and columns of video a latent's."""
        return tuple(math.prod(axis) for axis in zip(*self.strides, strict=True))


class CausalConv3d(nn.Conv3d):
    """A convolution that sees no later frame; before the first frame it sees the first again."""

    def __init__(self, inputs: int, outputs: int, kernel: Sequence[int], stride: Any = 1) -> None:
        kt, ky, kx = kernel
        super().__init__(
            inputs, outputs, (kt, ky, kx), stride=stride, padding=(0, ky // 2, kx // 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [B, inputs, F, Y, X] -> [B, outputs, ceil(F / st), ceil(Y / sy), ceil(X / sx)]"""
        before = x[:, :, :1].expand(-1, -1, self.kernel_size[0] - 1, -1, -1)
        return super().forward(torch.cat((before, x), dim=2))


class ChannelNorm(nn.Module):
    """RMS norm over the channels of each place: a norm over time would look ahead."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, F, Y, X]"""
        scale = x.float().square().mean(1, keepdim=True).add(1e-6).rsqrt().to(x.dtype)
        return x * scale * self.weight.to(x.dtype).view(-1, 1, 1, 1)


class ResidualBlock(nn.Sequential):
    """x + convolution over time(convolution over space(x))."""

    def __init__(self, channels: int) -> None:
        super().__init__(
            ChannelNorm(channels), nn.SiLU(), CausalConv3d(channels, channels, (1, 3, 3)),
            ChannelNorm(channels), nn.SiLU(), CausalConv3d(channels, channels, (3, 1, 1)),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, F, Y, X]"""
        return x + super().forward(x)


class Upsample(nn.Module):
    """[B, inputs, 1 + k, h, w] -> [B, outputs, 1 + st*k, sy*h, sx*w]; the first frame stays one."""

    def __init__(self, inputs: int, outputs: int, stride: tuple[int, int, int]) -> None:
        super().__init__()
        self.stride = stride
        self.conv = CausalConv3d(inputs, outputs * math.prod(stride), (1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, inputs, 1 + k, h, w]"""
        st, sy, sx = self.stride
        y = self.conv(x).unflatten(1, (-1, st, sy, sx))
        y = y.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return y[:, :, st - 1 :]


class CausalAutoencoder(nn.Module):
    """encode: video in [-1, 1] to a Gaussian over latents; decode: latents to video.

    Args:
        config: sizes.
    """

    def __init__(self, config: AutoencoderConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or AutoencoderConfig()
        widths = [config.width * 2**i for i in range(len(config.strides))]
        down: list[nn.Module] = []
        for inputs, outputs, stride in zip(
            [config.channels, *widths], widths, config.strides, strict=False
        ):
            down += [CausalConv3d(inputs, outputs, (3, 3, 3), stride), ResidualBlock(outputs)]
        moments = CausalConv3d(widths[-1], 2 * config.latent_channels, (1, 1, 1))
        self.encoder = nn.Sequential(*down, ChannelNorm(widths[-1]), nn.SiLU(), moments)
        up: list[nn.Module] = [CausalConv3d(config.latent_channels, widths[-1], (1, 3, 3))]
        for inputs, outputs, stride in zip(
            widths[::-1], [*widths[-2::-1], config.channels], config.strides[::-1], strict=True
        ):
            up += [ResidualBlock(inputs), ChannelNorm(inputs), nn.SiLU()]
            up += [Upsample(inputs, outputs, stride)]
        self.decoder = nn.Sequential(*up)
        self.latent_mean: Tensor
        self.latent_std: Tensor
        # of the latents of the training clips, measured after training: a DiT wants unit variance
        self.register_buffer("latent_mean", torch.zeros(config.latent_channels))
        self.register_buffer("latent_std", torch.ones(config.latent_channels))

    def moments(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance, each [B, Z, 1 + k, h, w], of a video's latents.

        Raises:
            ValueError: a size that is not 1 + st*k frames of sy*h by sx*w pixels.
        """
        st, sy, sx = self.config.stride
        channels, frames, height, width = video.shape[1:]
        if (
            channels != self.config.channels
            or (frames - 1) % st
            or height % sy
            or width % sx
            or not min(frames, height, width)
        ):
            raise ValueError(
                f"the codec takes {self.config.channels} channels, 1 + a multiple of {st} frames, and "
                f"multiples of {sy} by {sx} pixels; got {channels} channels, {frames} frames of {height} by {width}"
            )
        mean, log_variance = self.encoder(video).float().chunk(2, dim=1)
        return mean, log_variance.clamp(-20, 10)

    def encode(self, video: Tensor) -> Tensor:
        """Latents [B, Z, 1 + k, h, w] of about unit variance, for a video in [-1, 1]."""
        mean, _ = self.moments(video)
        return (mean - _a_channel(self.latent_mean)) / _a_channel(self.latent_std)

    def decode(self, latents: Tensor) -> Tensor:
        """The video of latents from `encode`."""
        return self.decoder(
            latents * _a_channel(self.latent_std) + _a_channel(self.latent_mean)
        ).float()

    def save(self, path: str | Path, trained_with: dict[str, Any] | None = None) -> None:
        """Write the weights, in float16, and the configuration to one file."""
        tensors = {name: tensor.half() for name, tensor in self.state_dict().items()}
        settings = {"codec": dataclasses.asdict(self.config), "trained_with": trained_with}
        write_checkpoint(path, tensors, settings)

    @classmethod
    def load(cls, path: str | Path = SHIPPED_CODEC) -> CausalAutoencoder:
        """An autoencoder that `save` wrote, in float32 and evaluation mode.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file of something else.
        """
        tensors, settings = read_checkpoint(path)
        if "codec" not in settings:
            raise ValueError(f"{path} has no codec in it; `dit-kernels train-codec` writes one")
        model = cls(autoencoder_config(settings["codec"]))
        model.load_state_dict(tensors)
        return model.eval().requires_grad_(False)


def autoencoder_config(settings: dict[str, Any]) -> AutoencoderConfig:
    """The configuration that was read from JSON, where tuples have become lists."""
    strides = tuple(tuple(stride) for stride in settings["strides"])
    return AutoencoderConfig(**{**settings, "strides": strides})


def autoencoder_loss(
    video: Tensor, rebuilt: Tensor, mean: Tensor, log_variance: Tensor, kl_weight: float
) -> Tensor:
    """mean |rebuilt - video| + kl_weight * KL(latents || unit Gaussian), a mean over the latents.

    Source: Kingma and Welling, "Auto-Encoding Variational Bayes", appendix B.
    """
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return F.l1_loss(rebuilt.float(), video.float()) + kl_weight * kl


def _a_channel(values: Any) -> Tensor:
    return values.view(-1, 1, 1, 1)
