"""The last layer: `final_layer` of every backend."""

from __future__ import annotations

import pytest
import torch

from dit_kernels import ops, testing

OP = "final_layer"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = [case.name for case in testing.cases(torch.float32) if case.op == OP]
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def layer(grid, patch_size, channels, width, samples=1, dtype=torch.float32, **options):
    tokens = grid[0] * grid[1] * grid[2]
    values = patch_size[0] * patch_size[1] * patch_size[2] * channels
    kwargs = {
        "x": torch.randn(samples, tokens, width),
        "shift": torch.randn(samples, width),
        "scale": torch.randn(samples, width),
        "weight": torch.randn(values, width),
        "bias": torch.randn(values),
    }
    kwargs = {name: value.to(dtype) for name, value in kwargs.items()} | options
    return {**kwargs, "grid": grid, "patch_size": patch_size, "channels": channels}


@every_dtype
@pytest.mark.parametrize("name", NAMES)
def test_examples(check, example, name, dtype):
    check(OP, **example(name, dtype).kwargs)


@every_dtype
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_several_tiles_each_way(check, norm, dtype):
    check(OP, **layer((1, 7, 11), (1, 2, 2), 5, 150, 2, dtype), norm=norm)


@every_dtype
def test_more_values_than_a_tile(check, dtype):
    check(OP, **layer((1, 3, 2), (1, 8, 8), 3, 24, dtype=dtype), layout="c h w t")


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_models_layers(check, dtype):
    """DiT-XL's rows, a few blocks of 128 tokens, modulation in float32 as Wan's."""
    kwargs = layer((1, 13, 12), (1, 2, 2), 8, 1152, 2, DTYPES[dtype])
    shift, scale = torch.randn(2, 2 * 1152).chunk(2, dim=-1)
    check(OP, **{**kwargs, "shift": shift, "scale": scale})


@pytest.mark.parametrize("layout", ["t h w c", "c t h w", "h w t c", "w c h t"])
@pytest.mark.parametrize("patch_size", [(2, 3, 2), (1, 2, 3), (2, 1, 1), (1, 1, 4)])
def test_layouts_and_patches(check, layout, patch_size):
    check(OP, **layer((2, 2, 3), patch_size, 3, 20), layout=layout)


@pytest.mark.parametrize("layout", ["t h w c", "c t h w", "h w t c"])
@pytest.mark.parametrize(
    ("patch_size", "channels"), [((1, 2, 2), 8), ((2, 1, 4), 3), ((1, 1, 1), 70), ((1, 2, 2), 40)]
)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_patches_side_by_side(check, layout, patch_size, channels, dtype):
    """16 bytes of a row of the video are whole patches; up to 160 values, so that tiles may cut them apart."""
    check(OP, **layer((2, 3, 8), patch_size, channels, 24, dtype=DTYPES[dtype]), layout=layout)


@pytest.mark.parametrize(
    ("shift", "scale"), [(6, 6), (108, 6), (1, 54), (3, 108), (54, 54), (0, 3), (6, 0)]
)
def test_modulation_of_every_form(check, shift, scale):
    """Rows a sample, a frame, a few tokens, a token; 0 is none."""
    kwargs = layer((6, 3, 6), (1, 2, 2), 2, 24, 2)
    kwargs["shift"] = torch.randn(2, shift, 24) if shift else None
    kwargs["scale"] = torch.randn(2, scale, 24) if scale else None
    check(OP, **kwargs)


@pytest.mark.usefixtures("one_multiprocessor")
def test_programs_that_walk_over_several_chunks(check):
    check(OP, **layer((2, 2, 150), (1, 1, 2), 4, 20), norm="rms")


def test_a_large_common_offset(check):
    """The mean is far from 0: the variance must not be a difference of squares."""
    kwargs = layer((1, 3, 3), (1, 2, 2), 2, 100)
    check(OP, **{**kwargs, "x": kwargs["x"] + 500.0})


def test_views(check):
    kwargs = layer((1, 3, 4), (1, 2, 2), 3, 16, 2)
    shift, scale = torch.randn(2, 32).chunk(2, dim=-1)
    wide = torch.randn(12, 2, 40).transpose(0, 1)
    check(OP, **{**kwargs, "x": wide[..., 8:24], "shift": shift, "scale": scale})
    check(
        OP,
        **{
            **kwargs,
            "x": wide[..., :32:2],
            "shift": torch.randn(16, 2).t(),
            "weight": torch.randn(16, 12).t(),
        },
    )


