"""A training run on the disk: checkpoints as it goes, logs, and going on after a kill.

What is trained is a `Run`: something with a step. Everything random in step i follows from the
seed and i alone, and a checkpoint holds all the rest. So a run that was killed and resumed ends
with the same weights, bit for bit, as one that was never interrupted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from dit_kernels.video.checkpoints import atomic_path, remove_unfinished

CHECKPOINT_NAME = "checkpoint.safetensors"
CURVE_NAME = "loss.png"
LOGS_NAME = "logs"


class TrainingDiverged(RuntimeError):
    """The loss is no longer a number; going on would only spoil the weights."""


class RunConfig(Protocol):
    """What every run has settings for."""

    @property
    def steps(self) -> int: ...
    @property
    def warmup_steps(self) -> int: ...
    @property
    def decay_share(self) -> float: ...
    @property
    def checkpoint_every(self) -> int: ...


class Run(Protocol):
    """What `train` needs of the thing that is trained."""

    step_number: int
    losses: list[float]

    @property
    def config(self) -> Any: ...
    def step(self) -> float: ...
    def save(self, path: str | Path) -> None: ...
    def finish(self, folder: Path) -> Path: ...


def train(
    trainer: Run,
    folder: str | Path,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> Path:
    """Train to the last step, writing checkpoints on the way and the result at the end.

    Beside `checkpoint.safetensors` the folder gets `loss.png` and, in `logs`, what TensorBoard shows.

    Args:
        trainer: new, or loaded from a checkpoint.
        folder: where to write; made if missing.
        on_step: called after each step with the number of steps done and the loss.

    Returns:
        The file of the result.

    Raises:
        TrainingDiverged: the loss is not finite; the message names the last good checkpoint.
    """
    from torch.utils.tensorboard import SummaryWriter

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / CHECKPOINT_NAME
    for name in (CHECKPOINT_NAME, CURVE_NAME):
        remove_unfinished(folder / name)  # of a process that was killed as it wrote
    config = trainer.config
    # what a killed process logged after its last checkpoint is done again, and shown once
    with SummaryWriter(str(folder / LOGS_NAME), purge_step=trainer.step_number) as logs:
        while trainer.step_number < config.steps:
            step = trainer.step_number
            try:
                loss = trainer.step()
            except TrainingDiverged as error:
                kept = f"the last good checkpoint is {checkpoint}"
                there = kept if checkpoint.is_file() else "no checkpoint was written yet"
                raise TrainingDiverged(f"{error}; {there}. Try a lower --learning-rate.") from None
            logs.add_scalar("loss", loss, step)
            logs.add_scalar("learning rate / peak", learning_rate(config, step), step)
            done = trainer.step_number
            if done % config.checkpoint_every == 0 or done == config.steps:
                trainer.save(checkpoint)
                draw_losses(folder / CURVE_NAME, trainer.losses)
                logs.flush()
            on_step(done, loss)
    return trainer.finish(folder)


def learning_rate(config: RunConfig, step: int) -> float:
    """Learning rate over its peak: a linear warm-up, level, a linear way down to zero."""
    risen = (step + 1) / config.warmup_steps
    left = (config.steps - step) / (config.decay_share * config.steps)
    return min(1.0, risen, left)


def draw_losses(path: str | Path, losses: Sequence[float]) -> Path:
    """Draw the loss of every step, faint, and its running mean, to a PNG."""
    from matplotlib.figure import Figure

    values = np.array(losses, dtype=float)
    span = max(1, len(values) // 50)
    sums = np.cumsum(np.insert(values, 0, 0.0))
    means = (sums[span:] - sums[:-span]) / span
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(values, color="0.8", linewidth=0.8, label="a step")
    axes.plot(np.arange(span - 1, len(values)), means, label=f"mean of {span} steps")
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.legend()
    axes.grid(alpha=0.3)
    path = Path(path)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return path


def random_generator(seed: int, step: int) -> torch.Generator:
    """A generator on the CPU for the random numbers of one step."""
    state = np.random.SeedSequence((seed, step)).generate_state(1)
    return torch.Generator().manual_seed(int(state[0]))


def optimizer_tensors(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, Tensor]:
    """What the optimizers remember of each parameter, as `optimizer.<parameter>.<what>`."""
    return {
        f"optimizer.{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in _state_of(parameter, optimizers).items()
    }


def load_optimizers(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], tensors: dict[str, Tensor]
) -> None:
    """Give optimizers back what `optimizer_tensors` read from them."""
    for name, parameter in model.named_parameters():
        state = part(tensors, f"optimizer.{name}.")
        # AdamW keeps its step count on the CPU, and its moments beside the parameter.
        _state_of(parameter, optimizers).update(
            {k: v if k == "step" else v.to(parameter.device) for k, v in state.items()}
        )


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it."""
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}


def settings_of(run: Run, **configs: Any) -> dict[str, Any]:
    """What a checkpoint's metadata says of a run."""
    return {name: dataclasses.asdict(config) for name, config in configs.items()} | {
        "step": run.step_number
    }


def _state_of(
    parameter: nn.Parameter, optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, Tensor]:
    for optimizer in optimizers:
        if any(parameter is one for one in optimizer.param_groups[0]["params"]):
            return optimizer.state[parameter]
    raise KeyError("no optimizer has this parameter")
