"""What a norm saves for its backward: a mean and the reciprocal of a deviation a row, or the latter alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def empty(x: Tensor, axes: int, norm: str) -> list[Tensor]:
    """[mean, rstd], [rstd] or nothing, of the shape of x's first axes, in float32 or x's float64."""
    if norm == "none":
        return []
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    # new_empty takes longer for a torch.Size, and twice as long as empty_like
    rstd = x.new_empty(tuple(x.shape)[:axes], dtype=exact)
    return [torch.empty_like(rstd), rstd] if norm == "layer" else [rstd]


def mean_and_rstd(saved: Sequence[Tensor]) -> list[Tensor | None]:
    """Both by their places: None for what the norm does not have, or was not saved."""
    return [*[None] * (2 - len(saved)), *saved]
