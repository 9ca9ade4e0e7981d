"""The text-to-video model: a text encoder and a DiT, in pixels or in the latents of a codec.

Whatever the objective the model was trained with, `denoise` gives the clean video seen through
noise. Schedulers need no more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dit_kernels.models import DiT
from dit_kernels.video import ddpm
from dit_kernels.video.checkpoints import read_checkpoint, write_checkpoint
from dit_kernels.video.codecs import IDENTITY, open_codec
from dit_kernels.video.digits import CAPTION_WORDS
from dit_kernels.video.runs import CHECKPOINT_NAME
from dit_kernels.video.text import PretrainedText, TextEncoder, WordTokenizer

FLOW, DDPM = "flow", "ddpm"
OBJECTIVES = (FLOW, DDPM)
WORDS = "words"

MODEL_NAME = "model.safetensors"  # what a run makes, in its folder
SHIPPED_WEIGHTS = Path(__file__).parent / "weights" / "moving_digits.safetensors"


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What is needed to build the model again; it travels in the checkpoint's metadata.

    size is height and width in pixels, one number for both. codec is what `open_codec` takes,
    text_encoder "words" or the folder of a pretrained one.
    """

    words: tuple[str, ...] = CAPTION_WORDS
    frames: int = 8
    size: int | tuple[int, int] = 32
    channels: int = 1
    patch_size: tuple[int, int, int] = (4, 4, 4)
    hidden_size: int = 128
    depth: int = 4
    num_heads: int = 4
    text_dim: int = 128
    text_depth: int = 2
    text_mode: str = "pooled"
    pos_embed: str = "rope"
    qk_norm: str | None = "rms"
    codec: str = IDENTITY
    codec_fingerprint: str = ""
    text_encoder: str = WORDS
    text_length: int = 32
    objective: str = FLOW

    @property
    def height_width(self) -> tuple[int, int]:
        """The size, as two numbers."""
        return pair(self.size)


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """Height and width of a size that may be one number for both."""
    return (size, size) if isinstance(size, int) else size


