"""Patches to tokens: `patch_embed` of every backend."""

from __future__ import annotations

import pytest
import torch

from dit_kernels import ops, testing
from dit_kernels.ops import cuda_extension

OP = "patch_embed"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = [case.name for case in testing.cases(torch.float32) if case.op == OP]
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


@every_dtype
@pytest.mark.parametrize("name", NAMES)
def test_examples(check, example, name, dtype):
    check(OP, **example(name, dtype).kwargs)


@every_dtype
def test_several_tiles_each_way(check, dtype):
    """M = 2 * 75, C = 130, K = 5 * 4 * 4: no tile is full."""
    check(
        OP,
        video=torch.randn(2, 5, 3, 20, 20).to(dtype),
        weight=torch.randn(130, 5, 1, 4, 4).to(dtype),
        bias=torch.randn(130).to(dtype),
        pos_embed=torch.randn(75, 130).to(dtype),
    )


@pytest.mark.parametrize("shape", ["dit", "wan", "tubelet"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_models_patches(check, shape, dtype):
    """Rows of 16 bytes each way, a few blocks of 128 patches and several of 64 channels."""
    dtype = DTYPES[dtype]
    video, channels, patch = {
        "dit": ((2, 4, 1, 26, 32), 192, (1, 2, 2)),
        "wan": ((1, 16, 3, 10, 24), 136, (1, 2, 2)),
        "tubelet": ((1, 3, 4, 20, 24), 72, (2, 4, 4)),
    }[shape]
    tokens = video[2] * video[3] * video[4] // (patch[0] * patch[1] * patch[2])
    check(
        OP,
        video=torch.randn(video).to(dtype),
        weight=torch.randn(channels, video[1], *patch).to(dtype),
        bias=torch.randn(channels).to(dtype),
        pos_embed=torch.randn(tokens, channels),
    )


@pytest.mark.usefixtures("one_multiprocessor")
def test_programs_that_walk_over_several_tiles(check):
    check(
        OP,
        video=torch.randn(1, 3, 1, 50, 52),
        weight=torch.randn(20, 3, 1, 2, 2),
        bias=torch.randn(20),
    )


@pytest.mark.parametrize("values", [24, 72])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_blocks_that_keep_their_patches_for_some_of_the_channels(backend, values, dtype):
    """So many patches that a CUDA block takes two column blocks of four: in one step of its depth, or in several."""
    dtype = DTYPES[dtype]
    blocks = 2 * cuda_extension.multiprocessors(torch.empty(0)) if backend == "cuda" else 2
    kwargs = dict(
        video=torch.randn(1, values, 1, 16 * blocks, 8).to(dtype),
        weight=torch.randn(200, values, 1, 1, 1).to(dtype),
        bias=torch.randn(200).to(dtype),
    )
    case = testing.Case(OP, "", OP, kwargs)
    (measured,) = testing.measure(case, backend=backend, backward=False)
    assert measured.ok, measured


@every_dtype
def test_channels_last(check, dtype):
    video = torch.randn(2, 4, 6, 6, 3).to(dtype).permute(0, 4, 1, 2, 3)
    check(
        OP,
        video=video,
        weight=torch.randn(24, 3, 2, 2, 3).to(dtype),
        bias=torch.randn(24).to(dtype),
    )
    image = torch.randn(2, 4, 8, 8).to(dtype).contiguous(memory_format=torch.channels_last)
    check(OP, video=image, weight=torch.randn(24, 4, 2, 2).to(dtype))


def test_views(check):
    wide = torch.randn(2, 4, 3, 8, 24)
    weight = torch.randn(30, 4, 1, 2, 3)
    check(OP, video=wide[..., ::2], weight=weight)
    check(OP, video=wide[..., :12], weight=weight.transpose(0, 1).contiguous().transpose(0, 1))
    check(
        OP,
        video=wide.transpose(3, 4),
        weight=weight.transpose(3, 4),
        bias=torch.randn(60)[::2],
        pos_embed=torch.randn(30, 96).t(),
    )


def from_second(value):
    """The same values, starting one element behind an address that an allocator gave."""
    return torch.empty(value.numel() + 1, dtype=value.dtype)[1:].view(value.shape).copy_(value)


@pytest.mark.parametrize("name", ["video", "weight", "bias", "pos_embed"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_one_tensor_that_starts_at_no_multiple_of_16_bytes(check, name, dtype):
    kwargs = dict(
        video=torch.randn(1, 4, 1, 8, 16), weight=torch.randn(24, 4, 1, 2, 2), bias=torch.randn(24),
        pos_embed=torch.randn(32, 24),
    )  # fmt: skip
    kwargs = testing.converted(kwargs, DTYPES[dtype])
    check(OP, **{**kwargs, name: from_second(kwargs[name])})


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(("width", "pitch"), [(12, 16), (16, 17), (16, 20), (16, 24)])
def test_rows_of_a_video_further_apart_than_they_are_long(check, width, pitch, dtype):
    """Of 3 or 4 patches of 4 pixels: in bfloat16 16 bytes are two of them."""
    video = torch.randn(2, 3, 1, 16, pitch).to(DTYPES[dtype])[..., :width]
    check(OP, video=video, weight=torch.randn(24, 3, 1, 2, 4).to(DTYPES[dtype]))
    check(OP, video=video, weight=torch.randn(24, 3, 1, 2, 2).to(DTYPES[dtype]))


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_position_table_whose_rows_are_apart(check, dtype):
    table = torch.randn(8, 30).to(DTYPES[dtype])[:, :24]
    check(
        OP,
        video=torch.randn(1, 4, 1, 4, 8).to(DTYPES[dtype]),
        weight=torch.randn(24, 4, 1, 2, 2).to(DTYPES[dtype]),
        pos_embed=table,
    )


def test_mixed_dtypes(check):
    video, weight = torch.randn(1, 4, 2, 8, 8), torch.randn(24, 4, 1, 2, 2)
    extra = {"bias": torch.randn(24), "pos_embed": torch.randn(32, 24)}
    check(OP, video=video.bfloat16(), weight=weight, **extra)
    check(OP, video=video.bfloat16(), weight=weight.half(), **extra)
    check(OP, video=video, weight=weight.bfloat16(), **extra)


def test_a_gradient_of_other_strides(agree):
    shapes = dict(video=(2, 3, 1, 4, 6), weight=(10, 3, 1, 2, 2), bias=(10,), pos_embed=(6, 10))
    values = {name: torch.randn(shape) for name, shape in shapes.items()}
    dtokens = torch.randn(10, 6, 2).permute(2, 1, 0)

    def grads(served, dtype):
        leaves = {name: t.to(dtype, copy=True).requires_grad_() for name, t in values.items()}
        tokens = ops.patch_embed(**leaves, backend=served)
        return torch.autograd.grad(tokens, list(leaves.values()), dtokens.to(dtype))

    agree(grads)


def test_only_the_bias(backend):
    video, weight = torch.randn(1, 3, 1, 4, 6), torch.randn(10, 3, 1, 2, 2)
    bias = torch.randn(10, requires_grad=True)
    tokens = ops.patch_embed(video, weight, bias, backend=backend)
    (dbias,) = torch.autograd.grad(tokens.sum(), bias)
    assert torch.equal(dbias, torch.full((10,), 6.0))


@pytest.mark.usefixtures("one_multiprocessor")
def test_the_biass_gradient_over_thousands_of_tokens(agree):
    """One program adds them up: one number after the other would lose more than eager does."""
    video, weight, bias = (
        torch.randn(1, 1, 1, 1, 4096),
        torch.randn(64, 1, 1, 1, 1),
        torch.randn(64),
    )
    dtokens = torch.randn(1, 4096, 64)

    def grads(served, dtype):
        leaf = bias.to(dtype, copy=True).requires_grad_()
        tokens = ops.patch_embed(video.to(dtype), weight.to(dtype), leaf, backend=served)
        return torch.autograd.grad(tokens, leaf, dtokens.to(dtype))

    agree(grads)


@pytest.mark.parametrize("shape", [(0, 3, 1, 4, 6), (2, 3, 0, 4, 6)])
def test_empty(backend, shape):
    video, weight = torch.randn(shape, requires_grad=True), torch.randn(10, 3, 1, 2, 2)
    weight.requires_grad_()
    tokens = ops.patch_embed(video, weight, backend=backend)
    dvideo, dweight = torch.autograd.grad(tokens.sum(), (video, weight))
    assert dvideo.shape == shape
    assert torch.equal(dweight, torch.zeros_like(weight))


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("channels", [12, 16])
def test_same_bits_in_every_run(same_bits, dtype, channels):
    shapes = {"video": (2, 3, 1, 24, 24), "weight": (channels, 3, 1, 2, 2), "bias": (channels,)}
    same_bits(OP, **{n: torch.randn(shape).to(DTYPES[dtype]) for n, shape in shapes.items()})


def test_offsets_beyond_two_to_the_31(backend, far):
    video = torch.randn(2, 3, 1, 4, 8).bfloat16()
    weight = torch.randn(16, 3, 1, 2, 2).bfloat16()
    got = ops.patch_embed(far(video, 32, 32, 8, 1), weight, backend=backend)
    assert torch.equal(got, ops.patch_embed(video, weight, backend=backend))


@pytest.mark.parametrize("channels", [16, 15])
@pytest.mark.parametrize("name", ["video", "pos_embed"])
def test_offsets_beyond_two_to_the_31_in_backward(agree_from_afar, name, channels):
    """Rows of 16 bytes and others. The rows of the table are as far apart as the samples."""
    kwargs = dict(
        video=torch.randn(2, 3, 1, 2, 8), weight=torch.randn(channels, 3, 1, 2, 4),
        pos_embed=torch.randn(2, channels),
    )  # fmt: skip
    agree_from_afar(OP, name, **testing.converted(kwargs, torch.bfloat16))


def test_a_position_table_whose_rows_are_2_to_the_31_apart(backend, far):
    video = torch.randn(2, 3, 1, 2, 8).bfloat16()
    weight, table = torch.randn(16, 3, 1, 2, 4).bfloat16(), torch.randn(2, 16).bfloat16()
    got = ops.patch_embed(video, weight, pos_embed=far(table), backend=backend)
    assert torch.equal(got, ops.patch_embed(video, weight, pos_embed=table, backend=backend))


def test_float64_is_not_served(backend):
    video, weight = torch.randn(1, 1, 2, 2).double(), torch.randn(4, 1, 2, 2).double()
    with pytest.raises(RuntimeError, match="float64"):
        ops.patch_embed(video, weight, backend=backend)
