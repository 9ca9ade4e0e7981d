"""How the rows of a feed-forward's tensors are addressed: their leading axes folded into two."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def unsupported(x: Tensor) -> str | None:
    """Why a kernel cannot walk over x's rows, or None."""
    if x.dim() > 3 and not x.is_contiguous() and _axes(x) > 2:
        return f"x's leading axes must fold into two by their strides; got {list(x.stride())}"
    return None


def foldable(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """x and dy, copied as far as their leading axes do not fold into two together."""
    if _axes(x, dy) > 2:
        dy = dy.contiguous()
        if _axes(x, dy) > 2:
            x = x.contiguous()
    return x, dy


def arrange(*tensors: Tensor) -> tuple[int, int, list[tuple[int, int, int]]]:
    """(rows, rows of the inner axis, outer, inner and column stride of each tensor)."""
    sizes, strides = _folded(tensors[0].shape[:-1], *(t.stride()[:-1] for t in tensors))
    inner = sizes[-1] if sizes else 1
    rows = inner * (sizes[0] if len(sizes) == 2 else 1)
    return rows, inner, [
        (step[0] if len(step) == 2 else 0, step[-1] if step else 0, t.stride(-1))
        for t, step in zip(tensors, strides, strict=True)
    ]  # fmt: skip


def _axes(*tensors: Tensor) -> int:
    """The leading axes that are left when those that follow each other in memory are one."""
    return len(_folded(tensors[0].shape[:-1], *(t.stride()[:-1] for t in tensors))[0])


def _folded(
    shape: Sequence[int], *strides: Sequence[int]
) -> tuple[list[int], list[tuple[int, ...]]]:
    """The fewest axes that reach the same elements in every tensor: sizes, and each tensor's strides."""
    sizes: list[int] = []
    steps: list[tuple[int, ...]] = []
    for size, *step in zip(shape, *strides, strict=True):
        if size == 1:
            continue
        if sizes and all(o == size * i for o, i in zip(steps[-1], step, strict=True)):
            sizes[-1] *= size
            steps[-1] = tuple(step)
        else:
            sizes.append(size)
            steps.append(tuple(step))
    return sizes, [tuple(s[i] for s in steps) for i in range(len(strides))]