class TextToVideo(nn.Module):
    """The clean video seen through noise, given its caption: see `denoise`.

    Args:
        config: sizes and options.

    Raises:
        FileNotFoundError: no codec or text encoder where config says.
        ValueError: values that don't go together, or a codec other than the one trained with.
    """

    # what it was trained on, and what of it was held out: pairs of a digit and a direction, wordings
    data = "digits"
    hold_out = False
    wordings = False

    def __init__(self, config: ModelConfig | None = None) -> None:
        super().__init__()
        config = config or ModelConfig()
        if config.objective not in OBJECTIVES:
            raise ValueError(
                f"objective must be one of {', '.join(OBJECTIVES)}; got {config.objective!r}"
            )
        self.codec = open_codec(config.codec, config.channels)
        if config.codec_fingerprint not in ("", self.codec.fingerprint):
            raise ValueError(
                f"the model was trained with another codec than {config.codec} is now "
                f"({config.codec_fingerprint}, not {self.codec.fingerprint})"
            )
        channels, *latent_size = self.codec.latent_shape(config.frames, *config.height_width)
        self.pretrained_text = None
        if config.text_encoder == WORDS:
            self.tokenizer = WordTokenizer(config.words)
            self.text = TextEncoder(
                self.tokenizer.vocabulary_size, config.text_dim, config.text_depth,
                max_length=config.text_length,
            )  # fmt: skip
        else:
            self.pretrained_text = PretrainedText(config.text_encoder)
            config = dataclasses.replace(config, text_dim=self.pretrained_text.dim)
        self.config = dataclasses.replace(config, codec_fingerprint=self.codec.fingerprint)
        self.dit = DiT(
            input_size=latent_size,
            patch_size=tuple(config.patch_size),
            in_channels=channels,
            hidden_size=config.hidden_size,
            depth=config.depth,
            num_heads=config.num_heads,
            learn_sigma=config.objective == DDPM,
            pos_embed=config.pos_embed,
            qk_norm=config.qk_norm,
            text_dim=config.text_dim,
            text_mode=config.text_mode,
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.dit.final_layer.linear.weight.device

    def encode_text(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokens [B, L, D] and their mask [B, L] bool for B captions; "" is unconditional.

        Raises:
            ValueError: a caption has an unknown word.
        """
        if self.pretrained_text is not None:
            return self.pretrained_text(captions, self.device)
        ids, mask = (tensor.to(self.device) for tensor in self.tokenizer(captions))
        return self.text(ids, mask), mask

    def forward(self, x: Tensor, t: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        """What the DiT predicts: the clean latents, or under "ddpm" their noise and its variance.

        Args:
            x: noisy latents [B, Z, f, h, w] (of the identity codec: the video).
            t: noise level, [B] or a frame of patches [B, Gt]: in [0, 1], 1 is pure noise; under "ddpm"
                the step over 1000.
            text: tokens [B, L, D] of `encode_text`.
            text_mask: [B, L] bool, True at tokens.

        Returns:
            Latents of x's shape, of twice as many channels under "ddpm".
        """
        return self.dit(x, 1000 * t, text=text, text_mask=text_mask)

    def denoise(
        self, x: Tensor, t: Tensor, text: Tensor, text_mask: Tensor, given: Tensor | None = None
    ) -> Tensor:
        """The clean latents, float32, seen in x = (1 - t) clean + t noise.

        Args:
            x: [B, Z, f, h, w]; the frames that are given are clean in it.
            t: one level for all, [] in (0, 1].
            text, text_mask: of `encode_text`.
            given: bool [f], the frames that are known; None for none.
        """
        if self.config.objective == FLOW:
            return self(x, self.patch_times(t.expand(len(x)), given), text, text_mask).float()
        # the same mixture, as DDPM scales it, at the step whose share of noise is nearest
        scales = ddpm.noise_scales().to(x.device)
        wanted = (t / (1 - t)).clamp(max=float(scales[-1]))
        step = (scales - wanted).abs().argmin()
        level = ddpm.signal_levels().to(x.device)[step].float()
        noisy = x * level.sqrt() * (1 + scales[step].float())
        if given is not None:
            noisy = torch.where(given.view(-1, 1, 1), x, noisy)
        times = self.patch_times((step / ddpm.STEPS).float().expand(len(x)), given)
        noise = self(noisy, times, text, text_mask).float().chunk(2, dim=1)[0]
        return (noisy - (1 - level).sqrt() * noise) / level.sqrt()

    def patch_times(self, t: Tensor, given: Tensor | None) -> Tensor:
        """Levels [B] as they are; with given frames [f] (or [B, f]), [B, Gt] that are 0 where a patch is all given."""
        if given is None:
            return t
        patches = given.unflatten(-1, (-1, self.config.patch_size[0])).all(-1)
        return torch.where(patches, torch.zeros_like(t)[:, None], t[:, None])

    def save(self, path: str | Path, trained_with: dict[str, Any] | None = None) -> None:
        """Write the weights, in float16, to one file.

        Args:
            path: the file.
            trained_with: the run's settings; kept with the configuration for whoever asks later.
        """
        tensors = {name: tensor.half() for name, tensor in self.state_dict().items()}
        settings = {"model": dataclasses.asdict(self.config), "trained_with": trained_with}
        write_checkpoint(path, tensors, settings)

    @classmethod
    def load(cls, path: str | Path | None = None) -> TextToVideo:
        """A model for sampling, in float32 and evaluation mode.

        Args:
            path: a file of `save`, or a training checkpoint, whose averaged weights are taken; the
                folder of a run, for the model in it, or else the checkpoint; None is the model that
                ships with the package.

        Raises:
            FileNotFoundError: no such file, or none in the folder.
            ValueError: a file of something else.
        """
        path = SHIPPED_WEIGHTS if path is None else Path(path)
        if path.is_dir():
            path = weights_in(path)
        tensors, settings = read_checkpoint(path)
        if "model" not in settings:
            raise ValueError(f"{path} has no text-to-video model in it")
        if "training" in settings:
            tensors = {
                name.removeprefix("ema."): tensor
                for name, tensor in tensors.items()
                if name.startswith("ema.")
            }
        model = cls(model_config(settings["model"]))
        model.load_state_dict(tensors)
        trained_with = settings.get("training") or settings.get("trained_with") or {}
        clips = trained_with.get("clips", {})
        model.data = clips.get("data", "digits")
        model.hold_out = clips.get("hold_out", False)
        model.wordings = clips.get("wordings", False)
        return model.eval()


def weights_in(folder: Path) -> Path:
    """The file with a run's weights.

    Raises:
        FileNotFoundError: there is none.
    """
    for name in (MODEL_NAME, CHECKPOINT_NAME):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(
        f"no {MODEL_NAME} and no {CHECKPOINT_NAME} in the folder {folder}: it is none of `dit-kernels train`"
    )


def model_config(settings: dict[str, Any]) -> ModelConfig:
    """The configuration that was read from JSON, where tuples have become lists."""
    values: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()
    }
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    if unknown := values.keys() - known:
        raise ValueError(
            f"the checkpoint has settings this version does not know: {', '.join(sorted(unknown))}"
        )
    return ModelConfig(**values)
