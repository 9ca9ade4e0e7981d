"""The text-to-video model: a text encoder and a DiT that predicts the clean video."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dit_kernels.models import DiT
from dit_kernels.video.checkpoints import read_checkpoint, write_checkpoint
from dit_kernels.video.digits import CAPTION_WORDS
from dit_kernels.video.text import TextEncoder, WordTokenizer

SHIPPED_WEIGHTS = Path(__file__).parent / "weights" / "moving_digits.safetensors"


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What is needed to build the model again; it travels in the checkpoint's metadata."""

    words: tuple[str, ...] = CAPTION_WORDS
    frames: int = 8
    size: int = 32
    channels: int = 1
    patch_size: tuple[int, int, int] = (4, 4, 4)
    hidden_size: int = 128
    depth: int = 4
    num_heads: int = 4
    text_dim: int = 128
    text_depth: int = 2
    text_mode: str = "pooled"
    pos_embed: str = "sincos"
    qk_norm: str | None = None


class TextToVideo(nn.Module):
    """x_0 = model(x_t, t, caption): the clean video seen through noise, given its caption.

    Args:
        config: sizes and options.
    """

    def __init__(self, config: ModelConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or ModelConfig()
        self.tokenizer = WordTokenizer(config.words)
        self.text = TextEncoder(self.tokenizer.vocabulary_size, config.text_dim, config.text_depth)
        self.dit = DiT(
            input_size=(config.frames, config.size, config.size),
            patch_size=tuple(config.patch_size),
            in_channels=config.channels,
            hidden_size=config.hidden_size,
            depth=config.depth,
            num_heads=config.num_heads,
            learn_sigma=False,
            pos_embed=config.pos_embed,
            qk_norm=config.qk_norm,
            text_dim=config.text_dim,
            text_mode=config.text_mode,
        )

    def encode_text(self, captions: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [B, L, D] and their mask [B, L] bool for B captions; "" is unconditional.

        Raises:
            ValueError: a caption has an unknown word.
        """
        device = self.text.position.device
        ids, mask = (tensor.to(device) for tensor in self.tokenizer(captions))
        return self.text(ids, mask), mask

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor, text_mask: torch.Tensor
    ) -> torch.Tensor:
        """The predicted clean video.

        Args:
            x: noisy video [B, Cin, F, Y, X].
            t: noise level [B] in [0, 1]; 1 is pure noise.
            text: tokens [B, L, D] of `encode_text`.
            text_mask: [B, L] bool, True at tokens.

        Returns:
            Video of x's shape.
        """
        return self.dit(x, 1000 * t, text=text, text_mask=text_mask)

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
            path: a file of `save`, or a training checkpoint, whose averaged weights are taken;
                None is the model that ships with the package.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file of something else.
        """
        path = SHIPPED_WEIGHTS if path is None else Path(path)
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
        return model.eval()


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
