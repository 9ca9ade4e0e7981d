"""What is attention3d's in Triton alone: its tiles, which kernels it launches, and what it refuses.

Values are compared in tests/kernels. Small tiles give small shapes many of them; the number of warps and
stages means nothing here.
"""

from itertools import product

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from dit_kernels import ops, testing
from dit_kernels.ops import triton_launch
from dit_kernels.ops.attention3d import reference, triton_backward
from dit_kernels.ops.attention3d import triton as backend
from dit_kernels.ops.attention3d import triton_tiles as tiles
from tests.kernels.test_attention3d_kernels import WINDOWS, qkv

DEFAULT = backend.configuration


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    use_tiles(monkeypatch, 32, 16)


def use_tiles(monkeypatch, block_m, block_n):
    triton_launch.Plans.clear()
    monkeypatch.setattr(backend, "configuration", lambda *_: backend.Config(block_m, block_n, 4, 1))


@pytest.fixture
def launched(monkeypatch):
    """The kernels of each launch."""
    found = []
    launch = triton_launch.launch
    monkeypatch.setattr(
        triton_launch, "launch", lambda k, *a, **o: found.append(k) or launch(k, *a, **o)
    )
    return found


def test_head_dims_in_parts():
    found = {dim: backend.parts(dim) for dim in (64, 72, 80, 88, 96, 112, 128, 136, 256)}
    assert found == {
        64: (64,), 72: (64, 16), 80: (64, 16), 88: (64, 32), 96: (64, 32), 112: (64, 32, 16),
        128: (128,), 136: (256,), 256: (256,),
    }  # fmt: skip
    assert all(sum(backend.parts(d)) - d < (16 if d <= 128 else 128) for d in range(8, 257, 8))


@pytest.mark.parametrize("kernel", ["fwd", "dq", "dkdv"])
def test_default_tiles(kernel, monkeypatch):
    config = DEFAULT(kernel, 64, torch.bfloat16, "sm_90")
    use_tiles(monkeypatch, config.block_m, config.block_n)
    case = testing.Case("attention3d", "", "attention3d", qkv(1, 150, 1, 24, dtype=torch.bfloat16))
    assert all(found.ok for found in testing.measure(case, backend="triton"))


@pytest.mark.parametrize(
    ("layout", "expected"), [("rows", 8), ("heads-first", 8), ("dim-strided", 1), ("unaligned", 1)]
)
def test_channels_that_are_read_at_once(layout, expected, monkeypatch):
    units = []
    unit = backend._unit
    monkeypatch.setattr(backend, "_unit", lambda *x: units.append(unit(*x)) or units[-1])
    memory = torch.randn(2 * 19 * 2 * 25).half()
    strides = {
        "rows": (912, 48, 24, 1),
        "heads-first": (912, 24, 456, 1),
        "dim-strided": (912, 48, 1, 2),
        "unaligned": (950, 50, 25, 1),
    }
    x = memory.as_strided((2, 19, 2, 24), strides[layout])
    ops.attention3d(x, x, x, backend="triton")
    assert units[0] == expected


@pytest.mark.parametrize("wanted", ["q", "k", "v", "kv"])
def test_no_kernel_for_gradients_that_are_not_asked_for(wanted, launched):
    kwargs = qkv(1, 20, 1, 16, dtype=torch.bfloat16)
    leaves = {n: x.requires_grad_(n in wanted) for n, x in kwargs.items()}
    ops.attention3d(**leaves, backend="triton").sum().backward()
    assert (triton_backward.attention3d_dq_kernel in launched) == ("q" in wanted)
    assert (triton_backward.attention3d_dkdv_kernel in launched) == (wanted != "q")


@pytest.mark.parametrize(
    "form",
    [{}, dict(grid=(2, 3, 5), window_size=(2, 2, 3), causal_time=True)],
    ids=["dense", "window"],
)
def test_dk_and_dv_of_a_launch_each(form, launched, monkeypatch):
    """As where the two don't fit the registers together: the same bits."""
    kwargs = {**qkv(1, 30, 2, 112, kv_heads=1, dtype=torch.bfloat16), **form}
    together = testing.run("attention3d", kwargs, backend="triton").all()
    monkeypatch.setattr(backend, "_apart", lambda *_: True)
    apart = testing.run("attention3d", kwargs, backend="triton").all()
    assert launched.count(triton_backward.attention3d_dkdv_kernel) == 1 + 2
    assert all(torch.equal(apart[name], together[name]) for name in together)


def test_offsets_past_2_31(monkeypatch):
    """The variant for strides whose product with a tile's rows doesn't fit 32 bits."""
    kwargs = dict(**qkv(1, 60, 1, 16), grid=(3, 4, 5), window_size=(2, 3, 3))
    narrow = testing.run("attention3d", kwargs, backend="triton").all()
    q = kwargs["q"]
    assert not backend._wide(backend._call(q, None, None, (), (), (), 0, False, False), (q,),
                             backend.Config(32, 16, 4, 1), backend._Tiles(None, 1, (0,) * 15))  # fmt: skip
    monkeypatch.setattr(backend, "_wide", lambda *_: True)
    wide = testing.run("attention3d", kwargs, backend="triton").all()
    assert all(torch.equal(narrow[name], wide[name]) for name in narrow)


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        (qkv(1, 4, 1, 264), "up to 256"),
        (dict(**qkv(1, 4, 1, 16), scale=-1.0), "scale must be positive"),
    ],
    ids=["head-dim", "scale"],
)
def test_unsupported(kwargs, reason):
    with pytest.raises(RuntimeError, match=reason):
        ops.attention3d(**kwargs, backend="triton")
    by_auto = ops.attention3d(**kwargs, backend="auto")
    assert torch.equal(by_auto, ops.attention3d(**kwargs, backend="reference"))


