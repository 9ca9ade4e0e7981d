"""Bias and activation of the feed-forward on the kernels of `csrc/feed_forward.cu`."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_kernels.ops import cuda_extension
from dit_kernels.ops.cuda_extension import kernels, where

# the number in csrc/feed_forward.h, and columns of x for one of y
_ACTS = {"gelu-tanh": (0, 1), "gelu-none": (1, 1), "swiglu-first": (2, 2), "swiglu-second": (3, 2)}


def supports(x: Tensor, bias: Tensor | None, act: str) -> str | None:
    if not x.is_contiguous() and _axes(x) > 2:
        return f"x's leading axes must fold into two by their strides; got {list(x.stride())}"
    return cuda_extension.unsupported(x, bias)


def forward(x: Tensor, bias: Tensor | None, act: str, stats: bool) -> list[Tensor]:
    code, halves = _ACTS[act]
    dense = x.is_contiguous()
    # of what is contiguous, empty_like takes half of new_empty's time
    y = torch.empty_like(x) if dense and halves == 1 else x.new_empty(_shape(x, halves))
    if count := y.numel():
        columns = y.shape[-1]
        if dense:
            rows = inner = count // columns
            strides = [0, halves * columns, 1]
        else:
            rows, inner, strides = _arrange(x)
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
    dx = x.new_empty(x.shape) if needs[0] else None
    dbias = bias.new_empty(bias.shape) if bias is not None and needs[1] else None
    wanted = [t for t in (dx, dbias) if t is not None]
    if dy is None or dy.numel() == 0:
        return [t.zero_() for t in wanted]
    columns = dy.shape[-1]
    if dy.is_contiguous() and x.is_contiguous():
        rows = inner = dy.numel() // columns
        strides = [0, columns, 1, 0, x.shape[-1], 1]
    else:
        if _axes(x, dy) > 2:
            dy = dy.contiguous()
            if _axes(x, dy) > 2:
                x = x.contiguous()
        rows, inner, strides = _arrange(dy, x)
    sums = None
    if dbias is not None:
        parts = kernels().feed_forward_bwd_parts(rows, columns)
        sums = x.new_empty((parts, x.shape[-1]), dtype=torch.float32)
    kernels().feed_forward_bwd(
        *where(x), dy, x, bias, dx, sums, rows, inner, columns, *strides, _ACTS[act][0]
    )
    if sums is not None:
        kernels().add_rows(*where(x), sums, dbias, 1, sums.shape[0], sums.shape[1])
    return wanted


def _axes(*tensors: Tensor) -> int:
    """The leading axes that are left when those that follow each other in memory are one."""
    leading = (t.stride()[:-1] for t in tensors)
    return len(cuda_extension.folded(tensors[0].shape[:-1], *leading)[0])


def _shape(x: Tensor, halves: int) -> tuple[int, ...]:
    return (*x.shape[:-1], x.shape[-1] // halves)


def _arrange(*tensors: Tensor) -> tuple[int, int, list[int]]:
    """(rows, rows of the inner axis, outer, inner and column stride of each tensor)."""
    first = tensors[0]
    sizes, strides = cuda_extension.folded(first.shape[:-1], *(t.stride()[:-1] for t in tensors))
    inner = sizes[-1] if sizes else 1
    rows = inner * (sizes[0] if len(sizes) == 2 else 1)
    steps = []
    for tensor, step in zip(tensors, strides, strict=True):
        steps += [step[0] if len(step) == 2 else 0, step[-1] if step else 0, tensor.stride(-1)]
    return rows, inner, steps
