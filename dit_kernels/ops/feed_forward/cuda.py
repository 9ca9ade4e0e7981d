"""Bias and activation of the feed-forward on the kernels of `csrc/feed_forward.cu`."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_kernels.ops import cuda_extension, gradients
from dit_kernels.ops.cuda_extension import kernels, where
from dit_kernels.ops.feed_forward import axes

# the number in csrc/feed_forward.h, and columns of x for one of y
_ACTS = {"gelu-tanh": (0, 1), "gelu-none": (1, 1), "swiglu-first": (2, 2), "swiglu-second": (3, 2)}


def supports(x: Tensor, bias: Tensor | None, act: str) -> str | None:
    return axes.unsupported(x) or cuda_extension.unsupported(x, bias)


def forward(x: Tensor, bias: Tensor | None, act: str, stats: bool) -> list[Tensor]:
    code, halves = _ACTS[act]
    dense = x.is_contiguous()
    # of what is contiguous, empty_like takes half of new_empty's time
    y = torch.empty_like(x) if dense and halves == 1 else x.new_empty(_shape(x, halves))
    if count := y.numel():
        columns = y.shape[-1]
        if dense:
            rows = inner = count // columns
            strides = (0, halves * columns, 1)
        else:
            rows, inner, (strides,) = axes.arrange(x)
        kernels().feed_forward_fwd(*where(x), x, bias, y, rows, inner, columns, *strides, code)
    return [y]


def backward(
    grads: list[Tensor | None],
    x: Tensor,
    bias: Tensor | None,
    saved: list[Tensor],
    act: str,
    needs: list[bool],
) -> list[Tensor]:
    (dy,) = grads
    dx, dbias = results = gradients.empty((x, bias), needs)
    wanted = [t for t in results if t is not None]
    if dy is None or dy.numel() == 0:
        return [t.zero_() for t in wanted]
    columns = dy.shape[-1]
    if dy.is_contiguous() and x.is_contiguous():
        rows = inner = dy.numel() // columns
        of_dy, of_x = (0, columns, 1), (0, x.shape[-1], 1)
    else:
        x, dy = axes.foldable(x, dy)
        rows, inner, (of_dy, of_x) = axes.arrange(dy, x)
    sums = None
    if dbias is not None:
        sums = gradients.partial_sums(dbias, kernels().feed_forward_bwd_parts(rows, columns))
    kernels().feed_forward_bwd(
        *where(x), dy, x, bias, dx, sums, rows, inner, columns, *of_dy, *of_x, _ACTS[act][0]
    )
    if sums is not None:
        kernels().add_rows(*where(x), sums, dbias, 1, sums.shape[0], sums.shape[1])
    return wanted


def _shape(x: Tensor, halves: int) -> tuple[int, ...]:
    return (*x.shape[:-1], x.shape[-1] // halves)