# -- geometry ------------------------------------------------------------------------------------------


@triton.jit
def _boxes_kernel(
    seen_ptr, from_ptr, gt, gh, gw, wt, wh, ww, st, sh, sw, qt, qh, qw, kt, kh, kw, CAUSAL: tl.constexpr
):  # fmt: skip
    """First cube and cubes along each axis: those that query cube i visits, and those that visit key cube i."""
    i = tl.program_id(0)
    grid, window, stride, q_cube, k_cube = (gt, gh, gw), (wt, wh, ww), (st, sh, sw), (qt, qh, qw), (kt, kh, kw)  # fmt: skip
    if i < tiles.patch_tiles(0, grid, q_cube, 1, True):
        origin = tiles.tile_origin(i, grid, q_cube)
        first, _ = tiles.seen_by(origin, grid, window, stride, i < 0, CAUSAL)
        last = tiles.last_of(origin, grid, q_cube)
        _, end = tiles.seen_by(last, grid, window, stride, i < 0, CAUSAL)
        corner, count, _ = tiles.cubes_of(first, end, k_cube)
        for axis in tl.static_range(3):
            tl.store(seen_ptr + i * 6 + axis, corner[axis])
            tl.store(seen_ptr + i * 6 + 3 + axis, count[axis])
    if i < tiles.patch_tiles(0, grid, k_cube, 1, True):
        origin = tiles.tile_origin(i, grid, k_cube)
        first, end = tiles.seen_from(origin, grid, window, stride, k_cube, i < 0, CAUSAL)
        corner, count, _ = tiles.cubes_of(first, end, q_cube)
        for axis in tl.static_range(3):
            tl.store(from_ptr + i * 6 + axis, corner[axis])
            tl.store(from_ptr + i * 6 + 3 + axis, count[axis])


def needed(grid, window, stride, q_cube, k_cube, causal):
    """Pairs of cubes of which some query sees some key, from the definition; a cube is named by its first token."""
    axes = []
    for axis, length in enumerate(grid):
        i = torch.arange(length)
        start = reference.window_start(i, torch.tensor(length), window[axis], stride[axis])[:, None]
        seen = (i >= start) & (i < start + window[axis])
        if causal and axis == 0:
            seen &= i <= i[:, None]
        q, k = (index // side * side for index, side in zip(
            seen.nonzero().unbind(1), (q_cube[axis], k_cube[axis]), strict=True))  # fmt: skip
        axes.append(set(zip(q.tolist(), k.tolist(), strict=True)))
    found = set()
    for t, h, w in product(*axes):
        q, k = zip(t, h, w, strict=True)
        found.add(tuple((p[0] * grid[1] + p[1]) * grid[2] + p[2] for p in (q, k)))
    return found


def pairs_of(boxes, grid, cube, other):
    """(first token of cube i, first token of a cube in its box)."""
    corners = list(
        product(*(range(0, length, side) for length, side in zip(grid, cube, strict=True)))
    )

    def token(corner):
        return (corner[0] * grid[1] + corner[1]) * grid[2] + corner[2]

    for corner, box in zip(corners, boxes.tolist(), strict=False):
        axes = zip(box[:3], box[3:], other, strict=True)
        for at in product(*(range(f * side, (f + n) * side, side) for f, n, side in axes)):
            yield token(corner), token(at)


@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize(
    "name", ["neighborhood", "even-window", "blocked-with-tails", "sliding-tile", "one-axis"]
)
def test_only_the_tiles_that_are_needed_are_visited(name, causal):
    grid, window, stride, _ = WINDOWS[name]
    for q_cube, k_cube in (
        ((1, 2, 3), (2, 2, 2)),
        tiles.choose_cubes((grid,), window, stride, 8, 16),
    ):
        programs = max(tiles.count_tiles(grid, cube) for cube in (q_cube, k_cube))
        seen, seen_from = (torch.zeros((programs, 6), dtype=torch.int32) for _ in range(2))
        _boxes_kernel[(programs,)](
            seen, seen_from, *grid, *window, *stride, *q_cube, *k_cube, CAUSAL=causal
        )
        visited = {(q, k) for q, k in pairs_of(seen, grid, q_cube, k_cube)}
        back = {(q, k) for k, q in pairs_of(seen_from, grid, k_cube, q_cube)}
        pairs = needed(grid, window, stride, q_cube, k_cube, causal)
        assert visited == pairs
        assert back == pairs


def test_cubes_waste_little():
    """21 x 30 x 52 patches of a Wan video: 8% of the lanes at most, where (6, 8, 8) wastes 31%."""
    grid = (21, 30, 52)
    cubes = tiles.choose_cubes((grid,), (6, 12, 24), (1, 1, 1), 128, 128)
    for cube in cubes:
        lanes = tiles.count_tiles(grid, cube) * 128
        assert sum(cube) <= tiles.SIDES
        assert np.prod(cube) <= 128
        assert lanes / np.prod(grid) < 1.2


def test_visited_share_of_a_long_video():
    """Pairs of tiles against N x N: near the window's own share."""
    grid, window = (21, 30, 52), (6, 12, 24)
    q_cube, k_cube = tiles.choose_cubes((grid,), window, (1, 1, 1), 128, 128)
    pairs = np.prod([
        tiles._visits(length, w, 1)[q, k]
        for length, w, q, k in zip(grid, window, q_cube, k_cube, strict=True)
    ])  # fmt: skip
    share = pairs * 128 * 128 / np.prod(grid) ** 2
    exact = np.prod(window) / np.prod(grid)
    assert share < 4 * exact
    assert share < 0.2
