"""Commands that train: train, train-codec."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dit_kernels.cli.console import (
    Bf16,
    CheckpointEvery,
    Data,
    Device,
    FrameStep,
    HoldOut,
    MostDigits,
    Resume,
    Size,
    Speeds,
    Threads,
    Wordings,
    app,
    output,
    parse_patch,
    torch_device,
    training_bar,
)

if TYPE_CHECKING:
    from dit_kernels.video.data import Clips, ClipsConfig
    from dit_kernels.video.model import ModelConfig
    from dit_kernels.video.runs import Run


PLAIN: dict[str, Any] = {"soft_wrap": True, "highlight": False, "markup": False}

# What differs by default in the latents of a codec.
LATENT: dict[str, Any] = {"frames": 9, "patch_size": (1, 2, 2)}


@app.command()
def train(
    context: typer.Context,
    out: Annotated[
        Path, typer.Option(help="Folder for checkpoint.safetensors and model.safetensors.")
    ] = Path("runs/digits"),
    resume: Resume = False,
    init: Annotated[
        Path | None,
        typer.Option(
            help="Begin with the weights of another run's model.safetensors, which decide the size "
            "of the model; or shipped, the model of the package."
        ),
    ] = None,
    data: Data = "digits",
    digits: MostDigits = 1,
    speeds: Speeds = False,
    hold_out: HoldOut = False,
    wordings: Wordings = False,
    frame_step: FrameStep = 1,
    frames: Annotated[
        int | None,
        typer.Option(min=1, help="Frames in a clip; 8, or 9 in a codec's latents, by default."),
    ] = None,
    size: Size = 32,
    codec: Annotated[
        str,
        typer.Option(
            help="The space to work in: identity (pixels); causal, the latents of the autoencoder "
            "that ships with the package; a codec.safetensors of `dit-kernels train-codec`; or the "
            "folder of one of diffusers' AutoencoderKL."
        ),
    ] = "identity",
    text_encoder: Annotated[
        str,
        typer.Option(
            help="words, a small encoder trained with the model; or the folder of a pretrained one "
            "(T5, CLIP, ... of transformers), used as it is."
        ),
    ] = "words",
    text_mode: Annotated[
        str,
        typer.Option(
            help="How the DiT takes the caption: pooled (one vector), cross (attention to its words "
            "in every block) or joint (its words in the sequence)."
        ),
    ] = "pooled",
    objective: Annotated[
        str, typer.Option(help="flow (matching), or ddpm with a learned variance.")
    ] = "flow",
    given_share: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="Share of clips whose first frames are given, for --image and --video.",
        ),
    ] = 0.15,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 11_800,
    batch_size: Annotated[int, typer.Option(min=1, help="Clips a step.")] = 32,
    small_steps: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="First so many steps on small clips, which are quicker; 5000 by default for the "
            "shipped model, none where --data, --frames, --size, --codec or --steps differ from its.",
        ),
    ] = None,
    small_batch_size: Annotated[int, typer.Option(min=1, help="Small clips a step.")] = 64,
    small_frames: Annotated[int, typer.Option(min=1, help="Frames in a small clip.")] = 4,
    small_size: Size = 24,
    vary_every: Annotated[
        int,
        typer.Option(
            min=0,
            help="Of every so many steps, one on clips twice as long and one on clips half as large "
            "again, for videos of other sizes; 0 for none.",
        ),
    ] = 0,
    accumulate: Annotated[
        int, typer.Option(min=1, help="Parts that a step's clips are computed in, to save memory.")
    ] = 1,
    learning_rate: Annotated[float, typer.Option(min=0, help="Peak, after the warm-up.")] = 1.5e-3,
    warmup_steps: Annotated[int, typer.Option(min=1, help="Steps of the warm-up.")] = 200,
    optimizer: Annotated[
        str, typer.Option(help="muon (for the blocks' matrices; AdamW for the rest) or adamw.")
    ] = "adamw",
    hidden_size: Annotated[int, typer.Option(min=1, help="Width of the DiT.")] = 128,
    depth: Annotated[int, typer.Option(min=1, help="Blocks of the DiT.")] = 4,
    num_heads: Annotated[int, typer.Option(min=1, help="Attention heads a block.")] = 4,
    patch_size: Annotated[
        Any,
        typer.Option(
            parser=parse_patch,
            metavar="TxYxX",
            help="Of a token; 4x4x4 in pixels, 1x2x2 in latents, by default.",
        ),
    ] = None,
    pos_embed: Annotated[
        str, typer.Option(help="sincos, or rope, which is better for other sizes.")
    ] = "rope",
    qk_norm: Annotated[
        str, typer.Option(help="Norm of queries and keys: rms, layer or none.")
    ] = "rms",
    time_mean: Annotated[
        float, typer.Option(help="Under flow, of the noise level's logit: more is noisier.")
    ] = 1.6,
    caption_dropout: Annotated[
        float, typer.Option(min=0, max=1, help="Share of captions left out, for guidance.")
    ] = 0.1,
    ema_decay: Annotated[
        float, typer.Option(min=0, max=1, help="Of the averaged weights, which are the result.")
    ] = 0.999,
    checkpoint_every: CheckpointEvery = 200,
    seed: Annotated[int, typer.Option(min=0, help="Decides the run to the last bit.")] = 0,
    bf16: Bf16 = True,
    threads: Threads = None,
    device: Device = "auto",
) -> None:
    """Train a text-to-video model on moving handwritten digits, or on real videos.

    The defaults are the settings of the first of the two runs that made the model of the package; the
    second is in the examples. A run that was killed goes on with --resume and ends with the same
    weights as an unbroken one. --out gets checkpoints, loss.png, and logs for TensorBoard.

    Examples:

    * `dit-kernels train`
    * `dit-kernels train --resume`
    * `dit-kernels train --out runs/second --init runs/digits/model.safetensors --wordings --vary-every 4 --steps 4000 --learning-rate 0.0007`
    * `dit-kernels train --out runs/wide --hidden-size 256 --num-heads 8 --steps 20000`
    * `dit-kernels train --out runs/two --digits 2 --speeds --size 48 --given-share 0.3`
    * `dit-kernels train --out runs/latents --codec causal --learning-rate 2e-3`
    * `dit-kernels train --out runs/films --data my-videos --size 64x96 --text-mode cross`
    """
    from dit_kernels.video import training
    from dit_kernels.video.model import ModelConfig, TextToVideo

    if qk_norm not in ("rms", "layer", "none"):  # the library's none is None
        raise ValueError(f"--qk-norm must be one of rms, layer, none; got {qk_norm!r}")
    model_values: dict[str, Any] = {
        "hidden_size": hidden_size, "depth": depth, "num_heads": num_heads, "size": size,
        "codec": codec, "text_encoder": text_encoder, "text_mode": text_mode,
        "objective": objective, "pos_embed": pos_embed,
        "qk_norm": None if qk_norm == "none" else qk_norm,
    }  # fmt: skip
    given = {"frames": frames, "patch_size": patch_size}
    if small_steps is None:
        shipped = training.SHIPPED_RUN
        kind = data, codec, frames, size, steps, init
        same = kind == ("digits", "identity", None, 32, shipped.steps, None)
        small_steps = shipped.small_steps if same else 0
    run_values: dict[str, Any] = {
        "steps": steps, "batch_size": batch_size, "accumulate": accumulate,
        "small_steps": small_steps, "small_batch_size": small_batch_size,
        "small_frames": small_frames, "small_size": small_size, "time_mean": time_mean,
        "learning_rate": learning_rate, "warmup_steps": warmup_steps, "optimizer": optimizer,
        "caption_dropout": caption_dropout, "ema_decay": ema_decay, "given_share": given_share,
        "vary_every": vary_every, "init": str(init or ""), "checkpoint_every": checkpoint_every, "seed": seed, "bf16": bf16,
    }  # fmt: skip
    clips_values = clips_settings(data, digits, speeds, frame_step)
    clips_values |= {"hold_out": hold_out, "wordings": wordings}
    checkpoint = start_run(out, resume, threads)
    where = torch_device(device)
    if checkpoint.is_file():
        trainer = training.Trainer.load(checkpoint, where)
        for config, values in (
            (trainer.model.config, model_values | given),
            (trainer.config, run_values),
            (trainer.config.clips, clips_values),
        ):
            refuse_changes(context, config, values, checkpoint)
    else:
        refuse_idle_of_clips(context, data)
        if small_steps == 0:
            small = ("small_batch_size", "small_frames", "small_size")
            refuse_idle(context, small, "in a run without --small-steps")
        weights = None
        if init is None:
            config = ModelConfig(
                **model_values, **{k: v for k, v in given.items() if v is not None},
                **({} if codec == "identity" else {k: v for k, v in LATENT.items() if given[k] is None}),
            )  # fmt: skip
        else:
            weights = TextToVideo.load(None if str(init) == "shipped" else init)
            sizes = {"size": size, "frames": frames}
            fixed = {k: v for k, v in (model_values | given).items() if k not in sizes}
            refuse_changes(context, weights.config, fixed, init, "--init begins with")
            config = dataclasses.replace(
                weights.config, **{k: v for k, v in sizes.items() if is_given(context, k)}
            )
        if config.objective != "flow":
            refuse_idle(context, ("time_mean",), f"where the objective is {config.objective}")
        clips_config, config, clips = open_for_model(
            clips_values, config, seed, weights.config.words if weights else ()
        )
        if weights is not None and config.channels != weights.config.channels:
            raise ValueError(
                f"the videos of {init} have {weights.config.channels} colour channels,"
                f" those of --data {data} have {config.channels}"
            )
        trainer = training.Trainer(
            config, training.TrainingConfig(clips=clips_config, **run_values), where, clips
        )
        if weights is not None:
            trainer.start_from(weights)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    output.print(
        f"{parameters:,} parameters, step {trainer.step_number:,} of {trainer.config.steps:,}, "
        f"on {trainer.device}; checkpoints in {out}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    say_skipped(trainer.data)
    model_path = run_to_the_end(trainer, out, trainer.tokens, "tokens")
    prompt = trainer.data.batch([0])[1][0]
    output.print(f"wrote {model_path}; now type:", soft_wrap=True, highlight=False)
    output.print(f'  dit-kernels generate "{prompt}" --weights {model_path}', **PLAIN)
    if trainer.config.clips.data == "digits":
        output.print(f"  dit-kernels evaluate --weights {model_path}", **PLAIN)


@app.command()
def train_codec(
    context: typer.Context,
    out: Annotated[
        Path, typer.Option(help="Folder for checkpoint.safetensors and codec.safetensors.")
    ] = Path("runs/codec"),
    resume: Resume = False,
    data: Data = "digits",
    digits: MostDigits = 1,
    speeds: Speeds = False,
    frame_step: FrameStep = 1,
    frames: Annotated[
        int, typer.Option(min=1, help="Frames in a clip: 1 more than a multiple of the stride.")
    ] = 9,
    size: Size = 32,
    latent_channels: Annotated[int, typer.Option(min=1, help="Channels of the latents.")] = 8,
    width: Annotated[int, typer.Option(min=1, help="Channels of the first stage.")] = 32,
    strides: Annotated[
        str,
        typer.Option(
            metavar="TxYxX,...",
            help="Frames, rows and columns that become one, stage by stage.",
        ),
    ] = "1x2x2,2x2x2",
    kl_weight: Annotated[
        float, typer.Option(min=0, help="How strongly latents are drawn to a unit Gaussian.")
    ] = 1e-3,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 1200,
    batch_size: Annotated[int, typer.Option(min=1, help="Clips a step.")] = 8,
    learning_rate: Annotated[float, typer.Option(min=0, help="Peak, after the warm-up.")] = 2e-3,
    checkpoint_every: CheckpointEvery = 200,
    seed: Annotated[int, typer.Option(min=0, help="Decides the run to the last bit.")] = 0,
    bf16: Bf16 = True,
    threads: Threads = None,
    device: Device = "auto",
) -> None:
    """Train a causal 3D autoencoder, whose latents `dit-kernels train --codec` works in.

    The defaults are the settings of the codec that ships with the package. --resume goes on after a
    kill, as for `dit-kernels train`.

    Examples:

    * `dit-kernels train-codec`
    * `dit-kernels train-codec --out runs/films-codec --data my-videos --size 64 --latent-channels 16`
    * `dit-kernels train --codec runs/films-codec/codec.safetensors --data my-videos --size 64`
    """
    from dit_kernels.video import codec_training
    from dit_kernels.video.autoencoder import AutoencoderConfig
    from dit_kernels.video.data import ClipsConfig

    codec_values: dict[str, Any] = {
        "latent_channels": latent_channels, "width": width,
        "strides": parse_strides(strides),
    }  # fmt: skip
    run_values: dict[str, Any] = {
        "steps": steps, "batch_size": batch_size, "learning_rate": learning_rate,
        "kl_weight": kl_weight, "checkpoint_every": checkpoint_every, "frames": frames,
        "size": size, "seed": seed, "bf16": bf16,
    }  # fmt: skip
    clips_values = clips_settings(data, digits, speeds, frame_step)
    checkpoint = start_run(out, resume, threads)
    where = torch_device(device)
    if checkpoint.is_file():
        trainer = codec_training.CodecTrainer.load(checkpoint, where)
        for config, values in (
            (trainer.model.config, codec_values),
            (trainer.config, run_values),
            (trainer.config.clips, clips_values),
        ):
            refuse_changes(context, config, values, checkpoint)
    else:
        refuse_idle_of_clips(context, data)
        trainer = codec_training.CodecTrainer(
            AutoencoderConfig(channels=1 if data == "digits" else 3, **codec_values),
            codec_training.CodecTrainingConfig(clips=ClipsConfig(**clips_values), **run_values),
            where,
        )
    parameters = sum(p.numel() for p in trainer.model.parameters())
    output.print(
        f"{parameters:,} parameters, step {trainer.step_number:,} of {trainer.config.steps:,}, "
        f"on {trainer.device}; checkpoints in {out}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    say_skipped(trainer.data)
    path = run_to_the_end(trainer, out, lambda step: trainer.config.batch_size, "clips")
    quality = codec_training.signal_to_noise(
        trainer.model, trainer.data.batch(codec_training.MEASURED[:16])[0].to(where)
    )
    # real videos are few: all are trained on
    seen = "clips it did not see" if data == "digits" else "its own clips"
    output.print(
        f"wrote {path}: {quality:.1f} dB peak signal to noise on {seen}; now type:",
        **PLAIN,
    )
    output.print(f"  dit-kernels train --codec {path} --data {trainer.config.clips.data}", **PLAIN)


def parse_strides(text: str) -> tuple[tuple[int, int, int], ...]:
    """A stride a stage from "1x2x2,2x2x2"."""
    try:
        return tuple(parse_patch(stride) for stride in text.split(","))
    except typer.BadParameter as error:
        raise typer.BadParameter(error.message, param_hint="'--strides'") from None


def clips_settings(data: str, digits: int, speeds: bool, frame_step: int) -> dict[str, Any]:
    """The options of the clips, by their names in ClipsConfig."""
    return {"data": data, "most_digits": digits, "speeds": speeds, "frame_step": frame_step}


def start_run(out: Path, resume: bool, threads: int | None) -> Path:
    """The checkpoint in a folder, which is made; there may be one only with --resume."""
    import torch

    from dit_kernels.video.runs import CHECKPOINT_NAME

    if threads is not None:
        torch.set_num_threads(threads)
    checkpoint = out / CHECKPOINT_NAME
    if checkpoint.is_file() and not resume:
        raise ValueError(
            f"{checkpoint} is already there; add --resume to go on with it, or choose another --out"
        )
    if resume and not checkpoint.is_file():
        output.print(f"there is no {checkpoint} yet: a new run", **PLAIN)
    out.mkdir(parents=True, exist_ok=True)  # before steps that could not be saved
    return checkpoint


def open_for_model(
    values: dict[str, Any], config: ModelConfig, seed: int, known: Sequence[str] = ()
) -> tuple[ClipsConfig, ModelConfig, Clips]:
    """Open the clips, and fit the model to them: its words after those it knows, and colours or grey."""
    from dit_kernels.video.data import DIGITS, ClipsConfig, open_clips
    from dit_kernels.video.text import words_of

    clips_config = ClipsConfig(**values)
    channels = 1 if clips_config.data == DIGITS else 3
    clips = open_clips(clips_config, config.frames, config.size, channels, seed)
    longest = max((len(words_of(text)) for text in getattr(clips, "captions", ())), default=0)
    return (
        clips_config,
        dataclasses.replace(
            config, channels=channels, words=tuple(dict.fromkeys((*known, *clips.words))),
            text_length=max(config.text_length, longest + 1),
        ),
        clips,
    )  # fmt: skip


def say_skipped(clips: Clips) -> None:
    """Name the videos that can't be used."""
    for path, reason in getattr(clips, "skipped", ()):
        output.print(f"skipped {path}: {reason}", **PLAIN)


