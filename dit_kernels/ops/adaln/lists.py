"""The lists of adaLN's schema hold only what exists: what a call makes, and which tensor its backward is given."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def made(
    residual: Tensor | None,
    x: Tensor,
    second: bool,
    norm: str,
    branch_norm: str,
    stats: bool,
) -> tuple[Tensor | None, ...]:
    """(residual_out, y, y2, branch_rstd, mean, rstd), empty; None for what this call does not make.

    `second` is whether there is a y2. Statistics are float32, of a float64 call float64.
    """
    like = x if residual is None else residual
    out = y = y2 = branch_rstd = mean = rstd = None
    if residual is not None:
        out = torch.empty_like(like, memory_format=torch.contiguous_format)
    if norm != "none":
        y = torch.empty_like(like, memory_format=torch.contiguous_format)
        if second:
            y2 = torch.empty_like(like, memory_format=torch.contiguous_format)
    if stats:
        exact = torch.float64 if like.dtype == torch.float64 else torch.float32
        samples, length, _ = x.shape
        if branch_norm == "rms":
            branch_rstd = x.new_empty((samples, length), dtype=exact)
        if norm == "layer":
            mean = x.new_empty((samples, length), dtype=exact)
        if norm != "none":
            rstd = x.new_empty((samples, length), dtype=exact)
    return out, y, y2, branch_rstd, mean, rstd


def given(
    grads: Sequence[Tensor | None],
    saved: Sequence[Tensor],
    residual: Tensor | None,
    x: Tensor,
    second: bool,
    norm: str,
    branch_norm: str,
) -> tuple[Tensor | None, ...]:
    """(dout, dy, dy2, stream, branch_rstd, mean, rstd); `stream` is what was normalised.

    Where no gradient reaches the norm, nothing of it is read: stream, mean and rstd are None too.
    """
    gradient, kept = iter(grads), iter(saved)
    dout = next(gradient) if residual is not None else None
    dy = next(gradient) if norm != "none" else None
    dy2 = next(gradient) if second else None
    stream = (x if residual is None else next(kept)) if norm != "none" else None
    branch_rstd = next(kept) if branch_norm == "rms" else None
    if dy is None and dy2 is None:
        return dout, None, None, None, branch_rstd, None, None
    mean = next(kept) if norm == "layer" else None
    return dout, dy, dy2, stream, branch_rstd, mean, next(kept)
