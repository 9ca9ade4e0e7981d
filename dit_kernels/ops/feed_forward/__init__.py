"""Bias and activation between the two Linears of a feed-forward, in one pass."""

from __future__ import annotations

from torch import Tensor

from dit_kernels.ops.arguments import check_choice, check_float, check_shape
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
    check_choice("swiglu", "gate", gate, ("first", "second"))
    check_float("swiglu", x=x, bias=bias)
    check_shape("swiglu", "bias", bias, x.shape[-1:], "[2F]")
    if x.shape[-1] % 2:
        raise ValueError(f"swiglu: x must be [..., 2F]; got {list(x.shape)}")
    return _op((x, bias), (f"swiglu-{gate}",), backend)[0]


def _fake(x: Tensor, bias: object, act: str, stats: bool) -> list[Tensor]:
    width = x.shape[-1] if act.startswith("gelu") else x.shape[-1] // 2
    return [x.new_empty((*x.shape[:-1], width))]


_op = FusedOp("feed_forward", "Tensor x, Tensor? bias", "str act", reference, _fake)
