"""What every op promises of its Triton backend: one graph, and derivatives of derivatives.

Schemas, fake kernels and what a call does beside launching are in tests/test_triton_fusion.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dit_kernels import ops, testing


def randn(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator)


def example(function: str, frames: int) -> dict[str, Any]:
    """Keyword arguments for a video of `frames` frames of 2 x 3 patches."""
    tokens = 6 * frames
    x, rows = randn(2, tokens, 40), randn(2, 40)
    q, k, v = randn(1, tokens, 3, 2, 16).unbind(2)
    cos, sin = ops.rope_3d((frames, 2, 3), (4, 6, 6))
    match function:
        case "adaln":
            return dict(x=x, shift=rows, scale=rows.flip(0), weight=randn(40))
        case "gated_residual":
            return dict(residual=x, branch=x.flip(1), gate=rows, gate_act="tanh")
        case "gated_adaln":
            return dict(residual=x, branch=x.flip(1), gate=rows, shift=rows.neg(), scale=rows * 2)
        case "qk_norm_rope":
            return dict(q=q, k=k, q_weight=randn(16), k_weight=randn(16).neg(), cos=cos, sin=sin)
        case "attention3d":
            return dict(q=q, k=k, v=v, grid=(frames, 2, 3), window_size=(2, 1, 3))
        case "patch_embed":
            return dict(
                video=randn(1, 4, frames, 4, 6), weight=randn(24, 4, 1, 2, 2), bias=randn(24)
            )
        case "unpatchify":
            return dict(
                tokens=randn(1, tokens, 16), grid=(frames, 2, 3), patch_size=(1, 2, 2), channels=4
            )
        case "final_layer":
            return dict(
                x=x, shift=rows, scale=rows.neg(), weight=randn(16, 40), bias=randn(16),
                grid=(frames, 2, 3), patch_size=(1, 2, 2), channels=4,
            )  # fmt: skip
        case "gelu_bias" | "swiglu":
            return dict(x=x, bias=randn(40))
    raise ValueError(function)


FUNCTIONS = (
    "adaln", "gated_residual", "gated_adaln", "qk_norm_rope", "attention3d", "patch_embed", "unpatchify",
    "final_layer", "gelu_bias", "swiglu",
)  # fmt: skip
every_function = pytest.mark.parametrize("function", FUNCTIONS)


@every_function
def test_every_op_has_an_example(function):
    assert set(FUNCTIONS) == {case.function for case in testing.cases(torch.float32)}
    assert example(function, 2)


@every_function
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_one_graph(function, dynamic):
    """torch.compile takes forward and backward whole and gives the same bits; dynamic: at two lengths."""
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda **kwargs: getattr(ops, function)(**kwargs, backend="triton"),
        fullgraph=True, dynamic=dynamic, backend="aot_eager",
    )  # fmt: skip
    for frames in (2, 3) if dynamic else (2,):
        kwargs = example(function, frames)
        expected = testing.run(function, kwargs, backend="triton").all()
        actual = testing.run(compiled, kwargs).all()
        assert expected.keys() == actual.keys()
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


@every_function
def test_second_derivatives(function):
    """By the accuracy rule: the gradients of a function of the gradients."""

    def second(dtype: torch.dtype, backend: str | None) -> dict[str, Tensor]:
        kwargs = testing.converted(example(function, 2), dtype)
        leaves = {
            name: value.detach().clone().requires_grad_()
            for name, value in kwargs.items()
            if isinstance(value, Tensor)
        }
        results = getattr(ops, function)(**{**kwargs, **leaves}, backend=backend)
        results = results if isinstance(results, tuple) else (results,)
        options: dict[str, Any] = dict(allow_unused=True, materialize_grads=True)
        inputs = list(leaves.values())
        total = sum(result.sin().sum() for result in results)
        grads = torch.autograd.grad(total, inputs, create_graph=True, **options)
        again = torch.autograd.grad(sum(g.square().sum() for g in grads), inputs, **options)
        return dict(zip(leaves, again, strict=True))

    actual, oracle = second(torch.float32, "triton"), second(torch.float64, "reference")
    with testing.plain_torch():
        eager = second(torch.float32, None)
    for name, exact in oracle.items():
        testing.assert_accurate(actual[name], exact, eager[name], name)
