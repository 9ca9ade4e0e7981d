"""What the backwards of the ops share: gradients to be filled, and sums over rows in two stages.

The gradient of a parameter that every row reads is summed in two stages: each program adds what it
walked over into one float32 row, and a second kernel adds those rows in fixed order. Nothing is added
atomically, so that the result is deterministic.
"""

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


def partial_sums(
    gradient: Tensor | None, programs: int, columns: int | None = None
) -> Tensor | None:
    """The first stage's rows, one a program, of these columns or the whole gradient; None without a sum."""
    if gradient is None or not programs:
        return None
    columns = gradient.numel() if columns is None else columns
    return gradient.new_empty((programs, columns), dtype=torch.float32)


def rows_of_a_program(rows: int, across: int, slots: int, tile: int) -> int:
    """Rows that one program of a weight's gradient walks over: `across` programs side by side, and as many
    such rows of programs as `slots` hold, each with at least four tiles.
    """
    programs = max(1, min(slots // across, -(-rows // (4 * tile))))
    return tile * -(-rows // (tile * programs))
