"""The command line: train, generate, evaluate, demo, info, check.

Imports of torch and of the extras' libraries are inside the commands, so that --help is quick.
"""

from __future__ import annotations

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
from rich.table import Table

if TYPE_CHECKING:
    import torch

    from dit_kernels.video.evaluation import Score
    from dit_kernels.video.training import Trainer

# What to type when a library is missing: the extra that brings it.
EXTRAS = {"diffusers": "video", "av": "video", "PIL": "video", "sklearn": "train"}

# What typer raises for a wrong command line; it exports only this subclass of it.
UsageError: type[BaseException] = typer.BadParameter.__mro__[1]

app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)
output = Console()
progress_output = Console(stderr=True)

Device = Annotated[
    str, typer.Option(help="Where to compute: auto, cpu, cuda, cuda:1, ... auto is a GPU if any.")
]
Weights = Annotated[
    Path | None,
    typer.Option(
        help="A model.safetensors or checkpoint.safetensors of `dit-kernels train`. "
        "By default the model that ships with the package."
    ),
]
Steps = Annotated[int, typer.Option(min=1, help="Denoising steps a video.")]
Guidance = Annotated[
    float, typer.Option(min=0, help="How closely to follow the prompt; 1 is no guidance.")
]
Seed = Annotated[int, typer.Option(min=0, help="The same seed gives the same video again.")]


def main() -> None:
    """Run the command line; wrong input ends in one line on stderr and exit code 2."""
    try:
        code = app(standalone_mode=False)
    except UsageError as error:
        code = fail(error.format_message())  # type: ignore[attr-defined]
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library not in EXTRAS:
            raise
        code = fail(
            f"this command needs {library}, which is not installed; "
            f'type: pip install "dit-kernels[{EXTRAS[library]}]"'
        )
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        code = fail(f"{error.strerror or error}{where if error.strerror else ''}")
    except (ValueError, RuntimeError) as error:
        code = fail(str(error))
    sys.exit(code or 0)


def fail(message: str) -> int:
    """Say what was wrong on one line of stderr; the exit code that goes with it."""
    print("dit-kernels: " + " ".join(message.split()), file=sys.stderr)
    return 2


@app.callback(invoke_without_command=True)
def start(context: typer.Context) -> None:
    """Fused kernels for Diffusion Transformers, and a small text-to-video model built on them.

    Start here:

    * `dit-kernels generate "a seven moving left"` makes a video from a caption
    * `dit-kernels train` trains such a model
    * `dit-kernels info` says what this machine can run, and what to type for the rest

    `dit-kernels COMMAND --help` explains a command, with examples.
    """
    if context.invoked_subcommand is None:
        output.print(context.get_help(), highlight=False)


