"""What the launchers of csrc refuse when they are called past the ops' own checks, and how they say it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dit_kernels import testing
from dit_kernels.ops import cuda_extension


def adaln_plan(channels: int = 40, vectors: int = 3, threads: int = 32, stride: int = 40) -> Any:
    absent = (0, 0, 0, 1, False, 0)
    tokens = [(0, 0, 0, 0), (0, stride, 1, 0)]
    return cuda_extension.kernels().AdalnForward(
        (1, 2, channels, vectors, threads), (2, False, False, False), 1e-6, 1, tokens, [absent] * 5, [0] * 6
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "shift", "message"),
    [
        ({}, 1, r"adaln_forward: a row must start at a multiple of 16 bytes.*address % 16 = 4.*float32 \[2, 40\]"),
        (dict(stride=41), 0, "strides 0, 41, 1 of 4 bytes"),
        (dict(vectors=4), 0, "no kernel has 4 vectors a thread"),
        (dict(channels=400), 0, "a row of 400 channels is not 3 vectors of 4 in 32 threads"),
        (dict(threads=48), 0, "whole warps; got 1 x 2 x 40 and 48 threads"),
        (dict(threads=1024), 0, "in 1024 threads"),
    ],
)  # fmt: skip
def test_adaln(arguments, shift, message):
    x = torch.zeros(128)[shift : shift + 80].view(2, 40)
    y = torch.empty_like(x)
    plan = adaln_plan(**arguments)
    with pytest.raises(RuntimeError, match=message):
        cuda_extension.kernels().adaln_forward(
            *cuda_extension.where(x), plan, None, x, *[None] * 13, y, None, None, None, None
        )


@pytest.mark.parametrize(
    ("lanes", "threads", "channels", "message"),
    [
        (4, 48, 16, "a head of 16 channels in 1 sections does not fit vectors of 4 in 4 of 48 threads"),
        (4, 32, 64, "does not fit"), (3, 32, 16, "does not fit"), (2, 64, 20, "does not fit"), (2, 64, 18, "from multiples of 16 bytes"),
    ],
)  # fmt: skip
def test_qk_norm_rope(lanes, threads, channels, message):
    x = torch.zeros(1, 2, 1, channels)
    side = [1, 2, 1, 1, 2, *x.stride()[:3], 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    plan = cuda_extension.kernels().QkNormRope(
        [0, 0, 0, 0, 0], 1e-6, [channels, 1, 0, lanes, threads], [0] * 7, [side, [0] * 18]
    )
    with pytest.raises(RuntimeError, match=message):
        cuda_extension.kernels().qk_norm_rope_fwd(
            *cuda_extension.where(x), plan, x, *[None] * 7, torch.empty_like(x), *[None] * 5
        )


def test_patch_embed():
    x, weight = torch.zeros(1, 1, 1, 2, 2), torch.zeros(8, 1, 1, 2, 2)
    tokens, sums = torch.zeros(1, 1, 8), torch.zeros(1, 32)
    with pytest.raises(RuntimeError, match="1 chunks of 65 patches"):
        cuda_extension.kernels().patch_embed_bwd_weight(
            *cuda_extension.where(x), x, weight, tokens, 65, sums, None
        )


def test_feed_forward():
    kernels = cuda_extension.kernels()
    x, y = torch.randn(3, 8), torch.empty(3, 8)
    where = cuda_extension.where(x)
    with pytest.raises(RuntimeError, match=r"feed_forward_fwd: .*torch.float64 \[3, 8\]"):
        kernels.feed_forward_fwd(*where, x.double(), None, y, 3, 3, 8, 0, 8, 1, 0)
    too_many = (2**31, 2**31, 8, 0, 8, 1, 0)
    with pytest.raises(RuntimeError, match=r"2147483648 rows of 8 columns .* \[3, 8\]"):
        kernels.feed_forward_fwd(*where, x, None, y, *too_many)
    # told that there are four rows, the kernel leaves the tensor
    message = r"feed_forward_fwd_kernel.*block \(0, 0, 0\), thread .*(past the end of|which belongs to no)"
    with pytest.raises(RuntimeError, match=message):
        kernels.feed_forward_fwd(*where, x, None, y, 4, 4, 8, 0, 8, 1, 0)
    with pytest.raises(TypeError):
        kernels.feed_forward_fwd(*where, "x", None, y, 3, 3, 8, 0, 8, 1, 0)
    kernels.feed_forward_fwd(*where, x, None, y, 3, 3, 8, 0, 8, 1, 0)
    oracle, eager = (torch.nn.functional.gelu(v, approximate="tanh") for v in (x.double(), x))
    testing.assert_accurate(y, oracle, eager)
