"""Training of the causal autoencoder: `dit-kernels train-codec`."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import torch
from torch import Tensor

from dit_kernels.video.autoencoder import (
    AutoencoderConfig,
    CausalAutoencoder,
    autoencoder_config,
    autoencoder_loss,
)
from dit_kernels.video.checkpoints import read_checkpoint, write_checkpoint
from dit_kernels.video.codecs import CODEC_NAME, check_size
from dit_kernels.video.data import ClipsConfig, open_clips
from dit_kernels.video.memory import check_clips
from dit_kernels.video.runs import (
    TrainingDiverged,
    learning_rate,
    load_optimizers,
    optimizer_tensors,
    part,
    random_generator,
    settings_of,
)

# Clips that the result is measured with, past all that training could ask for.
MEASURED = range(1_000_000_000, 1_000_000_128)


@dataclasses.dataclass(frozen=True)
class CodecTrainingConfig:
    """Settings of a run; the defaults made the codec that ships with the package."""

    steps: int = 1200
    batch_size: int = 8
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    decay_share: float = 0.5
    weight_decay: float = 0.01
    gradient_norm: float = 1.0
    kl_weight: float = 1e-3
    checkpoint_every: int = 200
    frames: int = 9
    size: int | tuple[int, int] = 32
    seed: int = 0
    bf16: bool = True
    clips: ClipsConfig = dataclasses.field(default_factory=ClipsConfig)


class CodecTrainer:
    """An autoencoder, its optimizer and the step they are at.

    Args:
        autoencoder: its sizes; the clips have as many channels.
        config: the run.
        device: where to train.
    """

    def __init__(
        self,
        autoencoder: AutoencoderConfig | None = None,
        config: CodecTrainingConfig | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self.config = config = config or CodecTrainingConfig()
        self.device = torch.device(device)
        self.step_number = 0
        self.losses: list[float] = []
        autoencoder = autoencoder or AutoencoderConfig()
        size = (config.size, config.size) if isinstance(config.size, int) else config.size
        check_size(config.frames, *size, *autoencoder.stride)
        check_clips(config.batch_size, config.frames, size, autoencoder.channels)
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            self.model = CausalAutoencoder(autoencoder).to(self.device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.learning_rate, betas=(0.9, 0.99),
            weight_decay=config.weight_decay,
        )  # fmt: skip
        self.data = open_clips(
            config.clips, config.frames, config.size, self.model.config.channels, config.seed
        )

    def step(self) -> float:
        """One step of the optimizer.

        Returns:
            The loss before it.

        Raises:
            TrainingDiverged: the loss is not finite; the weights are as they were.
        """
        config = self.config
        first = self.step_number * config.batch_size
        video = self.data.batch(range(first, first + config.batch_size))[0].to(self.device)
        generator = random_generator(config.seed, self.step_number)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.bf16):
            mean, log_variance = self.model.moments(video)
            noise = torch.randn(mean.shape, generator=generator).to(self.device)
            rebuilt = self.model.decoder(mean + (0.5 * log_variance).exp() * noise)
        loss = autoencoder_loss(video, rebuilt, mean, log_variance, config.kl_weight)
        value = loss.item()
        if not math.isfinite(value):
            raise TrainingDiverged(f"the loss became {value} at step {self.step_number}")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.gradient_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * learning_rate(config, self.step_number)
        self.optimizer.step()
        self.step_number += 1
        self.losses.append(value)
        return value

    @torch.no_grad()
    def finish(self, folder: Path) -> Path:
        """Measure the latents, so that `encode` gives unit variance, and write codec.safetensors."""
        latents = torch.cat(
            [
                self.model.moments(self.data.batch(MEASURED[i : i + 16])[0].to(self.device))[0]
                for i in range(0, len(MEASURED), 16)
            ]
        )
        self.model.latent_mean[:] = latents.mean((0, 2, 3, 4))
        self.model.latent_std[:] = latents.std((0, 2, 3, 4)).clamp(min=1e-3)
        path = folder / CODEC_NAME
        self.model.save(path, dataclasses.asdict(self.config))
        return path

    def save(self, path: str | Path) -> None:
        """Write all that `load` needs to go on, in one atomic file."""
        tensors: dict[str, Tensor] = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= optimizer_tensors(self.model, [self.optimizer])
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        settings = settings_of(self, codec=self.model.config, training=self.config)
        write_checkpoint(path, tensors, settings)

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> CodecTrainer:
        """The trainer that `save` wrote, ready for its next step.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is not a checkpoint of a codec's training.
        """
        tensors, settings = read_checkpoint(path)
        if not {"codec", "training", "step"} <= settings.keys():
            raise ValueError(f"{path} is not a checkpoint of `dit-kernels train-codec`")
        values = settings["training"]
        values["clips"] = ClipsConfig(**values["clips"])
        if isinstance(values["size"], list):
            values["size"] = tuple(values["size"])
        trainer = cls(autoencoder_config(settings["codec"]), CodecTrainingConfig(**values), device)
        trainer.model.load_state_dict(part(tensors, "model."))
        load_optimizers(trainer.model, [trainer.optimizer], tensors)
        trainer.losses = tensors["losses"].tolist()
        trainer.step_number = settings["step"]
        return trainer


@torch.no_grad()
def signal_to_noise(codec: CausalAutoencoder, video: Tensor) -> float:
    """Peak signal to noise ratio, in decibels, of clips in [-1, 1] that went through the codec."""
    error = (codec.decode(codec.encode(video)).clamp(-1, 1) - video).square().mean()
    return float(10 * torch.log10(4 / error))
