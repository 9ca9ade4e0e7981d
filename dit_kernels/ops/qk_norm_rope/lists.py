"""The lists of qk_norm_rope's schema hold only what exists: what is saved, and what a backward is given."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dit_kernels.ops import row_statistics


def empty_outputs(q: Tensor, k: Tensor | None) -> list[Tensor]:
    # takes half of new_empty's time
    outputs = [torch.empty_like(q, memory_format=torch.contiguous_format)]
    if k is not None:
        outputs.append(torch.empty_like(k, memory_format=torch.contiguous_format))
    return outputs


def empty_statistics(q: Tensor, k: Tensor | None, norm: str, over: str) -> list[Tensor]:
    """Of q's rows, then of k's."""
    axes = 3 if over == "head" else 2
    found = row_statistics.empty(q, axes, norm)
    return found if k is None else found + row_statistics.empty(k, axes, norm)


def statistics(saved: Sequence[Tensor], k: Tensor | None) -> list[Tensor | None]:
    """q's mean and rstd, then k's, of what the forward saved."""
    if not saved:
        return [None] * 4
    of_q = len(saved) if k is None else len(saved) // 2
    return [
        *row_statistics.mean_and_rstd(saved[:of_q]),
        *row_statistics.mean_and_rstd(saved[of_q:]),
    ]


def given(
    grads: Sequence[Tensor | None], results: Sequence[Tensor | None]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of both outputs, None where nothing came back; those that only they reach are then zero."""
    dq, dk = (None if dy is None or dy.numel() == 0 else dy for dy in (*grads, None)[:2])
    for dy, own in ((dq, results[0:6:2]), (dk, results[1:6:2])):
        if dy is None:
            for result in own:
                if result is not None:
                    result.zero_()
    return dq, dk
