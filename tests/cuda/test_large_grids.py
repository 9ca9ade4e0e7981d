"""A kernel walks over what its grid cannot hold: in the emulator y may end long before 65535."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dit_kernels import testing
from dit_kernels.ops import cuda_extension


@pytest.fixture
def emulator() -> Iterator[Any]:
    emulator = cuda_extension.kernels()
    yield emulator
    emulator.set_most_blocks(65535)
    emulator.set_seed(0)


@pytest.mark.parametrize("channels", [40, 33], ids=["vectors", "general"])
@pytest.mark.parametrize("groups", ["frames", "indexed"])
def test_adaln_sums(emulator, groups, channels):
    """Sums of modulation rows: the same bits from any grid, and each of them written once."""
    if groups == "frames":
        x = torch.randn(1, 7 * 90, channels)
        kwargs = dict(x=x, shift=torch.randn(1, 7, channels))
    else:
        index = torch.randint(0, 7, (2, 28), dtype=torch.int32)
        x = torch.randn(2, 28, channels)
        kwargs = dict(x=x, shift=torch.randn(7, channels), row_index=index)
    runs = {}
    for blocks in (65535, 5, 2, 1):
        emulator.set_most_blocks(blocks)
        emulator.set_seed(blocks)
        before = emulator.written()
        found = testing.run("adaln", kwargs, backend="cuda").all()
        runs[blocks] = found, emulator.written() - before
    whole, written = runs[65535]
    for found, bytes_written in runs.values():
        assert all(torch.equal(found[name], whole[name]) for name in whole)
        assert bytes_written == written

    # and they were the sums of a kernel that walked
    emulator.record(True)
    testing.run("adaln", kwargs, backend="cuda")
    launches = emulator.recorded()
    emulator.record(False)
    assert [grid[1] for name, grid, *_ in launches if "adaln_bwd_sums" in name] == [1]


def test_a_grid_that_is_too_large(emulator):
    with pytest.raises(ValueError, match="1 to 65535 blocks"):
        emulator.set_most_blocks(65536)
    # the launcher of these has no loop
    emulator.set_most_blocks(1)
    x, weight = torch.randn(1, 4, 1, 8, 8), torch.randn(8, 4, 1, 8, 8)
    with pytest.raises(RuntimeError, match=r"patch_embed_bwd_weight_kernel.*invalid launch: grid"):
        testing.run("patch_embed", dict(video=x, weight=weight), backend="cuda")
