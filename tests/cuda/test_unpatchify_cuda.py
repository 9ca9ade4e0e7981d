"""The CUDA kernel of unpatchify in the emulator: it moves values, so every check is for equality."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from dit_kernels import ops, testing
from dit_kernels.ops import cuda_extension

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CASES = [case.name for case in testing.cases(torch.float32) if case.op == "unpatchify"]
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def check(kwargs):
    got = testing.run("unpatchify", kwargs, backend="cuda").all()
    expected = testing.run("unpatchify", kwargs, backend="reference").all()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@every_dtype
@pytest.mark.parametrize("name", CASES)
def test_examples(name, dtype):
    (case,) = [c for c in testing.cases(dtype) if c.op == "unpatchify" and c.name == name]
    for measured in testing.measure(case, backend="cuda"):
        assert measured.ok, measured
    check(case.kwargs)


@pytest.mark.parametrize("layout", [" ".join(axes) for axes in itertools.permutations("thwc")])
def test_every_layout(layout):
    tokens = torch.randn(2, 2 * 3 * 5, 2 * 1 * 2 * 3)
    check(dict(tokens=tokens, grid=(2, 3, 5), patch_size=(2, 1, 2), channels=3, layout=layout))


@pytest.mark.parametrize(
    ("grid", "patch_size", "channels"),
    [
        ((1, 16, 16), (1, 2, 2), 4),
        ((2, 5, 19), (1, 2, 2), 16),
        ((1, 2, 70), (1, 2, 2), 16),
        ((1, 9, 33), (2, 3, 5), 1),
        ((3, 1, 1), (1, 1, 1), 7),
        ((1, 2, 3), (1, 16, 16), 3),
        ((2, 6, 45), (1, 2, 2), 16),
        ((1, 5, 45), (1, 2, 2), 16),
        ((1, 8, 5), (1, 1, 1), 9),
    ],
)  # fmt: skip
def test_grids_and_patches(grid, patch_size, channels):
    width = patch_size[0] * patch_size[1] * patch_size[2] * channels
    tokens = torch.randn(1, grid[0] * grid[1] * grid[2], width).bfloat16()
    check(dict(tokens=tokens, grid=grid, patch_size=patch_size, channels=channels))


@pytest.mark.parametrize(
    ("grid", "wide"), [((13, 30, 45), True), ((1, 31, 45), False), ((28, 30, 53), True)]
)
def test_odd_widths_take_several_rows_at_a_time(grid, wide):
    """Rows of 90 values are no multiple of 16 bytes; four of them are."""
    kernels = cuda_extension.kernels()
    kernels.record(True)
    try:
        tokens = torch.empty(1, math.prod(grid), 64, dtype=torch.bfloat16, requires_grad=True)
        video = ops.unpatchify(tokens, grid, (1, 2, 2), 16, backend="cuda")
        torch.autograd.grad(video, tokens, torch.empty_like(video))
        names = [launched[0] for launched in kernels.recorded()]
    finally:
        kernels.record(False)
    vectors = 8 if wide else 1
    expected = [
        f"unpatchify_kernel<unsigned short, {way}, 8, {vectors}>" for way in ("false", "true")
    ]
    assert names == expected


def test_views():
    options = dict(grid=(1, 4, 6), patch_size=(1, 2, 2), channels=4)
    wide = torch.randn(24, 3, 40)
    check(dict(tokens=wide.transpose(0, 1)[..., 8:24], **options))
    check(dict(tokens=wide.transpose(0, 1)[::2, :, 3:35:2], **options))
    check(dict(tokens=torch.randn(1, 1, 16).expand(2, 24, 16), **options))


def test_a_gradient_of_other_strides():
    options = dict(grid=(1, 4, 6), patch_size=(1, 2, 2), channels=3)
    tokens = torch.randn(2, 24, 12, requires_grad=True)
    video = ops.unpatchify(tokens, **options, backend="cuda")
    dvideo = torch.randn(2, 1, 8, 12, 3).permute(0, 4, 1, 2, 3)
    (got,) = torch.autograd.grad(video, tokens, dvideo)
    (expected,) = torch.autograd.grad(ops.unpatchify(tokens, **options), tokens, dvideo)
    assert torch.equal(got, expected)


@pytest.mark.parametrize(("samples", "grid"), [(0, (1, 2, 3)), (2, (0, 2, 3)), (1, (1, 2, 0))])
def test_empty(samples, grid):
    tokens = torch.randn(samples, grid[0] * grid[1] * grid[2], 16)
    check(dict(tokens=tokens, grid=grid, patch_size=(1, 2, 2), channels=4))


def test_unsupported():
    options = dict(grid=(1, 1, 1), channels=3, backend="cuda")
    with pytest.raises(RuntimeError, match="float64"):
        ops.unpatchify(torch.randn(1, 1, 12).double(), patch_size=(1, 2, 2), **options)
    with pytest.raises(RuntimeError, match="1 to 16384 values"):
        ops.unpatchify(torch.randn(1, 1, 3 * 4096 * 2), patch_size=(2, 64, 64), **options)


def test_offsets_beyond_two_to_the_31():
    options = dict(grid=(1, 2, 4), patch_size=(1, 2, 2), channels=4, backend="cuda")
    far = torch.empty(2**31 + 4096, dtype=torch.bfloat16).as_strided((2, 8, 16), (2**31, 16, 1))
    far.copy_(torch.randn(2, 8, 16))
    assert torch.equal(ops.unpatchify(far, **options), ops.unpatchify(far.contiguous(), **options))
