"""Bias and activation between the two Linears of a feed-forward, in one pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from dit_kernels import backends
from dit_kernels.ops.arguments import check_choice, check_float, check_given, check_shape
from dit_kernels.ops.feed_forward import reference
from dit_kernels.ops.registration import FusedOp


def gelu_bias(
    x: Tensor,
    bias: Tensor | None = None,
    *,
    approximate: str = "tanh",
    backend: str | None = None,
) -> Tensor:
    """GELU of x + bias.

        y = gelu(x + bias),    gelu(z) = z * Phi(z), or with "tanh"
        gelu(z) = z / 2 * (1 + tanh(sqrt(2 / pi) * (z + 0.044715 z^3)))

    Args:
        x: [..., F], any strides: the first Linear's product without its bias.
        bias: [F].
        approximate: "tanh" or "none" (erf).
        backend: "auto", "reference", "triton" or "cuda"; None leaves it to `use_backend`.

    Returns:
        y in x's shape and dtype.

    Raises:
        ValueError: a shape or a value that does not fit; TypeError: a dtype; RuntimeError: the backend
        asked for is not there.

    Source: Hendrycks & Gimpel 2016, section 2. Computed in float32, rounded once.
    """
    check_given("gelu_bias", x=x)
    check_choice("gelu_bias", "approximate", approximate, ("tanh", "none"))
    check_float("gelu_bias", x=x, bias=bias)
    check_shape("gelu_bias", "bias", bias, x.shape[-1:], "[F]")
    return _op((x, bias), (f"gelu-{approximate}",), backend)[0]


def swiglu(
    x: Tensor, bias: Tensor | None = None, *, gate: str = "first", backend: str | None = None
) -> Tensor:
    """Gated SiLU of the two halves of x + bias.

        (a, b) = halves of x + bias;    y = silu(a) * b  ("first"),  a * silu(b)  ("second")

    Args:
        x: [..., 2F], any strides.
        bias: [2F].
        gate: which half goes through SiLU, "first" (Flux2, Lumina2) or "second" (Mochi).
        backend: "auto", "reference", "triton" or "cuda"; None leaves it to `use_backend`.

    Returns:
        y [..., F] in x's dtype.

    Raises:
        ValueError: a shape or a value that does not fit; TypeError: a dtype; RuntimeError: the backend
        asked for is not there.

    Source: Shazeer 2020, "GLU Variants Improve Transformer", equation 5. Computed in float32, rounded once.
    """
    check_given("swiglu", x=x)
    check_choice("swiglu", "gate", gate, ("first", "second"))
    check_float("swiglu", x=x, bias=bias)
    check_shape("swiglu", "bias", bias, x.shape[-1:], "[2F]")
    if x.shape[-1] % 2:
        raise ValueError(f"swiglu: x must be [..., 2F]; got {list(x.shape)}")
    return _op((x, bias), (f"swiglu-{gate}",), backend)[0]


def activated_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, act: str, backend: str | None = None
) -> Tensor:
    """Activation and the Linear after it, saving only the pre-activation for backward.

        y = act(x) @ weight.T + bias

    The activation is computed again in backward: it is one pass over memory, and keeping it would
    double what a feed-forward saves.

    Args:
        x: [..., F], gated [..., 2F]: the first Linear's output.
        weight, bias: of the second Linear, [C, F] and [C].
        act: "gelu-tanh", "gelu-none", "swiglu-first" or "swiglu-second".
        backend: of the activation.

    Returns:
        y [..., C].
    """
    name = backends.requested("feed_forward", backend)
    plain = name == backends.PLAIN or not torch.is_grad_enabled()
    if plain or (not torch.compiler.is_compiling() and forward_ad._current_level >= 0):
        return F.linear(_op((x, None), (act,), backend)[0], weight, bias)
    return _ActivatedLinear.apply(x, weight, bias, act, name)


class _ActivatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, act: str, name: str) -> Tensor:
        return F.linear(_activation(x, None, act, False, name)[0], weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, ctx.act, ctx.backend_name = inputs
        ctx.save_for_backward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():
            # under create_graph: through the two ops, which have second derivatives
            x, weight = x.view_as(x), weight.view_as(weight)
            a = _op((x, None), (ctx.act,), ctx.backend_name or None)[0]
            y = F.linear(a.to(dy.dtype), weight.to(dy.dtype))
            wanted = [t for t, need in ((x, need_x), (weight, need_weight)) if need]
            found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True) if wanted else ())
            dbias = dy.flatten(0, -2).sum(0).to(bias.dtype) if need_bias else None
            dx, dweight = (next(found) if need else None for need in (need_x, need_weight))
            return dx, dweight, dbias, None, None
        dx, dweight, dbias = None, None, None
        rows = dy.flatten(0, -2)
        if need_x:
            # under autocast the product ran in dy's dtype
            da = (dy @ weight.to(dy.dtype)).to(x.dtype)
            needs = [True, False]
            (dx,) = _activation_backward([da], x, None, [], ctx.act, needs, ctx.backend_name)
        if need_weight:
            (a,) = _activation(x, None, ctx.act, False, ctx.backend_name)
            dweight = (rows.T @ a.flatten(0, -2).to(dy.dtype)).to(weight.dtype)
        if need_bias:
            dbias = rows.sum(0).to(bias.dtype)
        return dx, dweight, dbias, None, None


def _fake(x: Tensor, bias: object, act: str, stats: bool) -> list[Tensor]:
    width = x.shape[-1] if act.startswith("gelu") else x.shape[-1] // 2
    return [x.new_empty((*x.shape[:-1], width))]


_op = FusedOp("feed_forward", "Tensor x, Tensor? bias", "str act", reference, _fake)
_activation, _activation_backward = _op.forward_op, _op.backward_op