def test_groups_of_tokens_that_end_within_16_bytes_of_a_row(check):
    """Eight tokens are 16 bytes of the video, and four share a row of the modulation."""
    kwargs = layer((1, 2, 8), (1, 1, 1), 8, 24, dtype=torch.bfloat16)
    check(OP, **{**kwargs, "scale": torch.randn(1, 4, 24).bfloat16()})


def test_mixed_dtypes(check):
    kwargs = layer((1, 3, 4), (1, 2, 2), 3, 40)
    check(OP, **{**kwargs, "x": kwargs["x"].bfloat16()})
    check(OP, **{**kwargs, "x": kwargs["x"].bfloat16(), "weight": kwargs["weight"].half()})
    check(OP, **{**kwargs, "weight": kwargs["weight"].bfloat16()})


def test_a_gradient_of_other_strides_and_only_what_is_asked_for(backend, agree):
    kwargs = layer((1, 3, 4), (1, 2, 2), 3, 16, 2)
    names = ("x", "shift", "scale", "weight", "bias")
    dvideo = torch.randn(2, 1, 6, 8, 3).permute(0, 4, 1, 2, 3)

    def grads(served, dtype, wanted=names):
        values = testing.converted(kwargs, dtype)
        leaves = {n: values[n].clone().requires_grad_() for n in wanted}
        video = ops.final_layer(**{**values, **leaves}, backend=served)
        return torch.autograd.grad(video, list(leaves.values()), dvideo.to(dtype))

    agree(grads)
    for name, expected in zip(names, grads(backend, torch.float32), strict=True):
        (alone,) = grads(backend, torch.float32, (name,))
        assert torch.equal(alone, expected)


@pytest.mark.usefixtures("one_multiprocessor")
def test_the_biass_gradient_over_thousands_of_tokens(agree):
    """One program adds them up: one number after the other would lose more than eager does."""
    kwargs = layer((1, 1, 4096), (1, 2, 2), 16, 8)
    dvideo = torch.randn(1, 16, 1, 2, 8192)

    def grads(served, dtype):
        values = testing.converted(kwargs, dtype)
        values["bias"] = values["bias"].detach().requires_grad_()
        video = ops.final_layer(**values, backend=served)
        return torch.autograd.grad(video, values["bias"], dvideo.to(dtype))

    agree(grads)


@pytest.mark.parametrize("wanted", [("x",), ("weight",), ("x", "weight")], ids="-".join)
def test_some_gradients_with_a_row_of_the_scale_a_token(agree, wanted):
    kwargs = layer((1, 3, 4), (1, 2, 2), 3, 16, 2)
    kwargs["scale"] = torch.randn(2, 12, 16)
    dvideo = torch.randn(2, 3, 1, 6, 8)

    def grads(served, dtype):
        values = testing.converted(kwargs, dtype)
        leaves = {name: values[name].detach().requires_grad_() for name in wanted}
        video = ops.final_layer(**{**values, **leaves}, backend=served)
        return torch.autograd.grad(video, list(leaves.values()), dvideo.to(dtype))

    agree(grads)


@pytest.mark.parametrize(("samples", "grid"), [(0, (1, 2, 3)), (2, (1, 0, 3))])
def test_empty(backend, samples, grid):
    kwargs = layer(grid, (1, 2, 2), 3, 16, samples)
    grads = testing.run(OP, kwargs, backend=backend).grads
    assert all(torch.equal(g, torch.zeros_like(kwargs[name])) for name, g in grads.items())


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("width", [20, 24])
def test_same_bits_in_every_run(same_bits, dtype, width):
    same_bits(OP, **layer((2, 5, 30), (1, 1, 2), 4, width, dtype=DTYPES[dtype]))


def test_offsets_beyond_two_to_the_31(backend, far):
    kwargs = layer((1, 2, 3), (1, 2, 2), 2, 24, 2, torch.bfloat16)
    expected = ops.final_layer(**kwargs, backend=backend)
    kwargs["x"] = far(kwargs["x"], 24, 1)
    assert torch.equal(ops.final_layer(**kwargs, backend=backend), expected)


@pytest.mark.parametrize("width", [24, 20])
@pytest.mark.parametrize("name", ["x", "scale"])
def test_offsets_beyond_two_to_the_31_in_backward(agree_from_afar, name, width):
    agree_from_afar(OP, name, **layer((1, 2, 4), (1, 2, 2), 2, width, 2, torch.bfloat16))


def test_float64_is_not_served(backend):
    with pytest.raises(RuntimeError, match="float64"):
        ops.final_layer(**layer((1, 1, 1), (1, 2, 2), 3, 8, dtype=torch.float64), backend=backend)
