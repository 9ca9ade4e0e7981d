"""The Triton kernels of patch_embed, interpreted on the CPU."""

from __future__ import annotations

import pytest
import torch

from dit_kernels import ops, testing
from dit_kernels.ops import triton_launch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CASES = [case.name for case in testing.cases(torch.float32) if case.op == "patch_embed"]
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def check(**kwargs):
    case = testing.Case("patch_embed", "", "patch_embed", kwargs)
    for measured in testing.measure(case, backend="triton"):
        assert measured.ok, measured


@every_dtype
@pytest.mark.parametrize("name", CASES)
def test_examples(name, dtype):
    (case,) = [c for c in testing.cases(dtype) if c.op == "patch_embed" and c.name == name]
    for measured in testing.measure(case, backend="triton"):
        assert measured.ok, measured


@every_dtype
def test_several_tiles_each_way(dtype):
    """M = 2 * 75, C = 130, K = 5 * 4 * 4: no tile is full."""
    check(
        video=torch.randn(2, 5, 3, 20, 20).to(dtype),
        weight=torch.randn(130, 5, 1, 4, 4).to(dtype),
        bias=torch.randn(130).to(dtype),
        pos_embed=torch.randn(75, 130).to(dtype),
    )


def test_programs_that_walk_over_several_tiles(monkeypatch):
    monkeypatch.setattr(triton_launch, "multiprocessors", lambda tensor: 1)
    check(
        video=torch.randn(1, 3, 1, 36, 40),
        weight=torch.randn(20, 3, 1, 2, 2),
        bias=torch.randn(20),
    )


@every_dtype
def test_channels_last(dtype):
    video = torch.randn(2, 4, 6, 6, 3).to(dtype).permute(0, 4, 1, 2, 3)
    check(video=video, weight=torch.randn(24, 3, 2, 2, 3).to(dtype), bias=torch.randn(24).to(dtype))
    image = torch.randn(2, 4, 8, 8).to(dtype).contiguous(memory_format=torch.channels_last)
    check(video=image, weight=torch.randn(24, 4, 2, 2).to(dtype))


def test_views():
    wide = torch.randn(2, 4, 3, 8, 24)
    weight = torch.randn(30, 4, 1, 2, 3)
    check(video=wide[..., ::2], weight=weight)
    check(video=wide[..., :12], weight=weight.transpose(0, 1).contiguous().transpose(0, 1))
    check(
        video=wide.transpose(3, 4),
        weight=weight.transpose(3, 4),
        bias=torch.randn(60)[::2],
        pos_embed=torch.randn(30, 96).t(),
    )


def test_mixed_dtypes():
    video, weight = torch.randn(1, 4, 2, 8, 8), torch.randn(24, 4, 1, 2, 2)
    extra = {"bias": torch.randn(24), "pos_embed": torch.randn(32, 24)}
    check(video=video.bfloat16(), weight=weight, **extra)
    check(video=video.bfloat16(), weight=weight.half(), **extra)
    check(video=video, weight=weight.bfloat16(), **extra)


def test_a_gradient_of_other_strides():
    shapes = ((2, 3, 1, 4, 6), (10, 3, 1, 2, 2), (10,), (6, 10))
    values = [torch.randn(shape) for shape in shapes]
    dtokens = torch.randn(10, 6, 2).permute(2, 1, 0)

    def grads(backend, dtype=torch.float32):
        leaves = [value.to(dtype, copy=True).requires_grad_() for value in values]
        video, weight, bias, pos = leaves
        tokens = ops.patch_embed(video, weight, bias, pos_embed=pos, backend=backend)
        return torch.autograd.grad(tokens, leaves, dtokens.to(dtype))

    with testing.plain_torch():
        eager = grads(None)
    oracle = grads("reference", torch.float64)
    for got, exact, rough in zip(grads("triton"), oracle, eager, strict=True):
        testing.assert_accurate(got, exact, rough)


def test_only_the_bias():
    video, weight = torch.randn(1, 3, 1, 4, 6), torch.randn(10, 3, 1, 2, 2)
    bias = torch.randn(10, requires_grad=True)
    tokens = ops.patch_embed(video, weight, bias, backend="triton")
    (dbias,) = torch.autograd.grad(tokens.sum(), bias)
    assert torch.equal(dbias, torch.full((10,), 6.0))


@pytest.mark.parametrize("shape", [(0, 3, 1, 4, 6), (2, 3, 0, 4, 6)])
def test_empty(shape):
    video, weight = torch.randn(shape, requires_grad=True), torch.randn(10, 3, 1, 2, 2)
    weight.requires_grad_()
    tokens = ops.patch_embed(video, weight, backend="triton")
    dvideo, dweight = torch.autograd.grad(tokens.sum(), (video, weight))
    assert dvideo.shape == shape
    assert torch.equal(dweight, torch.zeros_like(weight))


def test_deterministic():
    kwargs = {"video": torch.randn(2, 3, 1, 24, 24), "weight": torch.randn(12, 3, 1, 2, 2)}
    first, second = (testing.run("patch_embed", kwargs, backend="triton").all() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_unsupported():
    with pytest.raises(RuntimeError, match="float64"):
        ops.patch_embed(
            torch.randn(1, 1, 2, 2).double(), torch.randn(4, 1, 2, 2).double(), backend="triton"
        )
