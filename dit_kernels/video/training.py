"""Training by flow matching, or by DDPM with a learned variance as in the DiT paper.

Under flow matching the model sees x_t = (1 - t) x_0 + t noise and predicts x_0; `ddpm` has the
other's formulas. A share of the clips can have their first frames given: those stay clean, their
time is zero, and the loss is that of the frames after them.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_kernels.testing import plain_torch
from dit_kernels.video import ddpm
from dit_kernels.video.checkpoints import read_checkpoint, write_checkpoint
from dit_kernels.video.data import Clips, ClipsConfig, open_clips
from dit_kernels.video.memory import COPIES, FLOAT, check_step, check_weights
from dit_kernels.video.model import (
    FLOW,
    MODEL_NAME,
    ModelConfig,
    TextToVideo,
    model_config,
    pair,
)
from dit_kernels.video.runs import (
    CHECKPOINT_NAME,
    TrainingDiverged,
    learning_rate,
    load_optimizers,
    optimizer_tensors,
    part,
    random_generator,
    settings_of,
    train,
)
from dit_kernels.video.text import START

__all__ = [
    "CHECKPOINT_NAME",
    "MODEL_NAME",
    "SECOND_RUN",
    "SHIPPED_RUN",
    "Trainer",
    "TrainingConfig",
    "TrainingDiverged",
    "flow_matching_loss",
    "make_optimizers",
    "train",
]

# The velocity's loss divides by t^2; below this t that would let a few clips outweigh a batch.
SMALLEST_TIME = 0.1

OPTIMIZERS = ("muon", "adamw")


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Settings of a run.

    batch_size is the clips of a step, which are computed in `accumulate` parts. The first small_steps
    can be on shorter and smaller clips, more of them a step, which are learned from in less time. Of
    every vary_every of the other steps one is on clips twice as long and one on clips half as large
    again, half as many of them; 0 for none. init names the weights that the run began with.
    given_share is the share of clips whose first frames are given.
    """

    steps: int = 11_800
    batch_size: int = 32
    optimizer: str = "adamw"
    learning_rate: float = 1.5e-3
    warmup_steps: int = 200
    decay_share: float = 0.25
    weight_decay: float = 0.01
    gradient_norm: float = 1.0
    ema_decay: float = 0.999
    caption_dropout: float = 0.1
    time_mean: float = 1.6
    time_std: float = 1.0
    checkpoint_every: int = 200
    seed: int = 0
    bf16: bool = True
    small_steps: int = 0
    small_batch_size: int = 64
    small_frames: int = 4
    small_size: int | tuple[int, int] = 24
    accumulate: int = 1
    given_share: float = 0.0
    vary_every: int = 0
    init: str = ""
    clips: ClipsConfig = dataclasses.field(default_factory=ClipsConfig)


