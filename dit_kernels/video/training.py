"""Training by flow matching: the model sees x_t = (1 - t) x_0 + t noise and predicts x_0.

Everything random in step i (clips, noise levels, noise, dropped captions) follows from the seed
and i alone. So a run that was killed and resumed from its last checkpoint ends with the same
weights, bit for bit, as one that was never interrupted.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dit_kernels.testing import plain_torch
from dit_kernels.video.checkpoints import read_checkpoint, write_checkpoint
from dit_kernels.video.digits import MovingDigits
from dit_kernels.video.model import ModelConfig, TextToVideo, model_config

CHECKPOINT_NAME = "checkpoint.safetensors"
MODEL_NAME = "model.safetensors"

# The velocity's loss divides by t^2; below this t that would let a few clips outweigh a batch.
SMALLEST_TIME = 0.05

OPTIMIZERS = ("muon", "adamw")


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Settings of a run; the defaults made the weights that ship with the package."""

    steps: int = 11_000
    batch_size: int = 16
    optimizer: str = "muon"
    learning_rate: float = 4e-3
    warmup_steps: int = 200
    decay_share: float = 0.3
    weight_decay: float = 0.01
    gradient_norm: float = 1.0
    ema_decay: float = 0.999
    caption_dropout: float = 0.1
    time_mean: float = 1.6
    time_std: float = 1.0
    checkpoint_every: int = 200
    seed: int = 0
    bf16: bool = True


class TrainingDiverged(RuntimeError):
    """The loss is no longer a number; going on would only spoil the weights."""


def flow_matching_loss(
    predicted: torch.Tensor, clean: torch.Tensor, t: torch.Tensor
) -> torch.Tensor:
    """Mean squared error of the velocity v = noise - x_0 that a prediction of x_0 implies.

    x_t - x_0 = t v, so the velocity's error is the clean video's error over t.

    Args:
        predicted: clean video the model predicts, [B, Cin, F, Y, X].
        clean: the true one.
        t: noise level [B]; below 0.05 it counts as 0.05.

    Returns:
        A float32 scalar.

    Source: Lipman et al., "Flow Matching for Generative Modeling", eq. 23; Li and He, "Back to
        Basics: Let Denoising Generative Models Denoise", for predicting x_0 under this loss.
    """
    error = (predicted.float() - clean.float()).square().flatten(1).mean(1)
    return (error / t.clamp(min=SMALLEST_TIME).square()).mean()