def run_to_the_end(trainer: Run, out: Path, work: Callable[[int], int], unit: str) -> Path:
    """Train with a bar, of so many `unit` as work(step) says; Ctrl-C keeps the work done."""
    from dit_kernels.video import runs

    try:
        with training_bar(trainer.step_number, trainer.config.steps, work, unit) as on_step:
            return runs.train(trainer, out, on_step)
    except KeyboardInterrupt:
        trainer.save(out / runs.CHECKPOINT_NAME)
        output.print(f"stopped after step {trainer.step_number:,}; add --resume to go on")
        raise typer.Exit(130) from None


def is_given(context: typer.Context, option: str) -> bool:
    """Whether the user typed an option."""
    source = context.get_parameter_source(option)
    return source is not None and source.name == "COMMANDLINE"


def option_of(name: str) -> str:
    """The option that sets a setting."""
    return "--" + {"most_digits": "digits"}.get(name, name).replace("_", "-")


def refuse_idle(context: typer.Context, names: Sequence[str], where: str) -> None:
    """An option that would change nothing is an error: who types it means something by it."""
    given = [option_of(name) for name in names if is_given(context, name)]
    if given:
        raise ValueError(f"{', '.join(given)} would change nothing {where}")


def refuse_idle_of_clips(context: typer.Context, data: str) -> None:
    """The options that clips of this kind don't have."""
    of_digits = ("digits", "speeds", "hold_out", "wordings")
    names = ("frame_step",) if data == "digits" else of_digits
    refuse_idle(context, names, f"where --data is {data}")


def refuse_changes(
    context: typer.Context,
    config: object,
    values: dict[str, Any],
    checkpoint: Path,
    why: str = "--resume goes on with",
) -> None:
    """A resumed run has the checkpoint's settings; an option that says otherwise is an error."""
    for name, value in values.items():
        kept, option = getattr(config, name), option_of(name)
        if is_given(context, option[2:].replace("-", "_")) and value != kept:
            before = "none" if kept in ("", None) else kept
            raise ValueError(f"{option} {value} differs from {before} in {checkpoint}, which {why}")
