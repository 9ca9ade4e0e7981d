"""The CUDA kernels of final_layer in the emulator, against the reference."""

from __future__ import annotations

import pytest
import torch

from dit_kernels import ops, testing
from dit_kernels.ops import cuda_extension

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CASES = [case.name for case in testing.cases(torch.float32) if case.op == "final_layer"]
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def check(**kwargs):
    case = testing.Case("final_layer", "", "final_layer", kwargs)
    for measured in testing.measure(case, backend="cuda"):
        assert measured.ok, measured


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
@pytest.mark.parametrize("name", CASES)
def test_examples(name, dtype):
    (case,) = [c for c in testing.cases(dtype) if c.op == "final_layer" and c.name == name]
    for measured in testing.measure(case, backend="cuda"):
        assert measured.ok, measured


@every_dtype
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_several_tiles_each_way(norm, dtype):
    check(**layer((1, 7, 11), (1, 2, 2), 5, 150, 2, dtype), norm=norm)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_models_layers(dtype):
    """DiT-XL's rows, a few blocks of 128 tokens, modulation in float32 as Wan's."""
    kwargs = layer((1, 13, 12), (1, 2, 2), 8, 1152, 2, DTYPES[dtype])
    shift, scale = torch.randn(2, 2 * 1152).chunk(2, dim=-1)
    check(**{**kwargs, "shift": shift, "scale": scale})


@every_dtype
def test_more_values_than_a_tile(dtype):
    check(**layer((1, 3, 2), (1, 8, 8), 3, 24, dtype=dtype), layout="c h w t")


@pytest.mark.parametrize("layout", ["t h w c", "c t h w", "h w t c", "w c h t"])
@pytest.mark.parametrize("patch_size", [(2, 3, 2), (1, 2, 3), (2, 1, 1), (1, 1, 4)])
def test_layouts_and_patches(layout, patch_size):
    check(**layer((2, 2, 3), patch_size, 3, 20), layout=layout)


@pytest.mark.parametrize("layout", ["t h w c", "c t h w", "h w t c"])
@pytest.mark.parametrize(
    ("patch_size", "channels"), [((1, 2, 2), 8), ((2, 1, 4), 3), ((1, 1, 1), 70), ((1, 2, 2), 40)]
)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_patches_side_by_side(layout, patch_size, channels, dtype):
    """16 bytes of a row of the video are whole patches; up to 160 values, so that tiles may cut them apart."""
    check(**layer((2, 3, 8), patch_size, channels, 24, dtype=DTYPES[dtype]), layout=layout)


@pytest.mark.parametrize(
    ("shift", "scale"), [(6, 6), (108, 6), (1, 54), (3, 108), (54, 54), (0, 3), (6, 0)]
)
def test_modulation_of_every_form(shift, scale):
    """Rows a sample, a frame, a few tokens, a token; 0 is none."""
    kwargs = layer((6, 3, 6), (1, 2, 2), 2, 24, 2)
    kwargs["shift"] = torch.randn(2, shift, 24) if shift else None
    kwargs["scale"] = torch.randn(2, scale, 24) if scale else None
    check(**kwargs)


def test_blocks_that_walk_over_several_tiles(monkeypatch):
    monkeypatch.setattr(cuda_extension, "multiprocessors", lambda tensor: 1)
    check(**layer((2, 2, 150), (1, 1, 2), 4, 20), norm="rms")


def test_a_large_common_offset():
    """The mean is far from 0: the variance must not be a difference of squares."""
    kwargs = layer((1, 3, 3), (1, 2, 2), 2, 100)
    check(**{**kwargs, "x": kwargs["x"] + 500.0})


def test_views():
    kwargs = layer((1, 3, 4), (1, 2, 2), 3, 16, 2)
    shift, scale = torch.randn(2, 32).chunk(2, dim=-1)
    wide = torch.randn(12, 2, 40).transpose(0, 1)
    check(**{**kwargs, "x": wide[..., 8:24], "shift": shift, "scale": scale})
    check(
        **{
            **kwargs,
            "x": wide[..., :32:2],
            "shift": torch.randn(16, 2).t(),
            "weight": torch.randn(16, 12).t(),
        }
    )


def test_mixed_dtypes():
    kwargs = layer((1, 3, 4), (1, 2, 2), 3, 40)
    check(**{**kwargs, "x": kwargs["x"].bfloat16()})
    check(**{**kwargs, "x": kwargs["x"].bfloat16(), "weight": kwargs["weight"].half()})
    check(**{**kwargs, "weight": kwargs["weight"].bfloat16()})


def test_a_gradient_of_other_strides_and_only_what_is_asked_for():
    kwargs = layer((1, 3, 4), (1, 2, 2), 3, 16, 2)
    names = ("x", "shift", "scale", "weight", "bias")
    dvideo = torch.randn(2, 1, 6, 8, 3).permute(0, 4, 1, 2, 3)

    def grads(wanted, backend, dtype=torch.float32):
        leaves = {n: kwargs[n].to(dtype, copy=True) for n in names}
        for name in wanted:
            leaves[name].requires_grad_()
        video = ops.final_layer(**{**kwargs, **leaves}, backend=backend)
        return torch.autograd.grad(video, [leaves[n] for n in wanted], dvideo.to(dtype))

    together, eager = grads(names, "cuda"), grads(names, "reference")
    oracles = grads(names, "reference", torch.float64)
    for got, oracle, rough in zip(together, oracles, eager, strict=True):
        testing.assert_accurate(got, oracle, rough)
    for name, expected in zip(names, together, strict=True):
        (alone,) = grads((name,), "cuda")
        assert torch.equal(alone, expected)


@pytest.mark.parametrize(("samples", "grid"), [(0, (1, 2, 3)), (2, (1, 0, 3))])
def test_empty(samples, grid):
    kwargs = layer(grid, (1, 2, 2), 3, 16, samples)
    grads = testing.run("final_layer", kwargs, backend="cuda").grads
    assert all(torch.equal(g, torch.zeros_like(kwargs[name])) for name, g in grads.items())


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_order_of_threads_and_blocks_changes_nothing(dtype):
    kwargs = layer((2, 5, 30), (1, 1, 2), 4, 24, dtype=DTYPES[dtype])
    runs = []
    for seed in range(3):
        cuda_extension.kernels().set_seed(seed)
        runs.append(testing.run("final_layer", kwargs, backend="cuda").all())
    assert all(torch.equal(run[name], runs[0][name]) for run in runs for name in run)


def test_unsupported():
    with pytest.raises(RuntimeError, match="float64"):
        ops.final_layer(**layer((1, 1, 1), (1, 2, 2), 3, 8, dtype=torch.float64), backend="cuda")


def test_offsets_beyond_two_to_the_31():
    kwargs = layer((1, 2, 3), (1, 2, 2), 2, 24, 2, torch.bfloat16)
    far = torch.empty(2**31 + 4096, dtype=torch.bfloat16).as_strided((2, 6, 24), (2**31, 24, 1))
    far.copy_(kwargs["x"])
    got, expected = (
        ops.final_layer(**{**kwargs, "x": x}, backend="cuda") for x in (far, kwargs["x"])
    )
    assert torch.equal(got, expected)
