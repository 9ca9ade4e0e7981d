"""The Triton kernels of final_layer, interpreted on the CPU."""

from __future__ import annotations

import pytest
import torch

from dit_kernels import ops, testing
from dit_kernels.ops import triton_launch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CASES = [case.name for case in testing.cases(torch.float32) if case.op == "final_layer"]
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def check(**kwargs):
    case = testing.Case("final_layer", "", "final_layer", kwargs)
    for measured in testing.measure(case, backend="triton"):
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
    for measured in testing.measure(case, backend="triton"):
        assert measured.ok, measured


@every_dtype
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_several_tiles_each_way(norm, dtype):
    check(**layer((1, 7, 11), (1, 2, 2), 5, 150, 2, dtype), norm=norm)


@every_dtype
def test_more_values_than_a_tile(dtype):
    check(**layer((1, 3, 2), (1, 8, 8), 3, 24, dtype=dtype), layout="c h w t")


@pytest.mark.parametrize("layout", ["t h w c", "c t h w", "h w t c", "w c h t"])
@pytest.mark.parametrize("patch_size", [(2, 3, 2), (1, 2, 3), (2, 1, 1), (1, 1, 4)])
def test_layouts_and_patches(layout, patch_size):
    check(**layer((2, 2, 3), patch_size, 3, 20), layout=layout)


@pytest.mark.parametrize(
    ("shift", "scale"), [(6, 6), (108, 6), (1, 54), (3, 108), (54, 54), (0, 3), (6, 0)]
)
def test_modulation_of_every_form(shift, scale):
    """Rows a sample, a frame, a few tokens, a token; 0 is none."""
    kwargs = layer((6, 3, 6), (1, 2, 2), 2, 24, 2)
    kwargs["shift"] = torch.randn(2, shift, 24) if shift else None
    kwargs["scale"] = torch.randn(2, scale, 24) if scale else None
    check(**kwargs)


def test_programs_that_walk_over_several_chunks(monkeypatch):
    monkeypatch.setattr(triton_launch, "multiprocessors", lambda tensor: 1)
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
        values = testing.converted(kwargs, dtype)
        leaves = {n: values[n].clone().requires_grad_() for n in wanted}
        video = ops.final_layer(**{**values, **leaves}, backend=backend)
        return torch.autograd.grad(video, list(leaves.values()), dvideo.to(dtype))

    together = grads(names, "triton")
    with testing.plain_torch():
        eager = grads(names, None)
    oracle = grads(names, "reference", torch.float64)
    for got, exact, rough in zip(together, oracle, eager, strict=True):
        testing.assert_accurate(got, exact, rough)
    for name, expected in zip(names, together, strict=True):
        (alone,) = grads((name,), "triton")
        assert torch.equal(alone, expected)


@pytest.mark.parametrize(("samples", "grid"), [(0, (1, 2, 3)), (2, (1, 0, 3))])
def test_empty(samples, grid):
    kwargs = layer(grid, (1, 2, 2), 3, 16, samples)
    grads = testing.run("final_layer", kwargs, backend="triton").grads
    assert all(torch.equal(g, torch.zeros_like(kwargs[name])) for name, g in grads.items())


def test_deterministic():
    kwargs = layer((2, 5, 30), (1, 1, 2), 4, 20)
    first, second = (testing.run("final_layer", kwargs, backend="triton").all() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_unsupported():
    with pytest.raises(RuntimeError, match="float64"):
        ops.final_layer(**layer((1, 1, 1), (1, 2, 2), 3, 8, dtype=torch.float64), backend="triton")
    with pytest.raises(RuntimeError, match="1 to 256 values"):
        ops.final_layer(**layer((1, 1, 1), (1, 16, 16), 3, 8), backend="triton")
