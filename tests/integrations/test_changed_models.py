"""A patched model that is changed, watched or called in an unusual way does what it would do unpatched."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers.models.normalization import AdaLayerNorm
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


def test_a_bias_and_an_activation_that_came_later() -> None:
    plain, model, given = twins("lumina2")
    torch.manual_seed(0)
    first, second = (block.feed_forward for block in model.layers)
    first.linear_3, second.silu = nn.Linear(32, first.linear_3.out_features), nn.ReLU()
    plain.layers[0].feed_forward.linear_3 = copy.deepcopy(first.linear_3)
    plain.layers[1].feed_forward.silu = nn.ReLU()
    with torch.no_grad():
        close(output(model, given), output(plain, given))


@pytest.mark.parametrize("family", ["wan", "flux2", "lumina2", "kandinsky-5", "mochi"])
def test_a_single_hook_anywhere_is_called(family: str) -> None:
    """Not all at once: a hook on one module makes its neighbours' code run too."""
    plain, model, given = twins(family)
    with torch.no_grad():
        output(model, given)
        for name, module in model.named_modules():
            if ".1." in name:  # as in the first block
                continue
            counts = []
            for one in (plain.get_submodule(name), module):
                calls: list[int] = []
                handle = one.register_forward_hook(lambda *_, calls=calls: calls.append(1))
                output(plain if one is not module else model, given)
                handle.remove()
                counts.append(len(calls))
            assert counts[1] == counts[0], name


def test_modulation_that_is_no_row_a_sample_is_left() -> None:
    report = dit_kernels.patch(AdaLayerNorm(8, chunk_dim=0))
    assert not report.replaced
    assert ("", "its modulation is not a row a sample") in report.left
