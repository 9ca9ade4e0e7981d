"""Feed-forwards whose gate is a Linear of its own: Lumina 2 and Z-Image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from dit_kernels.integrations import checking
from dit_kernels.integrations.fused import Fused, is_plain_linear
from dit_kernels.integrations.recognition import Row, adapts, fingerprint
from dit_kernels.ops.arguments import autocast_dtype


def halves(x: Tensor, first: nn.Linear, second: nn.Linear) -> Tensor:
    """Both Linears of x [..., C] side by side, [..., 2F]: each writes its half, nothing is copied."""
    weights = first.weight, second.weight
    # a check hands each Linear the product that it made before
    if torch.compiler.is_compiling() or checking.running() or forward_ad._current_level >= 0:
        return torch.cat([F.linear(x, weight) for weight in weights], dim=-1)
    return _Halves.apply(x, *weights) if torch.is_grad_enabled() else _products(x, *weights)


def _products(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    rows = x.flatten(0, -2)
    out = x.new_empty(len(rows), len(first) + len(second))
    for half, weight in zip(
        out.split([len(first), len(second)], dim=1), (first, second), strict=True
    ):
        torch.mm(rows, weight.T, out=half)
    return out.unflatten(0, x.shape[:-1])


class _Halves(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return _products(x, first, second)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        wanted, *wanted_of = ctx.needs_input_grad
        sides = dy.split([len(weight) for weight in weights], dim=-1)
        dx = None
        if wanted:
            dx = sides[0] @ weights[0] + sides[1] @ weights[1]
        grads = (
            side.flatten(0, -2).T @ x.flatten(0, -2) if want else None
            for side, want in zip(sides, wanted_of, strict=True)
        )
        return dx, *grads


def gated_rows(*names: str) -> Callable[[Any], Sequence[Row] | str]:
    def found(module: Any) -> Sequence[Row] | str:
        for name in names:
            if getattr(getattr(module, name), "bias", None) is not None:
                return f"its {name} has a bias"
        silu = getattr(type(module), "_forward_silu_gating", None)
        if silu is None and type(module.silu).__name__ not in ("FP32SiLU", "SiLU"):
            return f"its activation {type(module.silu).__name__} is not one that the op has"
        if silu is not None and fingerprint(silu) != "a1b4d9c056bd":
            return f"its activation ({fingerprint(silu)}) is not the one that is known"
        return [("", "swiglu")]

    return found


def gated(fused: Fused, x: Tensor, first: Any, gated: Any, last: Any) -> Any:
    """last(silu(first(x)) * gated(x)); the pre-activations alone are kept for the backward."""
    plain = all(is_plain_linear(linear) and linear.bias is None for linear in (first, gated))
    if (
        not plain
        or autocast_dtype(x) is not None
        or not x.dtype == first.weight.dtype == gated.weight.dtype
    ):
        return NotImplemented
    return fused.feed_forward(halves(x, first, gated), "swiglu-first", last)


@adapts(
    "LuminaFeedForward",
    "08acc452aae1",
    kind="feed_forward",
    rows=gated_rows("linear_1", "linear_3"),
    covers=("silu",),
)
def lumina_feed_forward(fused: Fused, self: Any, x: Tensor) -> Any:
    return gated(fused, x, self.linear_1, self.linear_3, self.linear_2)


@adapts("FeedForward", "5afbdd7ffeae", kind="feed_forward", rows=gated_rows("w1", "w3"))
def z_image_feed_forward(fused: Fused, self: Any, x: Tensor) -> Any:
    return gated(fused, x, self.w1, self.w3, self.w2)
