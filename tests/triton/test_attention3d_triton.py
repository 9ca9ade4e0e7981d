"""attention3d in Triton, interpreted, against the reference by the one accuracy rule.

Small tiles give small shapes many of them; the number of warps and stages means nothing here.
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

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EXAMPLES = list(reference.example_inputs(torch.float32))
DEFAULT = backend.configuration


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    use_tiles(monkeypatch, 32, 16)


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    """Attention as people write it, in the inputs' dtype: the bound doesn't rest on the reference's code."""

    def formula(q, k, v, *args):
        seen = reference._visibility(q, k, *args[:9])(slice(None))
        group = q.shape[2] // k.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        scores = q * args[10] @ k.transpose(-1, -2)
        if seen is None:
            return [(scores.softmax(-1) @ v).transpose(1, 2), scores.logsumexp(-1)]
        seen = seen[:, None]
        blind = ~seen.any(-1, keepdim=True)
        scores = scores.masked_fill(~seen & ~blind, -torch.inf)
        out = (scores.softmax(-1) @ v).masked_fill(blind, 0)
        return [out.transpose(1, 2), scores.logsumexp(-1).masked_fill(blind[..., 0], -torch.inf)]

    monkeypatch.setattr(reference, "eager", formula)


def use_tiles(monkeypatch, block_m, block_n):
    triton_launch.Plans.clear()
    monkeypatch.setattr(backend, "configuration", lambda *_: backend.Config(block_m, block_n, 4, 1))


def qkv(samples, tokens, heads, dim, *, keys=None, kv_heads=None, dtype=torch.float32):
    shapes = [(samples, tokens, heads, dim)]
    shapes += [(samples, keys or tokens, kv_heads or heads, dim)] * 2
    return dict(zip("qkv", (torch.randn(s).to(dtype) for s in shapes), strict=True))


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def check(kwargs, **options):
    """Outputs and gradients by the accuracy rule, whose bound must be one: eager is right as well."""
    case = testing.Case("attention3d", "here", "attention3d", kwargs)
    for found in testing.measure(case, backend="triton", **options):
        assert found.allowed < 0.5, f"{found.tensor}: eager itself is wrong"
        assert found.ok, f"{found.tensor}: error {found.error:.2e}, allowed {found.allowed:.2e}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", EXAMPLES)
def test_examples(name, dtype):
    function, kwargs = reference.example_inputs(DTYPES[dtype])[name]
    assert function == "attention3d"
    check(kwargs)


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
@pytest.mark.parametrize("dim", [8, 16, 40, 64, 72, 80, 88, 96, 112, 128, 240, 256])
def test_head_dims(dim, dtype):
    assert sum(backend.parts(dim)) - dim < (16 if dim <= 128 else 128)
    check(qkv(1, 37, 2, dim, kv_heads=1, dtype=DTYPES[dtype]))


def test_head_dims_in_parts():
    found = {dim: backend.parts(dim) for dim in (64, 72, 80, 88, 96, 112, 128, 136, 256)}
    assert found == {
        64: (64,), 72: (64, 16), 80: (64, 16), 88: (64, 32), 96: (64, 32), 112: (64, 32, 16),
        128: (128,), 136: (256,), 256: (256,),
    }  # fmt: skip


@pytest.mark.parametrize("tokens", [1, 15, 32, 33, 70])
def test_lengths_that_fill_no_tile(tokens):
    check(dict(**qkv(2, tokens, 1, 16, dtype=torch.bfloat16), return_lse=True))


@pytest.mark.parametrize("kernel", ["fwd", "dq", "dkdv"])
def test_default_tiles(kernel, monkeypatch):
    config = DEFAULT(kernel, 64, torch.bfloat16, "sm_90")
    use_tiles(monkeypatch, config.block_m, config.block_n)
    check(qkv(1, 150, 1, 24, dtype=torch.bfloat16))


@pytest.mark.parametrize("layout", ["qkv-packed", "heads-first", "dim-strided", "unaligned"])
def test_strides(layout, monkeypatch):
    units = []
    unit = backend._unit
    monkeypatch.setattr(backend, "_unit", lambda *x: units.append(unit(*x)) or units[-1])
    if layout == "qkv-packed":
        packed = torch.randn(2, 19, 3, 2, 24, dtype=torch.float16)
        q, k, v = packed.unbind(2)
    elif layout == "heads-first":
        q, k, v = (torch.randn(2, 2, 19, 24, dtype=torch.float16).transpose(1, 2) for _ in "qkv")
    elif layout == "dim-strided":
        q, k, v = (torch.randn(2, 19, 24, 2, dtype=torch.float16).transpose(2, 3) for _ in "qkv")
    else:
        q, k, v = (torch.randn(2, 19, 2, 25, dtype=torch.float16)[..., 1:] for _ in "qkv")
    check(dict(q=q, k=k, v=v))
    assert units[0] == (8 if layout in ("qkv-packed", "heads-first") else 1)