@app.command()
def generate(
    prompts: Annotated[
        list[str],
        typer.Argument(
            metavar="PROMPT...",
            help='What to show: "a DIGIT moving DIRECTION", where DIGIT is a word, zero to nine, '
            "and DIRECTION left, right, up or down. Several prompts give several videos.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="The file to write; its ending says how: .mp4, .gif, or .png for the frames side "
            "by side. With several prompts, .mp4 and .gif get the prompt added to the name, and "
            ".png shows all in one picture."
        ),
    ] = Path("video.mp4"),
    steps: Steps = 30,
    guidance: Guidance = 2.5,
    seed: Seed = 0,
    frames: Annotated[
        int | None, typer.Option(min=1, help="Length of the video; by default as in training.")
    ] = None,
    size: Annotated[
        int | None, typer.Option(min=1, help="Height and width in pixels; default as in training.")
    ] = None,
    weights: Weights = None,
    device: Device = "auto",
) -> None:
    """Make a video from a caption.

    Examples:

    * `dit-kernels generate "a seven moving left"`
    * `dit-kernels generate "an eight moving up" --out eight.gif --seed 3`
    * `dit-kernels generate "a two moving down" "a five moving right" --out both.png`
    * `dit-kernels generate "a one moving up" --frames 16 --weights runs/digits/model.safetensors`
    """
    from dit_kernels.video.files import (
        check_extension,
        file_name_of,
        write_contact_sheet,
        write_video,
    )
    from dit_kernels.video.model import TextToVideo
    from dit_kernels.video.sampling import generate as generate_videos
    from dit_kernels.video.sampling import to_frames

    # Both before time is spent on a video that can't be written.
    extension = check_extension(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    model = TextToVideo.load(weights).to(torch_device(device))
    with progress_bar("generating", steps) as advance:
        videos = generate_videos(
            model, prompts, frames=frames, size=size, steps=steps, guidance=guidance, seed=seed,
            on_step=advance,
        )  # fmt: skip
    pictures = list(to_frames(videos))
    if extension == ".png":
        paths = [write_contact_sheet(out, pictures, prompts)]
    elif len(prompts) == 1:
        paths = [write_video(out, pictures[0])]
    else:
        names = [f"{out.stem}-{i}-{file_name_of(p)}" for i, p in enumerate(prompts, start=1)]
        paths = [
            write_video(out.with_name(name + extension), video)
            for name, video in zip(names, pictures, strict=True)
        ]
    for path in paths:
        output.print(str(path), soft_wrap=True)


@app.command()
def train(
    context: typer.Context,
    out: Annotated[
        Path, typer.Option(help="Folder for checkpoint.safetensors and model.safetensors.")
    ] = Path("runs/digits"),
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on from the checkpoint in --out, with the settings it has in it."
        ),
    ] = False,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 11_000,
    batch_size: Annotated[int, typer.Option(min=1, help="Clips a step.")] = 16,
    learning_rate: Annotated[float, typer.Option(min=0, help="Peak, after the warm-up.")] = 4e-3,
    optimizer: Annotated[
        str, typer.Option(help="muon (for the blocks' matrices; AdamW for the rest) or adamw.")
    ] = "muon",
    hidden_size: Annotated[int, typer.Option(min=1, help="Width of the DiT.")] = 128,
    depth: Annotated[int, typer.Option(min=1, help="Blocks of the DiT.")] = 4,
    num_heads: Annotated[int, typer.Option(min=1, help="Attention heads a block.")] = 4,
    frames: Annotated[int, typer.Option(min=1, help="Frames in a clip.")] = 8,
    size: Annotated[int, typer.Option(min=1, help="Height and width in pixels.")] = 32,
    caption_dropout: Annotated[
        float, typer.Option(min=0, max=1, help="Share of captions left out, for guidance.")
    ] = 0.1,
    ema_decay: Annotated[
        float, typer.Option(min=0, max=1, help="Of the averaged weights, which are the result.")
    ] = 0.999,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 200,
    seed: Annotated[int, typer.Option(min=0, help="Decides the run to the last bit.")] = 0,
    bf16: Annotated[bool, typer.Option(help="bfloat16 autocast.")] = True,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; by default torch's choice.")
    ] = None,
    device: Device = "auto",
) -> None:
    """Train a text-to-video model on moving handwritten digits.

    The defaults are the settings of the model that ships with the package. A run that was killed
    goes on with --resume and ends with the same weights as an unbroken one.

    Examples:

    * `dit-kernels train`
    * `dit-kernels train --resume`
    * `dit-kernels train --out runs/wide --hidden-size 256 --num-heads 8 --steps 20000`
    """
    import torch

    from dit_kernels.video import training
    from dit_kernels.video.model import ModelConfig

    if threads is not None:
        torch.set_num_threads(threads)
    checkpoint = out / training.CHECKPOINT_NAME
    if checkpoint.is_file() and not resume:
        raise ValueError(
            f"{checkpoint} is already there; add --resume to go on with it, or choose another --out"
        )
    model_values: dict[str, Any] = {
        "hidden_size": hidden_size, "depth": depth, "num_heads": num_heads, "frames": frames,
        "size": size,
    }  # fmt: skip
    run_values: dict[str, Any] = {
        "steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "optimizer": optimizer,
        "caption_dropout": caption_dropout, "ema_decay": ema_decay,
        "checkpoint_every": checkpoint_every, "seed": seed, "bf16": bf16,
    }  # fmt: skip
    if checkpoint.is_file():
        trainer = training.Trainer.load(checkpoint, torch_device(device))
        for config, values in (
            (trainer.model.config, model_values),
            (trainer.config, run_values),
        ):
            refuse_changes(context, config, values, checkpoint)
    else:
        out.mkdir(parents=True, exist_ok=True)  # before steps that could not be saved
        trainer = training.Trainer(
            ModelConfig(**model_values),
            training.TrainingConfig(**run_values),
            torch_device(device),
        )
    parameters = sum(p.numel() for p in trainer.model.parameters())
    output.print(
        f"{parameters:,} parameters, step {trainer.step_number:,} of {trainer.config.steps:,}, "
        f"on {trainer.device}; checkpoints in {out}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    try:
        with training_bar(trainer) as on_step:
            model_path = training.train(trainer, out, on_step)
    except KeyboardInterrupt:
        trainer.save(checkpoint)
        output.print(f"stopped after step {trainer.step_number:,}; add --resume to go on")
        raise typer.Exit(130) from None
    output.print(f"wrote {model_path}; now type:", soft_wrap=True, highlight=False)
    output.print(
        f'  dit-kernels generate "a seven moving left" --weights {model_path}\n'
        f"  dit-kernels evaluate --weights {model_path}",
        soft_wrap=True, highlight=False,
    )  # fmt: skip


@app.command()
def evaluate(
    count: Annotated[int, typer.Option(min=1, help="Videos to generate and judge.")] = 200,
    steps: Steps = 30,
    guidance: Guidance = 2.5,
    seed: Seed = 0,
    weights: Weights = None,
    device: Device = "auto",
) -> None:
    """Count how often the videos show the asked digit, moving the asked way.

    A support vector machine fitted on real scans, which knows nothing of the model, reads the
    digits; the direction is measured from the shift of the ink. The row for real clips, of
    handwriting that was held out, says how far the judge itself can be trusted.

    Examples:

    * `dit-kernels evaluate`
    * `dit-kernels evaluate --count 400 --guidance 4 --weights runs/digits/model.safetensors`
    """
    from dit_kernels.video.evaluation import score_generated, score_real
    from dit_kernels.video.model import TextToVideo

    model = TextToVideo.load(weights).to(torch_device(device))
    with progress_bar("judging", count) as advance:
        generated = score_generated(
            model, count, steps=steps, guidance=guidance, seed=seed, on_videos=advance
        )
    real = score_real(count, frames=model.config.frames, size=model.config.size, seed=seed)
    output.print(score_table({"generated": generated, "real, held out": real}))
    digits = [
        f"{digit}: {right}/{asked}"
        for digit, (right, asked) in sorted(generated.digits_by_digit.items())
    ]
    output.print("generated, digit by digit:  " + "  ".join(digits), highlight=False)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("demo"),
    device: Device = "auto",
) -> None:
    """Make several videos with the shipped model, and one picture of them all.

    Example:

    * `dit-kernels demo --out demo`
    """
    from dit_kernels.video.demo import make_demo
    from dit_kernels.video.model import TextToVideo

    out.mkdir(parents=True, exist_ok=True)
    model = TextToVideo.load().to(torch_device(device))
    with progress_bar("generating", 30) as advance:
        sheet, *videos = make_demo(model, out, on_step=advance)
    output.print(
        f"{len(videos)} videos (.mp4 and .gif) are in {out}, and all of them in one picture:\n"
        f"  {sheet}\n"
        "Now type, for example:\n"
        '  dit-kernels generate "a nine moving up" --out nine.gif\n'
        "  dit-kernels evaluate\n"
        "  dit-kernels --help",
        soft_wrap=True, highlight=False, markup=False,
    )  # fmt: skip


