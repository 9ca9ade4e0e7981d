"""Rows whose norm every float32 computation rounds to the same 16 bits: eager rounding is held to equality on them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def settled_rows(
    count: int,
    norm: str,
    dtype: torch.dtype,
    channels: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """[count, channels] such that neither norm * weight nor that plus bias rounds otherwise by its last bits.

    Four units in the last place of float32, of the normalised value and of its mean, are what the order
    of a sum, a reciprocal root or a fused multiply-add may change.
    """
    x = torch.randn(128 * count, channels).to(dtype)
    n = (F.layer_norm if norm == "layer" else F.rms_norm)(x.double(), (channels,), eps=eps)
    change = n.abs() + 1
    if weight is not None:
        n, change = n * weight.double(), change * weight.double().abs()
    settled = _settled(n, change, dtype)
    if bias is not None:
        settled &= _settled(n + bias.double(), change + bias.double().abs(), dtype)
    return x[settled][:count]


def _settled(n: Tensor, size: Tensor, dtype: torch.dtype) -> Tensor:
    change = 2**-21 * size
    return ((n - change).to(dtype) == (n + change).to(dtype)).all(-1)
