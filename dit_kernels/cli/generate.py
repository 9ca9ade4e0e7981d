"""Commands that use a trained model: generate, evaluate, demo."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from dit_kernels.cli.console import (
    Device,
    Guidance,
    SchedulerName,
    Seed,
    Size,
    Steps,
    Weights,
    app,
    output,
    progress_bar,
    progress_output,
    torch_device,
)

if TYPE_CHECKING:
    from torch import Tensor

    from dit_kernels.video.evaluation import Score


@app.command()
def generate(
    prompts: Annotated[
        list[str],
        typer.Argument(
            metavar="PROMPT...",
            help="What to show, in the words the model was trained with. For the shipped model: "
            '"a DIGIT moving DIRECTION", where DIGIT is a word, zero to nine, and DIRECTION left, '
            'right, up or down; or in other wordings, "the digit two drifting to the left". '
            'Several prompts give several videos; an empty one, "", leaves the choice to the model.',
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
    guidance: Guidance = 3.0,
    seed: Seed = 0,
    scheduler: SchedulerName = "euler",
    frames: Annotated[
        int | None, typer.Option(min=1, help="Length of the video; by default as in training.")
    ] = None,
    size: Size = None,
    image: Annotated[
        Path | None, typer.Option(help="A picture that the video begins with, scaled to its size.")
    ] = None,
    video: Annotated[
        Path | None, typer.Option(help="A video that this one goes on from: its first frames.")
    ] = None,
    weights: Weights = None,
    device: Device = "auto",
) -> None:
    """Make a video from a caption, and from a first picture or the start of a video.

    Given frames stay as they are. A model that was trained with `--given-share` goes on from them;
    another may not.

    Examples:

    * `dit-kernels generate "a seven moving left"`
    * `dit-kernels generate "an eight moving up" --out eight.gif --seed 3`
    * `dit-kernels generate "a two moving down" "a five moving right" --out both.png`
    * `dit-kernels generate "a one moving up" --frames 16 --size 32x48 --scheduler dpm++ --steps 15`
    * `dit-kernels generate "a four moving left" --image four.png --weights runs/mine/model.safetensors`
    """
    from dit_kernels.video.files import (
        check_extension,
        check_writable,
        file_name_of,
        write_contact_sheet,
        write_video,
    )
    from dit_kernels.video.memory import check_generation
    from dit_kernels.video.model import TextToVideo, pair
    from dit_kernels.video.sampling import SCHEDULERS, check_patches, to_frames
    from dit_kernels.video.sampling import generate as generate_videos
    from dit_kernels.video.text import words_of

    # Before time is spent on a video that can't be written.
    extension = check_extension(out)
    if image is not None and video is not None:
        raise ValueError("--image and --video can't both be given: each says how the video begins")
    if scheduler not in SCHEDULERS:
        raise ValueError(f"--scheduler must be one of {', '.join(SCHEDULERS)}; got {scheduler}")
    check_writable(out)
    model = TextToVideo.load(weights).to(torch_device(device))
    config = model.config
    height_width = config.height_width if size is None else pair(size)
    for i, prompt in enumerate(prompts, start=1):
        if not words_of(prompt):
            progress_output.print(
                f"prompt {i} has no words: the model chooses what it shows", highlight=False
            )
    length = config.frames if frames is None else frames
    check_patches(model, model.codec.latent_shape(length, *height_width))
    check_generation(model, len(prompts), length, height_width, guided=guidance != 1)
    given = None
    if (source := image or video) is not None:
        given = given_frames(source, height_width, config.channels, length, image is not None)
    with progress_bar("generating", steps) as advance:
        videos = generate_videos(
            model, prompts, frames=frames, size=height_width, steps=steps, guidance=guidance,
            seed=seed, scheduler=scheduler, given=given, on_step=advance,
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


def given_frames(
    path: Path, size: tuple[int, int], channels: int, frames: int, only_first: bool
) -> Tensor:
    """The frames [C, G, Y, X] in [-1, 1] that a video of so many frames begins with.

    Raises:
        OSError, ValueError: the file can't be read, or leaves no frame to make.
    """
    import torch

    from dit_kernels.video.real_clips import read_video

    try:
        pictures = read_video(path, size, channels)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if only_first:
        pictures = pictures[:1]
    if len(pictures) >= frames:
        raise ValueError(
            f"{path} gives {len(pictures)} of {frames} frames, which leaves none to make; "
            f"ask for more with --frames"
        )
    return torch.from_numpy(pictures).permute(3, 0, 1, 2).float() / 127.5 - 1


@app.command()
def evaluate(
    count: Annotated[int, typer.Option(min=1, help="Videos to generate and judge.")] = 320,
    steps: Steps = 30,
    guidance: Guidance = 3.0,
    seed: Seed = 0,
    scheduler: SchedulerName = "euler",
    bar: Annotated[float, typer.Option(min=0, max=1, help="The share of both that passes.")] = 0.9,
    name: Annotated[
        str | None,
        typer.Option(
            help="What the tables, --json and --markdown call the model: by default shipped model, or "
            "the file of --weights."
        ),
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option(help="Also write the figures here, beside those of other models in the file."),
    ] = None,
    markdown: Annotated[
        Path | None,
        typer.Option(
            help="Also write the table of all models in --json here: between the two lines "
            "that README.md has for it, comments called evaluation, if the file has them."
        ),
    ] = None,
    weights: Weights = None,
    device: Device = "auto",
) -> None:
    """Count how often the videos show the asked digit, moving the asked way; exit code 1 below the bar.

    A model that was trained with `--wordings`, as the shipped one was, is asked in wordings that it was
    never shown. Of one that was trained with `--hold-out`, the ten prompts that it was never shown and
    the thirty others are counted apart; both have to pass.

    A support vector machine fitted on real scans, which knows nothing of the model, reads the
    digits; the direction is measured from the shift of the ink. The row for real clips, of
    handwriting that was held out, says how far the judge itself can be trusted.

    Examples:

    * `dit-kernels evaluate`
    * `dit-kernels evaluate --count 400 --guidance 4 --weights runs/digits/model.safetensors`
    * `dit-kernels evaluate --json docs/evaluation.json --markdown README.md`
    """
    from dit_kernels.video import evaluation
    from dit_kernels.video.digits import all_captions, captions_of_split, unseen_captions
    from dit_kernels.video.files import check_writable
    from dit_kernels.video.model import TextToVideo

    if markdown is not None and json is None:
        raise ValueError("--markdown writes what is in --json: give both")
    # before time is spent on figures that can't be written
    if json is not None:
        check_writable(json)
        evaluation.read_figures(json)
    if markdown is not None:
        check_writable(markdown)
        evaluation.table_place(markdown)
    model = TextToVideo.load(weights).to(torch_device(device))
    if model.data != "digits":
        raise ValueError(
            f"{weights} was trained with --data {model.data}; evaluate asks for moving digits, and can"
            " judge no other videos"
        )
    sizes = model.config
    name = name or ("shipped model" if weights is None else str(weights))
    asked = {name: all_captions()}
    if model.wordings:
        asked = {f"{name}, prompts never shown": unseen_captions()}
    if model.hold_out:
        asked = {
            f"{name}, prompts never shown": captions_of_split("test"),
            f"{name}, other prompts": captions_of_split("train"),
        }
    with progress_bar("judging", count * len(asked)) as advance:
        generated = {
            row: evaluation.score_generated(
                model, captions, count, steps=steps, guidance=guidance, seed=seed,
                scheduler=scheduler, on_videos=advance,
            )
            for row, captions in asked.items()
        }  # fmt: skip
    rows = dict(generated)
    clips: dict[str, Any] = {"frames": sizes.frames, "size": sizes.size, "seed": seed}
    if sizes.codec != "identity":
        rows["real, through the codec"] = evaluation.score_real(count, codec=model.codec, **clips)
    rows["real, held out"] = evaluation.score_real(count, **clips)
    output.print(score_table(rows))
    for row, score in generated.items():
        digits = [
            f"{digit}: {right}/{asked}"
            for digit, (right, asked) in sorted(score.digits_by_digit.items())
        ]
        output.print(f"{row}, digit by digit:  " + "  ".join(digits), highlight=False)
    if json is not None:
        settings = {"steps": steps, "guidance": guidance, "seed": seed, "scheduler": scheduler}
        figures = evaluation.write_figures(json, name, rows, settings | clips)
        if markdown is not None:
            evaluation.write_table(markdown, figures)
    worst = min(min(one.digits, one.directions) / one.total for one in generated.values())
    if worst < bar:
        output.print(f"{worst:.1%} is below the bar of {bar:.0%}", highlight=False)
        raise typer.Exit(1)


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


def score_table(scores: dict[str, Score]) -> Table:
    """A row a score: how many videos, and how many had the right digit and direction."""
    table = Table(show_edge=False)
    table.add_column("videos", overflow="fold")
    for heading, width in (("count", 5), ("digit\nas asked", 12), ("direction\nas asked", 12)):
        table.add_column(heading, no_wrap=True, min_width=width)
    for name, score in scores.items():
        table.add_row(
            name,
            str(score.total),
            f"{score.digits} ({score.digits / score.total:.1%})",
            f"{score.directions} ({score.directions / score.total:.1%})",
        )
    return table
