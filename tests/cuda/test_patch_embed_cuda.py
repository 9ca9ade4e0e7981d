"""The CUDA kernels of patch_embed in the emulator, against the reference."""

from __future__ import annotations

import pytest
import torch

from dit_kernels import ops, testing
from dit_kernels.ops import cuda_extension

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CASES = [case.name for case in testing.cases(torch.float32) if case.op == "patch_embed"]
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def check(**kwargs):
    case = testing.Case("patch_embed", "", "patch_embed", kwargs)
    for measured in testing.measure(case, backend="cuda"):
        assert measured.ok, measured


@every_dtype
@pytest.mark.parametrize("name", CASES)
def test_examples(name, dtype):
    (case,) = [c for c in testing.cases(dtype) if c.op == "patch_embed" and c.name == name]
    for measured in testing.measure(case, backend="cuda"):
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


@pytest.mark.parametrize("shape", ["dit", "wan", "tubelet"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_models_patches(shape, dtype):
    """Rows of 16 bytes each way, a few blocks of 128 patches and several of 64 channels."""
    dtype = DTYPES[dtype]
    video, channels, patch = {
        "dit": ((2, 4, 1, 26, 32), 192, (1, 2, 2)),
        "wan": ((1, 16, 3, 10, 24), 136, (1, 2, 2)),
        "tubelet": ((1, 3, 4, 20, 24), 72, (2, 4, 4)),
    }[shape]
    tokens = video[2] * video[3] * video[4] // (patch[0] * patch[1] * patch[2])
    check(
        video=torch.randn(video).to(dtype),
        weight=torch.randn(channels, video[1], *patch).to(dtype),
        bias=torch.randn(channels).to(dtype),
        pos_embed=torch.randn(tokens, channels),
    )


def test_blocks_that_walk_over_several_tiles(monkeypatch):
    monkeypatch.setattr(cuda_extension, "multiprocessors", lambda tensor: 1)
    check(
        video=torch.randn(1, 3, 1, 50, 52),
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
    shapes = dict(video=(2, 3, 1, 4, 6), weight=(10, 3, 1, 2, 2), bias=(10,), pos_embed=(6, 10))
    values = {name: torch.randn(shape) for name, shape in shapes.items()}
    dtokens = torch.randn(10, 6, 2).permute(2, 1, 0)

    def grads(backend, dtype):
        leaves = {name: t.to(dtype, copy=True).requires_grad_() for name, t in values.items()}
        tokens = ops.patch_embed(**leaves, backend=backend)
        return torch.autograd.grad(tokens, list(leaves.values()), dtokens.to(dtype))

    runs = (("cuda", torch.float32), ("reference", torch.float64), ("reference", torch.float32))
    for got, oracle, eager in zip(*(grads(*run) for run in runs), strict=True):
        testing.assert_accurate(got, oracle, eager)


def test_only_the_bias():
    video, weight = torch.randn(1, 3, 1, 4, 6), torch.randn(10, 3, 1, 2, 2)
    bias = torch.randn(10, requires_grad=True)
    tokens = ops.patch_embed(video, weight, bias, backend="cuda")
    (dbias,) = torch.autograd.grad(tokens.sum(), bias)
    assert torch.equal(dbias, torch.full((10,), 6.0))


@pytest.mark.parametrize("shape", [(0, 3, 1, 4, 6), (2, 3, 0, 4, 6)])
def test_empty(shape):
    video, weight = torch.randn(shape, requires_grad=True), torch.randn(10, 3, 1, 2, 2)
    weight.requires_grad_()
    tokens = ops.patch_embed(video, weight, backend="cuda")
    dvideo, dweight = torch.autograd.grad(tokens.sum(), (video, weight))
    assert dvideo.shape == shape
    assert torch.equal(dweight, torch.zeros_like(weight))


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_order_of_threads_and_blocks_changes_nothing(dtype):
    shapes = {"video": (2, 3, 1, 24, 24), "weight": (16, 3, 1, 2, 2), "bias": (16,)}
    kwargs = {name: torch.randn(shape).to(DTYPES[dtype]) for name, shape in shapes.items()}
    runs = []
    for seed in range(3):
        cuda_extension.kernels().set_seed(seed)
        runs.append(testing.run("patch_embed", kwargs, backend="cuda").all())
    assert all(torch.equal(run[name], runs[0][name]) for run in runs for name in run)


def test_the_launcher_refuses_other_chunks():
    x, weight = torch.zeros(1, 1, 1, 2, 2), torch.zeros(8, 1, 1, 2, 2)
    tokens, sums = torch.zeros(1, 1, 8), torch.zeros(1, 32)
    with pytest.raises(RuntimeError, match="1 chunks of 65 patches"):
        cuda_extension.kernels().patch_embed_bwd_weight(
            *cuda_extension.where(x), x, weight, tokens, 65, sums, None
        )


def test_unsupported():
    with pytest.raises(RuntimeError, match="float64"):
        ops.patch_embed(
            torch.randn(1, 1, 2, 2).double(), torch.randn(4, 1, 2, 2).double(), backend="cuda"
        )


def test_offsets_beyond_two_to_the_31():
    far = torch.empty(2**31 + 4096, dtype=torch.bfloat16)
    far = far.as_strided((2, 3, 1, 4, 8), (2**31, 32, 32, 8, 1)).copy_(torch.randn(2, 3, 1, 4, 8))
    weight = torch.randn(16, 3, 1, 2, 2).bfloat16()
    got, expected = (
        ops.patch_embed(video, weight, backend="cuda") for video in (far, far.contiguous())
    )
    assert torch.equal(got, expected)
