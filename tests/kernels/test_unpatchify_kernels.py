"""Tokens to patches: `unpatchify` of every backend. It moves values, so every check is for equality."""

from __future__ import annotations

import itertools

import pytest
import torch

from dit_kernels import ops, testing

OP = "unpatchify"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = [case.name for case in testing.cases(torch.float32) if case.op == OP]
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


@pytest.fixture
def equal(backend):
    """Video and gradient of a call are those of the reference."""

    def equal(**kwargs):
        got = testing.run(OP, kwargs, backend=backend).all()
        expected = testing.run(OP, kwargs, backend="reference").all()
        assert all(torch.equal(got[name], expected[name]) for name in expected)

    return equal


@every_dtype
@pytest.mark.parametrize("name", NAMES)
def test_examples(equal, example, name, dtype):
    equal(**example(name, dtype).kwargs)


@pytest.mark.parametrize("layout", [" ".join(axes) for axes in itertools.permutations("thwc")])
def test_every_layout(equal, layout):
    tokens = torch.randn(2, 2 * 3 * 5, 2 * 1 * 2 * 3)
    equal(tokens=tokens, grid=(2, 3, 5), patch_size=(2, 1, 2), channels=3, layout=layout)


@pytest.mark.parametrize(
    ("grid", "patch_size", "channels"),
    [
        ((1, 16, 16), (1, 2, 2), 4),
        ((2, 5, 19), (1, 2, 2), 16),
        ((1, 2, 70), (1, 2, 2), 16),
        ((2, 6, 45), (1, 2, 2), 16),
        ((1, 5, 45), (1, 2, 2), 16),
        ((1, 8, 5), (1, 1, 1), 9),
        ((1, 9, 33), (2, 3, 5), 1),
        ((3, 1, 1), (1, 1, 1), 7),
        ((1, 2, 3), (1, 16, 16), 3),
    ],
)  # fmt: skip
def test_grids_and_patches(equal, grid, patch_size, channels):
    width = patch_size[0] * patch_size[1] * patch_size[2] * channels
    tokens = torch.randn(1, grid[0] * grid[1] * grid[2], width).bfloat16()
    equal(tokens=tokens, grid=grid, patch_size=patch_size, channels=channels)


def test_views(equal):
    options = dict(grid=(1, 4, 6), patch_size=(1, 2, 2), channels=4)
    wide = torch.randn(24, 3, 40)
    equal(tokens=wide.transpose(0, 1)[..., 8:24], **options)
    equal(tokens=wide.transpose(0, 1)[::2, :, 3:35:2], **options)
    equal(tokens=torch.randn(1, 1, 16).expand(2, 24, 16), **options)


def test_a_gradient_of_other_strides(backend):
    options = dict(grid=(1, 4, 6), patch_size=(1, 2, 2), channels=3)
    tokens = torch.randn(2, 24, 12, requires_grad=True)
    video = ops.unpatchify(tokens, **options, backend=backend)
    dvideo = torch.randn(2, 1, 8, 12, 3).permute(0, 4, 1, 2, 3)
    (got,) = torch.autograd.grad(video, tokens, dvideo)
    (expected,) = torch.autograd.grad(
        ops.unpatchify(tokens, **options, backend="reference"), tokens, dvideo
    )
    assert torch.equal(got, expected)


@pytest.mark.parametrize(("grid", "channels"), [((1, 4, 3), 3), ((2, 3, 3), 3), ((1, 2, 3), 512)])
@pytest.mark.parametrize("padding", [1, 2, 10])
@every_dtype
def test_a_gradient_whose_rows_are_padded(backend, grid, channels, padding, dtype):
    """Rows of 6 pixels; in CUDA a block has all patches of a row, or of the long ones two and then one."""
    options = dict(grid=grid, patch_size=(1, 2, 2), channels=channels)
    values, count = 4 * channels, grid[0] * grid[1] * grid[2]
    tokens = torch.randn(2, count, values).to(dtype).requires_grad_()
    wide = torch.randn(2, channels, grid[0], 2 * grid[1], 6 + padding).to(dtype)
    found = []
    for served in (backend, "reference"):
        video = ops.unpatchify(tokens, **options, backend=served)
        found += torch.autograd.grad(video, tokens, wide[..., :6])
    assert torch.equal(*found)


@pytest.mark.parametrize("offset", [1, 2, 4])
@every_dtype
def test_tokens_that_start_at_no_multiple_of_16_bytes(equal, offset, dtype):
    tokens = torch.randn(2 * 24 * 16 + offset).to(dtype)[offset:].view(2, 24, 16)
    equal(tokens=tokens, grid=(1, 4, 6), patch_size=(1, 2, 2), channels=4)


@pytest.mark.parametrize(("samples", "grid"), [(0, (1, 2, 3)), (2, (0, 2, 3)), (1, (1, 2, 0))])
def test_empty(equal, samples, grid):
    tokens = torch.randn(samples, grid[0] * grid[1] * grid[2], 16)
    equal(tokens=tokens, grid=grid, patch_size=(1, 2, 2), channels=4)


def test_offsets_beyond_two_to_the_31(backend, far):
    options = dict(grid=(1, 2, 4), patch_size=(1, 2, 2), channels=4, backend=backend)
    tokens = torch.randn(2, 8, 16).bfloat16()
    got = ops.unpatchify(far(tokens, 16, 1), **options)
    assert torch.equal(got, ops.unpatchify(tokens, **options))


@pytest.mark.parametrize("channels", [4, 3])
def test_offsets_beyond_two_to_the_31_in_backward(agree_from_afar, channels):
    tokens = torch.randn(2, 6, 4 * channels).bfloat16()
    agree_from_afar(
        OP, "tokens", tokens=tokens, grid=(1, 2, 3), patch_size=(1, 2, 2), channels=channels
    )


def test_what_is_not_served(backend):
    options = dict(grid=(1, 1, 1), channels=3, backend=backend)
    with pytest.raises(RuntimeError, match="float64"):
        ops.unpatchify(torch.randn(1, 1, 12).double(), patch_size=(1, 2, 2), **options)
    with pytest.raises(RuntimeError, match="16384 values"):
        ops.unpatchify(torch.randn(1, 1, 3 * 4096 * 2), patch_size=(2, 64, 64), **options)