@app.command()
def info() -> None:
    """Say what this machine can run, and for each missing part the reason and what to type.

    Example:

    * `dit-kernels info`
    """
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from dit_kernels import backends

    versions = Table("", "version", show_edge=False)
    versions.add_row("python", sys.version.split()[0])
    for package in ("dit-kernels", "torch", "triton", "diffusers"):
        try:
            versions.add_row(package, version(package))
        except PackageNotFoundError:
            versions.add_row(package, "not installed")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(index)
            versions.add_row(
                f"GPU {index}",
                f"{found.name}, {found.total_memory / 2**30:.0f} GiB, "
                f"compute capability {found.major}.{found.minor}",
            )
    else:
        versions.add_row("GPU", "none that torch can use")
    output.print(versions)
    output.print()
    table = Table("backend", "here", "why not", "what to type", show_edge=False)
    for backend in backends.report():
        table.add_row(
            backend.name, "yes" if backend.available else "no", backend.reason, backend.fix
        )
    output.print(table)


@app.command()
def check() -> None:
    """Compare every backend that runs here with the reference; exit code 1 if one is off.

    An error is allowed up to twice that of the plain PyTorch formula in the same precision, both
    measured against float64. A row shows, of all cases of an op, the tensor that comes nearest to
    what is allowed.

    Examples:

    * `dit-kernels check`
    * `TRITON_INTERPRET=1 dit-kernels check` runs Triton's kernels too, without a GPU
    """
    from dit_kernels import check as checks

    table = Table(show_edge=False, title="error, and what is allowed", title_justify="left")
    for heading in ("op", "backend", "dtype"):
        table.add_column(heading, no_wrap=True)
    for heading in ("forward", "allowed", "backward", "allowed"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("")
    rows = list(checks.run())
    groups: dict[tuple[str, ...], dict[str, checks.Row]] = {}
    for row in rows:
        groups.setdefault((row.op, row.backend, row.dtype), {})[row.direction] = row
    for name, group in groups.items():
        cells = [
            text
            for direction in ("forward", "backward")
            for text in (f"{group[direction].error:.1e}", f"{group[direction].allowed:.1e}")
        ]
        fine = all(row.ok for row in group.values())
        table.add_row(*name, *cells, "ok" if fine else "[red]OFF[/red]")
    output.print(table)
    wrong = [row for row in rows if not row.ok]
    for row in wrong:
        output.print(
            f"{row.backend} {row.dtype}: {row.case} is off by {row.error:.2e}, allowed {row.allowed:.2e}"
        )
    output.print(
        f"{sum(row.compared for row in rows)} tensors compared, "
        + (f"{len(wrong)} rows off" if wrong else "all within what is allowed")
    )
    if wrong:
        raise typer.Exit(1)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def bench(context: typer.Context) -> None:
    """Time every op against eager PyTorch, torch.compile and the best outside kernels.

    `dit-kernels bench --help` lists the options. The suite is part of the repository, not of the
    installed package.
    """
    root = Path(__file__).parent.parent
    if not (root / "benchmarks" / "bench.py").is_file():
        raise ValueError(
            "the benchmark suite is in the repository: clone it, then type `make bench`"
        )
    sys.path.insert(0, str(root))
    from benchmarks import bench as suite

    raise typer.Exit(suite.main(context.args))


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
    except RuntimeError as error:
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:N; got {name!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"there is no {name} here; `dit-kernels info` says what there is")
    return device


def refuse_changes(
    context: typer.Context, config: object, values: dict[str, Any], checkpoint: Path
) -> None:
    """A resumed run has the checkpoint's settings; an option that says otherwise is an error."""
    for name, value in values.items():
        given = context.get_parameter_source(name)
        kept = getattr(config, name)
        if given is not None and given.name == "COMMANDLINE" and value != kept:
            option = "--" + name.replace("_", "-")
            raise ValueError(
                f"{option} {value} differs from {kept} in {checkpoint}, which --resume goes on with"
            )


def score_table(scores: dict[str, Score]) -> Table:
    """A row a score: how many videos, and how many had the right digit and direction."""
    table = Table("videos", "count", "digit as asked", "direction as asked", show_edge=False)
    for name, score in scores.items():
        table.add_row(
            name,
            str(score.total),
            f"{score.digits} ({score.digits / score.total:.1%})",
            f"{score.directions} ({score.directions / score.total:.1%})",
        )
    return table


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
def training_bar(trainer: Trainer) -> Iterator[Callable[[int, float], None]]:
    """A bar with loss, videos a second and time left; plain lines where there is no terminal."""
    import time

    total, batch_size = trainer.config.steps, trainer.config.batch_size
    smooth = None
    first, began = trainer.step_number, time.monotonic()
    with Progress(
        TextColumn("training"), BarColumn(), MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}  {task.fields[rate]:.0f} videos/s"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        console=progress_output, disable=not progress_output.is_terminal,
    ) as progress:  # fmt: skip
        task = progress.add_task("training", total=total, completed=first, loss=0.0, rate=0.0)

        def on_step(done: int, loss: float) -> None:
            nonlocal smooth
            smooth = loss if smooth is None else 0.98 * smooth + 0.02 * loss
            seconds = time.monotonic() - began
            rate = (done - first) / seconds
            progress.update(task, completed=done, loss=smooth, rate=rate * batch_size)
            if not progress_output.is_terminal and (done % 100 == 0 or done == total):
                progress_output.print(
                    f"step {done}/{total}  loss {smooth:.4f}  {rate * batch_size:.0f} videos/s  "
                    f"{(total - done) / rate / 60:.0f} minutes left",
                    highlight=False,
                )

        yield on_step
