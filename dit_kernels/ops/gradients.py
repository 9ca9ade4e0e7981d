"""Gradients that a backward fills."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def empty(inputs: Iterable[Tensor | None], needs: Sequence[bool]) -> list[Tensor | None]:
    """A gradient to be filled, contiguous, for each input that needs one."""
    # takes half of new_empty's time
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format)
        if need and t is not None
        else None
        for t, need in zip(inputs, needs, strict=True)
    ]