@pytest.mark.parametrize("name", ["kv_lens", "text_lens", "cu_seqlens"])
def test_lengths_that_are_a_column_of_a_table(name):
    """Beside each there is a number that is another length."""
    columns = {"kv_lens": [7, 3], "text_lens": [2, 5], "cu_seqlens": [0, 5, 6, 17]}
    other = {"kv_lens": {}, "text_lens": dict(text_tokens=5), "cu_seqlens": dict(max_seqlen=11)}
    column = columns[name]
    table = torch.tensor([[n, 1] for n in column], dtype=torch.int32)
    samples = 1 if name == "cu_seqlens" else 2
    check(dict(**qkv(samples, 17, 2, 16), **other[name], **{name: table[:, 0]}))


@pytest.mark.parametrize("shape", [(0, 8, 2, 16), (2, 0, 2, 16)])
def test_empty(shape):
    found = testing.run("attention3d", qkv(*shape), backend="triton").all()
    assert [x.shape for x in found.values()] == [shape] * 4


def test_no_keys():
    kwargs = dict(
        q=torch.randn(1, 5, 1, 16), k=torch.randn(1, 0, 1, 16), v=torch.randn(1, 0, 1, 16)
    )
    out, lse = ops.attention3d(**kwargs, return_lse=True, backend="triton")
    assert out.eq(0).all()
    assert lse.eq(-torch.inf).all()


# grid, window, stride, text tokens
WINDOWS = {
    "neighborhood": ((3, 5, 7), (3, 3, 3), (1, 1, 1), 0),
    "even-window": ((2, 6, 5), (2, 4, 2), (1, 1, 1), 0),
    "blocked": ((4, 4, 6), (2, 2, 3), (2, 2, 3), 0),
    "blocked-with-tails": ((3, 5, 7), (2, 2, 3), (2, 2, 3), 0),
    "sliding-tile": ((4, 6, 6), (4, 4, 2), (2, 2, 2), 0),
    "one-axis": ((1, 1, 50), (1, 1, 7), (1, 1, 3), 0),
    "image": ((1, 9, 8), (1, 3, 5), (1, 1, 2), 0),
    "whole-axis": ((2, 5, 9), (2, 5, 3), (1, 1, 1), 0),
    "text": ((2, 5, 5), (1, 3, 3), (1, 1, 1), 21),
}


@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("name", WINDOWS)
def test_windows(name, causal):
    grid, window, stride, text = WINDOWS[name]
    kwargs = qkv(1, int(np.prod(grid)) + text, 1, 16)
    check(dict(
        **kwargs, grid=grid, window_size=window, stride=stride, text_tokens=text, causal_time=causal,
    ))  # fmt: skip


@pytest.mark.parametrize("window", [None, (2, 2, 3)], ids=["dense", "window"])
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("first", [False, True], ids=["text-last", "text-first"])
def test_text(first, causal, window):
    check(dict(
        **qkv(2, 27 + 19, 1, 16), grid=(3, 3, 3), window_size=window, causal_time=causal,
        text_tokens=19, text_first=first, text_lens=int32(3, 18), kv_lens=int32(46, 40), return_lse=True,
    ))  # fmt: skip


@pytest.mark.parametrize("window", [None, (2, 2, 2)], ids=["dense", "window"])
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
def test_packed_grids(causal, window):
    """A grid a sequence, and text in each."""
    grids = ((3, 2, 3), (2, 2, 2), (2, 3, 5))
    lengths = [t * h * w + 5 for t, h, w in grids]
    ends = np.cumsum([0, *lengths])
    check(dict(
        **qkv(1, int(ends[-1]), 1, 16), cu_seqlens=int32(*ends), max_seqlen=max(lengths), grid=grids,
        window_size=window, text_tokens=5, text_lens=int32(2, 5, 3), causal_time=causal, text_first=True,
    ))  # fmt: skip


