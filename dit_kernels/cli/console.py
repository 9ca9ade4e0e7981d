"""What the commands share: the app, its options, where it prints, and how it fails."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    import torch

# What to type when a library is missing: the extra that brings it.
EXTRAS = {
    "diffusers": "video", "av": "video", "PIL": "video", "transformers": "text",
    "sklearn": "train", "tensorboard": "train", "matplotlib": "train",
}  # fmt: skip

app = typer.Typer(
    add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)  # fmt: skip
output = Console()
progress_output = Console(stderr=True)


def fail(message: str) -> int:
    """Say what was wrong on one line of stderr; the exit code that goes with it."""
    print("dit-kernels: " + " ".join(message.split()), file=sys.stderr)
    return 2


def in_options(message: str, arguments: list[str]) -> str:
    """The library's message with its names of settings as the options of the command that was typed:
    `num_heads must divide hidden_size` says `--num-heads must divide --hidden-size`."""
    group: Any = typer.main.get_command(app)
    command = next((group.commands[word] for word in arguments if word in group.commands), None)
    message = message.replace("DiT: ", "")
    for parameter in command.params if command else ():
        option = next((name for name in parameter.opts if name.startswith("--")), None)
        if option is None:
            continue
        if "_" in parameter.name:  # no other word, and no part of a path
            name = rf"(?<![\w./-]){parameter.name}(?![\w/-]|\.\w)"
            message = re.sub(name, option, message)
        elif message.startswith(f"{parameter.name} must "):
            message = option + message.removeprefix(parameter.name)
    return message


def parse_size(value: Any) -> int | tuple[int, int]:
    """Height and width from "32", or "32x48"."""
    if isinstance(value, int | tuple):
        return value
    parts = value.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) for part in parts):
        raise typer.BadParameter(f"must be like 32, or 32x48 for height x width; got {value}")
    return int(parts[0]) if len(parts) == 1 else (int(parts[0]), int(parts[1]))


def parse_patch(value: Any) -> tuple[int, int, int]:
    """Frames, rows and columns of a patch from "1x2x2"."""
    if isinstance(value, tuple):
        return value
    parts = value.lower().split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) for part in parts):
        raise typer.BadParameter(f"must be like 1x2x2, frames x rows x columns; got {value}")
    return int(parts[0]), int(parts[1]), int(parts[2])


Device = Annotated[
    str, typer.Option(help="Where to compute: auto, cpu, cuda, cuda:1, ... auto is a GPU if any.")
]
Weights = Annotated[
    Path | None,
    typer.Option(
        help="A model.safetensors or checkpoint.safetensors of `dit-kernels train`, or its folder. "
        "By default the model that ships with the package."
    ),
]
Steps = Annotated[int, typer.Option(min=1, help="Denoising steps a video.")]
Guidance = Annotated[
    float, typer.Option(min=0, max=1000, help="How closely to follow the prompt; 1 is no guidance.")
]
Seed = Annotated[
    int, typer.Option(min=0, max=2**62, help="The same seed gives the same video again.")
]
SchedulerName = Annotated[
    str,
    typer.Option(help="euler (along the flow), ddim, dpm++ (DPM-Solver++) or ddpm; of diffusers."),
]
Size = Annotated[
    Any,
    typer.Option(
        parser=parse_size, metavar="N|YxX", help="Height and width in pixels: 32, or 32x48."
    ),
]
Data = Annotated[
    str,
    typer.Option(
        help="digits; or a folder of videos with a caption file beside each (cat.mp4, cat.txt); or "
        "a CSV with the columns video and caption."
    ),
]
MostDigits = Annotated[
    int, typer.Option("--digits", min=1, help="Digits in a clip: one, up to so many.")
]
Speeds = Annotated[bool, typer.Option("--speeds", help="Also digits that move slowly, or quickly.")]
HoldOut = Annotated[
    bool,
    typer.Option(
        "--hold-out",
        help="Never show ten of the forty prompts; `dit-kernels evaluate` then counts them apart.",
    ),
]
Wordings = Annotated[
    bool,
    typer.Option(
        "--wordings",
        help="Captions in 36 wordings (the digit seven drifting to the left), a fifth of which are "
        "held out; `dit-kernels evaluate` then asks in those.",
    ),
]
FrameStep = Annotated[
    int, typer.Option(min=1, help="Of a real video, take every so many-th frame.")
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume", help="Go on from the checkpoint in --out, with the settings it has in it."
    ),
]
CheckpointEvery = Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")]
Bf16 = Annotated[bool, typer.Option(help="bfloat16 autocast.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; by default torch's choice.")]


def torch_device(name: str) -> torch.device:
    """The device of a --device option.

    Raises:
        ValueError: there is no such device here.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:N; got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"there is no {name} here; `dit-kernels info` says what there is")
    return device


@contextmanager
def progress_bar(title: str, total: int) -> Iterator[Callable[..., None]]:
    """A bar on stderr, gone when done; what it yields moves it on by a number, by default 1."""
    with Progress(
        TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=progress_output, transient=True,
        disable=not progress_output.is_terminal,
    ) as progress:  # fmt: skip
        task = progress.add_task(title, total=total)
        yield lambda count=1: progress.advance(task, count)


@contextmanager
def training_bar(
    first: int, total: int, work: Callable[[int], int], unit: str
) -> Iterator[Callable[[int, float], None]]:
    """A bar with loss, speed and time left; plain lines where there is no terminal.

    Args:
        first, total: steps that are done, and steps there are.
        work: how many of `unit` a step trains on, by its number.
    """
    import time
    from datetime import timedelta

    smooth, worked, left = None, 0, sum(map(work, range(first, total)))
    began = time.monotonic()
    with Progress(
        TextColumn("training"), BarColumn(), MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}  {task.fields[rate]:,.0f} " + unit + "/s"),
        TimeElapsedColumn(), TextColumn("left {task.fields[left]}"),
        console=progress_output, disable=not progress_output.is_terminal,
    ) as progress:  # fmt: skip
        task = progress.add_task(
            "training", total=total, completed=first, loss=0.0, rate=0.0, left="?"
        )

        def on_step(done: int, loss: float) -> None:
            nonlocal smooth, worked, left
            smooth = loss if smooth is None else 0.98 * smooth + 0.02 * loss
            worked, left = worked + work(done - 1), left - work(done - 1)
            rate = worked / (time.monotonic() - began)
            seconds = round(left / rate)
            progress.update(
                task, completed=done, loss=smooth, rate=rate, left=timedelta(seconds=seconds)
            )
            if not progress_output.is_terminal and (done % 100 == 0 or done == total):
                progress_output.print(
                    f"step {done}/{total}  loss {smooth:.4f}  {rate:,.0f} {unit}/s  "
                    f"{seconds / 60:.0f} minutes left",
                    highlight=False,
                )

        yield on_step