class Trainer:
    """A model, its average, its optimizer and the step they are at.

    Args:
        model_config: the model.
        config: the run.
        device: where to train.
    """

    def __init__(
        self,
        model_config: ModelConfig | None = None,
        config: TrainingConfig | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self.config = config or TrainingConfig()
        self.device = torch.device(device)
        self.step_number = 0
        with torch.random.fork_rng():
            torch.manual_seed(self.config.seed)
            self.model = TextToVideo(model_config).to(self.device)
        self.ema = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.optimizers = make_optimizers(self.model, self.config)
        sizes = self.model.config
        self.data = MovingDigits(sizes.frames, sizes.size, seed=self.config.seed)

    def step(self) -> float:
        """One step of the optimizer.

        Returns:
            The loss before it.

        Raises:
            TrainingDiverged: the loss is not finite; the weights are as they were.
        """
        config = self.config
        clean, captions, t, noise = self._draw()
        x_t = torch.lerp(clean, noise, t[:, None, None, None, None])
        with (
            self._formulas(),
            torch.autocast(self.device.type, torch.bfloat16, enabled=config.bf16),
        ):
            predicted = self.model(x_t, t, *self.model.encode_text(captions))
        loss = flow_matching_loss(predicted, clean, t)
        value = loss.item()
        if not math.isfinite(value):
            raise TrainingDiverged(f"the loss became {value} at step {self.step_number}")
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.gradient_norm)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * self._rate()
            optimizer.step()
        self._average()
        self.step_number += 1
        return value

    def _formulas(self) -> contextlib.AbstractContextManager[None]:
        """A CPU has no kernels, and the reference computes its formulas again in backward: plain torch is faster."""
        return plain_torch() if self.device.type == "cpu" else contextlib.nullcontext()

    def _draw(self) -> tuple[torch.Tensor, list[str], torch.Tensor, torch.Tensor]:
        """Clean clips, captions (some dropped), noise levels and noise of this step."""
        config = self.config
        seed = np.random.SeedSequence((config.seed, self.step_number)).generate_state(1)
        generator = torch.Generator().manual_seed(int(seed[0]))
        first = self.step_number * config.batch_size
        clean, captions = self.data.batch(range(first, first + config.batch_size))
        dropped = torch.rand(config.batch_size, generator=generator) < config.caption_dropout
        captions = ["" if d else c for c, d in zip(captions, dropped.tolist(), strict=True)]
        normal = torch.randn(config.batch_size, generator=generator)
        t = torch.sigmoid(config.time_mean + config.time_std * normal)
        noise = torch.randn(clean.shape, generator=generator)
        return clean.to(self.device), captions, t.to(self.device), noise.to(self.device)

    def _rate(self) -> float:
        """Learning rate over its peak: a linear warm-up, level, a linear way down to zero."""
        config = self.config
        risen = (self.step_number + 1) / config.warmup_steps
        left = (config.steps - self.step_number) / (config.decay_share * config.steps)
        return min(1.0, risen, left)

    @torch.no_grad()
    def _average(self) -> None:
        # Early on a long average would mostly remember the random start.
        decay = min(self.config.ema_decay, (1 + self.step_number) / (10 + self.step_number))
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)

    def _state_of(self, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        """What the optimizer of a parameter remembers of it."""
        for optimizer in self.optimizers:
            if any(parameter is one for one in optimizer.param_groups[0]["params"]):
                return optimizer.state[parameter]
        raise KeyError("no optimizer has this parameter")

    def save(self, path: str | Path) -> None:
        """Write all that `load` needs to go on, in one atomic file."""
        tensors: dict[str, torch.Tensor] = {}
        for prefix, module in (("model", self.model), ("ema", self.ema)):
            tensors |= {f"{prefix}.{name}": value for name, value in module.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self._state_of(parameter).items():
                tensors[f"optimizer.{name}.{key}"] = value
        settings = {
            "model": dataclasses.asdict(self.model.config),
            "training": dataclasses.asdict(self.config),
            "step": self.step_number,
        }
        write_checkpoint(path, tensors, settings)

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> Trainer:
        """The trainer that `save` wrote, ready for its next step.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is not a training checkpoint.
        """
        tensors, settings = read_checkpoint(path)
        if not {"model", "training", "step"} <= settings.keys():
            raise ValueError(f"{path} is not a training checkpoint")
        trainer = cls(
            model_config(settings["model"]), TrainingConfig(**settings["training"]), device
        )

        def part(prefix: str) -> dict[str, torch.Tensor]:
            return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}

        trainer.model.load_state_dict(part("model."))
        trainer.ema.load_state_dict(part("ema."))
        for name, parameter in trainer.model.named_parameters():
            # AdamW keeps its step count on the CPU, and its moments beside the parameter.
            trainer._state_of(parameter).update(
                {
                    key: value if key == "step" else value.to(trainer.device)
                    for key, value in part(f"optimizer.{name}.").items()
                }
            )
        trainer.step_number = settings["step"]
        return trainer


def make_optimizers(model: TextToVideo, config: TrainingConfig) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the transformers' matrices and AdamW for the rest.

    Raises:
        ValueError: config.optimizer is neither "muon" nor "adamw".

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks"; its steps are
        scaled to AdamW's as in Liu et al., "Muon is Scalable for LLM Training", so that both take
        the same learning rate.
    """
    if config.optimizer not in OPTIMIZERS:
        raise ValueError(
            f"optimizer must be one of {', '.join(OPTIMIZERS)}; got {config.optimizer!r}"
        )
    hidden: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        in_a_block = parameter.ndim == 2 and (".blocks." in name or ".layers." in name)
        (hidden if in_a_block and config.optimizer == "muon" else others).append(parameter)
    options: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, betas=(0.9, 0.99), **options)
    ]
    if hidden:
        optimizers.append(torch.optim.Muon(hidden, adjust_lr_fn="match_rms_adamw", **options))
    return optimizers


def train(
    trainer: Trainer,
    folder: str | Path,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> Path:
    """Train to the last step, writing checkpoints on the way and the averaged model at the end.

    Args:
        trainer: new, or loaded from a checkpoint.
        folder: where `checkpoint.safetensors` and `model.safetensors` go.
        on_step: called after each step with the number of steps done and the loss.

    Returns:
        The file of the averaged model, for `TextToVideo.load`.

    Raises:
        TrainingDiverged: the loss is not finite; the message names the last good checkpoint.
    """
    folder = Path(folder)
    checkpoint = folder / CHECKPOINT_NAME
    while trainer.step_number < trainer.config.steps:
        try:
            loss = trainer.step()
        except TrainingDiverged as error:
            kept = f"the last good checkpoint is {checkpoint}"
            there = kept if checkpoint.is_file() else "no checkpoint was written yet"
            raise TrainingDiverged(f"{error}; {there}. Try a lower --learning-rate.") from None
        done = trainer.step_number
        if done % trainer.config.checkpoint_every == 0 or done == trainer.config.steps:
            trainer.save(checkpoint)
        on_step(done, loss)
    trainer.ema.save(folder / MODEL_NAME, dataclasses.asdict(trainer.config))
    return folder / MODEL_NAME