def test_packed_one_grid():
    check(dict(
        **qkv(1, 72, 1, 16), cu_seqlens=int32(0, 24, 48, 72), max_seqlen=24, grid=(2, 3, 4),
        window_size=(1, 3, 3),
    ))  # fmt: skip


def test_packed_many_short_and_empty_sequences():
    ends = [0, 1, 1, 4, 37, 37, 38, 100]
    check(dict(**qkv(1, 100, 2, 16), cu_seqlens=int32(*ends), max_seqlen=62, return_lse=True))


def test_packed_tail_of_no_sequence():
    """Tokens past the last sequence (a padded batch) give 0 and -inf, and get no gradient."""
    kwargs = dict(**qkv(1, 100, 1, 16), cu_seqlens=int32(0, 9, 30), max_seqlen=21, return_lse=True)
    found = testing.run("attention3d", kwargs, backend="triton")
    assert found.outputs["out0"][:, 30:].eq(0).all()
    assert found.outputs["out1"][..., 30:].eq(-torch.inf).all()
    assert all(grad[:, 30:].eq(0).all() for grad in found.grads.values())


def test_query_that_sees_nothing():
    kwargs = dict(**qkv(2, 9, 2, 16, keys=33), kv_lens=int32(0, 20), return_lse=True)
    found = testing.run("attention3d", kwargs, backend="triton")
    assert found.outputs["out0"][0].eq(0).all()
    assert found.outputs["out1"][0].eq(-torch.inf).all()
    assert all(grad[0].eq(0).all() for grad in found.grads.values())
    check(kwargs)


def test_padding_may_hold_anything():
    kwargs = dict(**qkv(1, 9, 1, 16, keys=40), kv_lens=int32(21))
    clean = testing.run("attention3d", kwargs, backend="triton").all()
    for x in (kwargs["k"], kwargs["v"]):
        x[:, 21:] = torch.nan
    dirty = testing.run("attention3d", kwargs, backend="triton").all()
    assert all(torch.equal(clean[name], dirty[name]) for name in clean)


def test_large_scores():
    """Scores whose exponential alone would overflow."""
    kwargs = qkv(1, 40, 1, 16, dtype=torch.float16)
    kwargs["q"] *= 15
    check(dict(**kwargs, kv_lens=int32(35)))


@pytest.mark.parametrize("wanted", ["q", "k", "v", "kv"])
def test_only_the_gradients_asked_for(wanted):
    kwargs = qkv(1, 20, 1, 16, dtype=torch.bfloat16)
    everything = testing.run("attention3d", kwargs, backend="triton").grads
    launched = []
    launch = triton_launch.launch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            triton_launch, "launch", lambda k, *a, **o: launched.append(k) or launch(k, *a, **o)
        )
        leaves = {n: x.clone().requires_grad_(n in wanted) for n, x in kwargs.items()}
        out = ops.attention3d(**leaves, backend="triton")
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
        out.backward(cotangent.to(out.dtype))
    assert all(torch.equal(leaves[name].grad, everything[name]) for name in wanted)
    assert (triton_backward.attention3d_dq_kernel in launched) == ("q" in wanted)


@pytest.mark.parametrize(
    "form",
    [{}, dict(grid=(2, 3, 5), window_size=(2, 2, 3), causal_time=True)],
    ids=["dense", "window"],
)
def test_dk_and_dv_of_a_launch_each(form, monkeypatch):
    """As where the two don't fit the registers together: the same bits."""
    kwargs = {**qkv(1, 30, 2, 112, kv_heads=1, dtype=torch.bfloat16), **form}
    launched = []
    launch = triton_launch.launch
    monkeypatch.setattr(
        triton_launch, "launch", lambda k, *a, **o: launched.append(k) or launch(k, *a, **o)
    )
    together = testing.run("attention3d", kwargs, backend="triton").all()
    monkeypatch.setattr(backend, "_apart", lambda *_: True)
    apart = testing.run("attention3d", kwargs, backend="triton").all()
    assert launched.count(triton_backward.attention3d_dkdv_kernel) == 1 + 2
    assert all(torch.equal(apart[name], together[name]) for name in together)


def test_same_bits_in_every_run():
    kwargs = dict(
        **qkv(1, 60, 4, 16, kv_heads=2, dtype=torch.bfloat16), grid=(3, 4, 5), window_size=(2, 3, 3)
    )
    first, second = (testing.run("attention3d", kwargs, backend="triton").all() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


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
        (qkv(1, 4, 1, 16, dtype=torch.float64), "float64"),
    ],
    ids=["head-dim", "scale", "float64"],
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
