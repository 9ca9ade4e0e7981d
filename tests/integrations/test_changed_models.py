"""A patched model that is changed, watched or called in an unusual way does what it would do unpatched."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small_models import SMALL, build, inputs, output
from torch import Tensor, nn

import dit_kernels
from dit_kernels import testing

WAN = SMALL["wan"]


@pytest.fixture(autouse=True)
def _nothing_is_put_back() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="dit_kernels.patch")
        yield


def close(actual: Tensor, eager: Tensor) -> None:
    """Two float32 runs of one model, by the accuracy rule at float16: what is wrong is off by more."""
    testing.assert_accurate(actual, eager.double(), eager, dtype=torch.float16)


def twins(family: str) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """The same model unpatched and patched, and inputs."""
    plain, model = build(SMALL[family]), build(SMALL[family])
    dit_kernels.patch(model)
    return plain, model, inputs(SMALL[family])


@pytest.mark.parametrize(
    "family",
    ["flux", "wan", "sd3.5", "hunyuan-video-i2v", "qwen-image", "flux2", "cogvideox", "lumina2", "dit"],
)  # fmt: skip
def test_one_time_for_the_whole_batch(family: str) -> None:
    """Modulation of one sample, which the models' own code broadcasts."""
    plain, model, given = twins(family)
    for name in ("timestep", "pooled_projections", "guidance", "class_labels"):
        if name in given:
            given[name] = given[name][:1]
    with torch.no_grad():
        close(output(model, given), output(plain, given))


def test_one_time_for_images_to_edit() -> None:
    small = SMALL["qwen-image"]
    small = type(small)(small.kind, small.config | {"zero_cond_t": True}, small.inputs)
    model, given = build(small), inputs(small)
    given |= {"timestep": torch.tensor([0.7]), "img_shapes": [[(1, 2, 4), (1, 2, 2)]] * 2}
    with torch.no_grad():
        want = output(model, given)
        dit_kernels.patch(model)
        close(output(model, given), want)
