"""How the Triton kernels cut a row into powers of two, and from what size on they refuse one."""

from __future__ import annotations

import itertools

import pytest
import torch

from dit_kernels import ops
from dit_kernels.ops.adaln import tiling


def test_rows_are_cut_without_waste():
    for kernel, channels in itertools.product(tiling.HELD, range(1, 16385, 7)):
        parts = tiling.configure(channels, kernel).parts
        assert sum(parts) >= channels > sum(parts[:-1])
        assert all(p & (p - 1) == 0 for p in parts)
        assert channels < 512 or 7 * (sum(parts) - channels) <= channels
    assert tiling.split_row(1152, warps=2) == (1024, 128)
    assert tiling.split_row(5120, warps=4) == (1024,) * 5


def test_adaln():
    with pytest.raises(RuntimeError, match="at most 16384 channels; got 16385"):
        ops.adaln(torch.empty(1, 1, 16385), backend="triton")


def test_qk_norm_rope():
    with pytest.raises(RuntimeError, match="1 to 2048 channels"):
        ops.qk_norm_rope(torch.randn(1, 1, 1, 4096), backend="triton")


def test_final_layer():
    x, rows, weight = torch.randn(1, 1, 8), torch.randn(1, 8), torch.randn(768, 8)
    with pytest.raises(RuntimeError, match="1 to 256 values"):
        ops.final_layer(x, rows, rows, weight, None, (1, 1, 1), (1, 16, 16), 3, backend="triton")