# The two runs that made the weights that ship with the package (`make weights`). Small clips have a
# third of the tokens and show as much of a digit; the large ones then teach what small ones lack: long
# motion. The second run teaches other words, lengths and sizes.
SHIPPED_RUN = TrainingConfig(small_steps=5_000, given_share=0.15)
SECOND_RUN = TrainingConfig(
    steps=4_000, learning_rate=7e-4, given_share=0.15, vary_every=4,
    init="runs/plain/model.safetensors", clips=ClipsConfig(wordings=True),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Phase:
    """The clips of a step: frames, height and width, and how many."""

    frames: int
    size: tuple[int, int]
    count: int


def flow_matching_loss(
    predicted: Tensor, clean: Tensor, t: Tensor, given: Tensor | None = None
) -> Tensor:
    """Mean squared error of the velocity v = noise - x_0 that a prediction of x_0 implies.

    x_t - x_0 = t v, so the velocity's error is the clean video's error over t.

    Args:
        predicted: clean video the model predicts, [B, Cin, F, Y, X].
        clean: the true one.
        t: noise level [B]; below 0.1 it counts as 0.1.
        given: bool [B, F], frames that are known and don't count; None for none.

    Returns:
        A float32 scalar.

    Source: Lipman et al., "Flow Matching for Generative Modeling", eq. 23; Li and He, "Back to
        Basics: Let Denoising Generative Models Denoise", for predicting x_0 under this loss.
    """
    error = mean_of_unknown((predicted.float() - clean.float()).square(), given)
    return (error / t.clamp(min=SMALLEST_TIME).square()).mean()


def mean_of_unknown(values: Tensor, given: Tensor | None) -> Tensor:
    """Mean [B] of values [B, C, F, Y, X] over the frames that are not given, bool [B, F]."""
    if given is None:
        return values.flatten(1).mean(1)
    unknown = (~given).to(values.dtype)
    return (values.mean((1, 3, 4)) * unknown).sum(1) / unknown.sum(1)


class Trainer:
    """A model, its average, its optimizer and the step they are at.

    Args:
        model_config: the model.
        config: the run.
        device: where to train.
        data: the clips that config names, if they are open already.

    Raises:
        ValueError: settings that don't go together.
    """

    def __init__(
        self,
        model_config: ModelConfig | None = None,
        config: TrainingConfig | None = None,
        device: str | torch.device = "cpu",
        data: Clips | None = None,
    ) -> None:
        self.config = config = config or TrainingConfig()
        self.device = torch.device(device)
        self.step_number = 0
        self.losses: list[float] = []
        for name in ("learning_rate", "time_mean"):
            if not math.isfinite(value := getattr(config, name)):
                raise ValueError(f"{name} must be a finite number; got {value}")
        if config.vary_every != 0 and config.vary_every < 3:
            raise ValueError(f"vary_every must be 0, or at least 3; got {config.vary_every}")
        for size in (
            config.batch_size,
            config.small_batch_size if config.small_steps else 0,
            config.batch_size // 2 if config.vary_every else 0,
        ):
            if size % config.accumulate:
                raise ValueError(
                    f"accumulate must divide the clips of a step; got {config.accumulate} and {size}"
                )
        model_config = model_config or ModelConfig()
        check_weights(model_config.hidden_size, model_config.depth, COPIES)
        with torch.random.fork_rng():
            torch.manual_seed(self.config.seed)
            self.model = TextToVideo(model_config).to(self.device)
        self.ema = copy.deepcopy(self.model).requires_grad_(False).eval()
        self.optimizers = make_optimizers(self.model, self.config)
        usual, longer, larger, small = self._phases()
        wanted = (
            [usual]
            + [longer, larger] * bool(config.vary_every)
            + [small] * bool(config.small_steps)
        )
        kinds = {longer: "clips twice as long: ", larger: "clips half as large again: "}
        kinds |= {small: "small clips: ", usual: ""}
        self._clips: dict[Phase, Clips] = {}
        for phase in wanted:
            try:
                self._patches(phase)
                check_step(
                    self.model, phase.count, config.accumulate, phase.frames, phase.size,
                    2 if self._bf16() else FLOAT,
                )  # fmt: skip
                if phase != usual or not data:
                    self._clips[phase] = self._open(phase)
            except ValueError as error:
                raise ValueError(f"{kinds[phase]}{error}") from error
        self.data = self._clips.setdefault(usual, data) if data else self._clips[usual]

    def _phases(self) -> list[Phase]:
        """The clips of most steps; where they vary, longer and larger ones; small ones."""
        config, model = self.config, self.model.config
        frames, (height, width), count = model.frames, model.height_width, config.batch_size
        half = max(1, count // 2)
        return [
            Phase(frames, (height, width), count),
            Phase(2 * frames - frames % 2, (height, width), half),
            Phase(frames, (height * 3 // 2, width * 3 // 2), half),
            Phase(config.small_frames, pair(config.small_size), config.small_batch_size),
        ]

    def _phase(self, step: int) -> Phase:
        usual, longer, larger, small = self._phases()
        if step < self.config.small_steps:
            return small
        turn = step % self.config.vary_every if self.config.vary_every else 0
        return {1: longer, 2: larger}.get(turn, usual)

    def _open(self, phase: Phase) -> Clips:
        config = self.config
        return open_clips(
            config.clips, phase.frames, phase.size, self.model.config.channels, config.seed
        )

    def tokens(self, step: int) -> int:
        """Patches that a step trains on."""
        return self._patches(self._phase(step))

    def _patches(self, phase: Phase) -> int:
        _, *latent_size = self.model.codec.latent_shape(phase.frames, *phase.size)
        return phase.count * math.prod(self.model.dit.grid(latent_size))

    def start_from(self, weights: TextToVideo) -> None:
        """Begin with another model's weights; words and places that it did not have begin as they were."""
        for model in (self.model, self.ema):
            own, known = model.state_dict(), weights.state_dict()
            for name in ("text.embedding.weight", "text.position"):
                if name in known:
                    rows = torch.arange(len(known[name]))
                    if name == "text.embedding.weight":
                        (ids,), _ = model.tokenizer([" ".join(weights.tokenizer.words)])
                        rows[START + 1 :] = ids[1:]
                    known[name] = own[name].index_copy(
                        0, rows.to(self.device), known[name].to(self.device)
                    )
            if (
                "dit.pos_embed" in known
                and known["dit.pos_embed"].shape != own["dit.pos_embed"].shape
            ):
                known["dit.pos_embed"] = own["dit.pos_embed"]  # a table of the size
            model.load_state_dict(known)

    def step(self) -> float:
        """One step of the optimizer.

        Returns:
            The loss before it.

        Raises:
            TrainingDiverged: the loss is not finite; the weights are as they were.
        """
        config = self.config
        self.model.zero_grad(set_to_none=True)
        value = 0.0
        clean, captions, t, noise, given = self._draw()
        for rows in torch.arange(len(clean)).chunk(config.accumulate):
            some = slice(int(rows[0]), int(rows[-1]) + 1)
            loss = self._loss(
                clean[some], captions[some], t[some], noise[some],
                None if given is None else given[some],
            ) / config.accumulate  # fmt: skip
            value += loss.item()
            if not math.isfinite(value):
                raise TrainingDiverged(f"the loss became {value} at step {self.step_number}")
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.gradient_norm)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * self._rate()
            optimizer.step()
        self._average()
        self.step_number += 1
        self.losses.append(value)
        return value

    def _loss(
        self, clean: Tensor, captions: list[str], t: Tensor, noise: Tensor, given: Tensor | None
    ) -> Tensor:
        flow = self.model.config.objective == FLOW
        if flow:
            x_t = torch.lerp(clean, noise, t[:, None, None, None, None])
        else:
            x_t = ddpm.add_noise(clean, t, noise)
        if given is not None:
            x_t = torch.where(given[:, None, :, None, None], clean, x_t)
        level = t if flow else t / ddpm.STEPS
        with (
            self._formulas(),
            torch.autocast(self.device.type, torch.bfloat16, enabled=self._bf16()),
        ):
            predicted = self.model(
                x_t, self.model.patch_times(level, given), *self.model.encode_text(captions)
            )
        if flow:
            return flow_matching_loss(predicted, clean, t, *([] if given is None else [given]))
        return mean_of_unknown(ddpm.ddpm_loss(predicted, clean, x_t, t, noise), given).mean()

    def _bf16(self) -> bool:
        """Whether to use bfloat16: not on a GPU that only emulates it."""
        fast = self.device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
        return self.config.bf16 and fast

    def _formulas(self) -> contextlib.AbstractContextManager[None]:
        """A CPU has no kernels, and the reference computes its formulas again in backward: plain torch is faster."""
        return plain_torch() if self.device.type == "cpu" else contextlib.nullcontext()

    def _draw(self) -> tuple[Tensor, list[str], Tensor, Tensor, Tensor | None]:
        """Clean latents, captions (some dropped), noise levels or steps, noise and given frames of this step."""
        config = self.config
        generator = random_generator(config.seed, self.step_number)
        phase = self._phase(self.step_number)
        count = phase.count
        first = self.step_number * count
        video, captions = self._clips[phase].batch(range(first, first + count))
        clean = self.model.codec.encode(video.to(self.device))
        dropped = torch.rand(count, generator=generator) < config.caption_dropout
        captions = ["" if d else c for c, d in zip(captions, dropped.tolist(), strict=True)]
        if self.model.config.objective == FLOW:
            normal = torch.randn(count, generator=generator)
            t = torch.sigmoid(config.time_mean + config.time_std * normal)
        else:
            t = torch.randint(ddpm.STEPS, (count,), generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        given = None
        if config.given_share and clean.shape[2] > 1:
            given = self._draw_given(count, clean.shape[2], generator).to(self.device)
        return clean, captions, t.to(self.device), noise.to(self.device), given

    def _draw_given(self, batch: int, frames: int, generator: torch.Generator) -> Tensor:
        """Which frames are given, bool [B, f]: none, the first (as often as not), or more."""
        with_given = torch.rand(batch, generator=generator) < self.config.given_share
        only_first = torch.rand(batch, generator=generator) < 0.5
        some = torch.randint(1, frames, (batch,), generator=generator)
        count = torch.where(only_first, torch.ones_like(some), some) * with_given
        return torch.arange(frames) < count[:, None]

    def _rate(self) -> float:
        """Learning rate over its peak."""
        return learning_rate(self.config, self.step_number)

    @torch.no_grad()
    def _average(self) -> None:
        # Early on a long average would mostly remember the random start.
        decay = min(self.config.ema_decay, (1 + self.step_number) / (10 + self.step_number))
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)

    def save(self, path: str | Path) -> None:
        """Write all that `load` needs to go on, in one atomic file."""
        tensors: dict[str, Tensor] = {}
        for prefix, module in (("model", self.model), ("ema", self.ema)):
            tensors |= {f"{prefix}.{name}": value for name, value in module.state_dict().items()}
        tensors |= optimizer_tensors(self.model, self.optimizers)
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        settings = settings_of(self, model=self.model.config, training=self.config)
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
            model_config(settings["model"]), training_config(settings["training"]), device
        )
        trainer.model.load_state_dict(part(tensors, "model."))
        trainer.ema.load_state_dict(part(tensors, "ema."))
        load_optimizers(trainer.model, trainer.optimizers, tensors)
        trainer.step_number = settings["step"]
        # checkpoints of the first version have no losses
        trainer.losses = tensors.get("losses", torch.empty(0)).tolist()
        return trainer

    def finish(self, folder: Path) -> Path:
        """Write the averaged model, for `TextToVideo.load`."""
        self.ema.save(folder / MODEL_NAME, dataclasses.asdict(self.config))
        return folder / MODEL_NAME


def training_config(settings: dict[str, Any]) -> TrainingConfig:
    """The settings that were read from JSON; what an older version had not is as it was then."""
    clips = ClipsConfig(**settings.get("clips", {}))
    size = settings.get("small_size", TrainingConfig.small_size)
    size = tuple(size) if isinstance(size, list) else size
    return TrainingConfig(**{**settings, "clips": clips, "small_size": size})


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
