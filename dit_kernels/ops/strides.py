"""How tensors lie in memory, whatever the backend."""

from __future__ import annotations

from torch import Tensor


def adjacent(vector: Tensor | None) -> Tensor | None:
    """A bias, weight or table [C], copied where its elements have gaps: it is nothing next to the rows it serves."""
    return vector if vector is None or vector.stride(0) == 1 else vector.contiguous()
