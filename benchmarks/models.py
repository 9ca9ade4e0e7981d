"""The models that are measured whole, and what each takes."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dit_kernels.models import DiT, DiT_models

GROUPS = 8  # of the U-Net's norms
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Model:
    """A model and what it takes.

    Args:
        make: the model; `small` gives its form of two blocks, which the float64 oracle can check.
        size, small_size: of one sample [Cin, ...].
        classes: number of class labels, or 0.
        words, text_dim: prompt tokens, or 0.
        steps: of a generation.
        missing: why it isn't there, or None.
    """

    name: str
    make: Callable[..., nn.Module]
    size: tuple[int, ...]
    small_size: tuple[int, ...] = ()
    classes: int = 0
    words: int = 0
    text_dim: int = 0
    steps: int = 50
    missing: Callable[[], str | None] = lambda: None

    def inputs(self, batch: int, device: str, dtype: torch.dtype, *, small: bool = False) -> Inputs:
        size = self.small_size if small else self.size
        found = {
            "x": torch.randn(batch, *size, device=device, dtype=dtype),
            "t": torch.rand(batch, device=device) * 1000,
        }
        if self.classes:
            found["y"] = torch.arange(batch, device=device) % self.classes
        if self.words:
            shape = (batch, 7 if small else self.words, self.text_dim)
            found["text"] = torch.randn(shape, device=device, dtype=dtype)
        return found

    def unconditional(self, inputs: Inputs) -> Inputs:
        """No class, or an empty prompt, for classifier-free guidance."""
        return {
            name: torch.full_like(value, self.classes)
            if name == "y"
            else torch.zeros_like(value)
            if name == "text"
            else value
            for name, value in inputs.items()
        }


def _dit(name: str) -> Callable[..., nn.Module]:
    return functools.partial(DiT_models[name])


def _tiny(**options: Any) -> Callable[..., nn.Module]:
    return functools.partial(DiT, hidden_size=128, num_heads=4, **options)


class UNet(nn.Module):
    """diffusers' U-Net of images with classes, taking a DiT's arguments."""

    def __init__(self, width: int, size: int, channels: int, classes: int) -> None:
        super().__init__()
        from diffusers import UNet2DModel

        self.unet = UNet2DModel(
            sample_size=size, in_channels=channels, out_channels=channels, layers_per_block=2, norm_num_groups=GROUPS,
            block_out_channels=(width, 2 * width, 4 * width), num_class_embeds=classes + 1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.unet(x, t, class_labels=y).sample


def unet_beside(model: Model) -> Model:
    """A U-Net on the same latents whose forward takes the FLOPs of the model's as nearly as its width allows."""

    @functools.cache
    def width() -> int:
        wanted = flops(model, "forward")
        found: dict[int, int] = {}
        units = 16  # of the norms' groups; the FLOPs grow about as the square of the width
        while units not in found:
            found[units] = flops(made(GROUPS * units), "forward")
            units = max(1, round(units * (wanted / found[units]) ** 0.5))
        return GROUPS * min(found, key=lambda units: abs(found[units] - wanted))

    def made(channels: int | None = None) -> Model:
        def make(**_: Any) -> nn.Module:
            return UNet(channels or width(), model.size[-1], model.size[0], model.classes)

        return Model(
            "U-Net", make, model.size, classes=model.classes, steps=model.steps,
            missing=no_diffusers,
        )  # fmt: skip

    return made()


def no_diffusers() -> str | None:
    if importlib.util.find_spec("diffusers") is None:
        return "diffusers is not installed"
    try:
        from diffusers import UNet2DModel  # noqa: F401
    except Exception as error:  # a half-working installation must not end the run
        return f"diffusers does not import: {type(error).__name__}: {error}".splitlines()[0]
    return None


@functools.cache
def flops(model: Model, mode: str) -> int:
    """Of one sample in the matrix products of one call, by torch's counter; nothing is computed."""
    with torch.device("meta"):
        net = model.make().to(torch.bfloat16)
        inputs = model.inputs(1, "meta", torch.bfloat16)
        counter = FlopCounterMode(display=False)
        with counter:
            if mode == "train":
                net(**inputs).sum().backward()
            else:
                with torch.no_grad():
                    net(**inputs)
    # a guided step evaluates the model twice
    return counter.get_total_flops() * (2 * model.steps if mode == "generate" else 1)


_XL = Model("DiT-XL/2", _dit("DiT-XL/2"), (4, 32, 32), (4, 8, 12), classes=1000)
_TINY = Model(
    "tiny-image", _tiny(depth=2, num_classes=10, input_size=(1, 16, 16)), (4, 16, 16), (4, 8, 12),
    classes=10, steps=2,
)  # fmt: skip
MODELS = {
    "cuda": (
        _XL,
        Model(
            "video-XL", _dit("video-XL"), (16, 16, 32, 32), (16, 3, 8, 12), words=77, text_dim=1024
        ),
        unet_beside(_XL),
    ),
    "cpu": (
        _TINY,
        Model(
            "tiny-video",
            _tiny(
                depth=2, input_size=(4, 8, 8), learn_sigma=False, pos_embed="rope", qk_norm="rms",
                text_dim=32, text_mode="cross",
            ),
            (4, 4, 8, 8), (4, 2, 8, 4), words=7, text_dim=32, steps=2,
        ),
        unet_beside(_TINY),
    ),
}  # fmt: skip
