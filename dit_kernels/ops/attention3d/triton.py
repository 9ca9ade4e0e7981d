"""The Triton backend of `attention3d`: which kernels a call needs, with which tiles.

The kernels are in `triton_forward.py` and `triton_backward.py`, what they share in `triton_program.py`, the
geometry of tiles and windows in `triton_tiles.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import triton
from torch import Tensor

from dit_kernels.ops import triton_launch, triton_tuning
from dit_kernels.ops.attention3d import triton_backward, triton_forward
from dit_kernels.ops.attention3d.triton_tiles import Triple, choose_cubes, count_tiles

# -- configurations ------------------------------------------------------------------------------------


class Config(NamedTuple):
    """Queries and keys a tile, warps, and stages of the load pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# architecture -> kernel -> (widest head dim, runs of tokens, cubes of patches) for 16-bit inputs.
# Chosen from compiled binaries: no spills, tensor cores, and on sm_90 products that don't wait for one
# another. Cubes keep more in registers. A wider tile at the same count of registers comes first.
_TABLE: dict[str, dict[str, tuple[tuple[int, Config, Config], ...]]] = {
    "sm_80": {
        "fwd": (
            (64, Config(128, 64, 4, 3), Config(64, 64, 8, 2)),
            (128, Config(64, 64, 4, 3), Config(64, 32, 8, 2)),
            (256, Config(64, 32, 8, 2), Config(32, 32, 8, 2)),
        ),
        "dq": (
            (64, Config(128, 64, 8, 2), Config(64, 32, 4, 2)),
            (112, Config(64, 32, 8, 2), Config(64, 32, 8, 2)),
            (128, Config(64, 64, 4, 2), Config(64, 32, 8, 2)),
            (256, Config(32, 32, 8, 1), Config(32, 32, 8, 1)),
        ),
        "dkdv": (
            (64, Config(32, 64, 4, 2), Config(16, 64, 8, 2)),
            (96, Config(32, 64, 8, 1), Config(16, 64, 8, 2)),
            (112, Config(32, 64, 8, 2), Config(32, 64, 8, 2)),
            (128, Config(64, 64, 8, 2), Config(32, 64, 8, 2)),
            (256, Config(32, 32, 8, 1), Config(16, 32, 8, 1)),
        ),
    },
    "sm_90": {
        "fwd": (
            (64, Config(128, 128, 8, 3), Config(128, 64, 8, 3)),
            (96, Config(128, 128, 8, 2), Config(128, 64, 8, 2)),
            (112, Config(128, 128, 8, 2), Config(128, 32, 8, 2)),
            (128, Config(128, 128, 8, 2), Config(128, 64, 8, 2)),
            (255, Config(128, 32, 8, 2), Config(128, 16, 8, 2)),  # 128x64 spills where it is packed
            (256, Config(128, 64, 8, 2), Config(128, 16, 8, 2)),
        ),
        "dq": (
            (64, Config(128, 64, 8, 2), Config(128, 64, 8, 2)),
            (128, Config(128, 64, 8, 2), Config(128, 32, 8, 2)),
            (256, Config(128, 16, 8, 2), Config(128, 16, 8, 2)),
        ),
        "dkdv": (
            (64, Config(64, 128, 8, 2), Config(64, 128, 8, 2)),
            (96, Config(64, 128, 8, 2), Config(32, 128, 8, 2)),
            (128, Config(64, 128, 8, 2), Config(16, 128, 8, 2)),
            (256, Config(16, 64, 8, 3), Config(16, 64, 8, 2)),
        ),
    },
    "amd": {
        "fwd": (
            (64, Config(128, 64, 8, 2), Config(128, 64, 8, 2)),
            (128, Config(128, 64, 8, 1), Config(64, 32, 4, 1)),
            (256, Config(64, 32, 8, 1), Config(32, 32, 8, 1)),
        ),
        "dq": (
            (64, Config(64, 32, 4, 1), Config(64, 32, 4, 1)),
            (128, Config(64, 32, 8, 1), Config(64, 32, 8, 1)),
            (256, Config(64, 16, 4, 1), Config(64, 16, 4, 1)),
        ),
        "dkdv": (
            (64, Config(32, 64, 4, 1), Config(32, 64, 4, 1)),
            (96, Config(32, 64, 8, 1), Config(32, 64, 8, 1)),
            (
                112,
                Config(32, 64, 4, 1),
                Config(16, 64, 4, 1),
            ),  # 112 = 64 + 32 + 16 takes more than 128
            (128, Config(32, 64, 8, 1), Config(32, 64, 8, 1)),
            (256, Config(16, 64, 4, 1), Config(16, 32, 4, 1)),
        ),
    },
}
_TABLE["sm_100"] = {
    "fwd": (
        (64, Config(128, 128, 8, 3), Config(128, 64, 8, 2)),
        (128, Config(128, 64, 8, 2), Config(128, 32, 8, 2)),
        (256, Config(128, 32, 8, 2), Config(128, 16, 8, 2)),
    ),
    # three parts a head dim take more columns of tensor memory than there are, with the tiles of 128
    "dq": (
        _TABLE["sm_90"]["dq"][0],
        (96, *_TABLE["sm_90"]["dq"][1][1:]),
        (112, Config(128, 32, 8, 2), Config(128, 32, 8, 2)),
        *_TABLE["sm_90"]["dq"][1:],
    ),
    "dkdv": (
        *_TABLE["sm_90"]["dkdv"][:2],
        (112, Config(32, 128, 8, 2), Config(16, 128, 8, 2)),
        _TABLE["sm_90"]["dkdv"][2],
        (256, Config(16, 64, 8, 2), Config(32, 64, 8, 2)),
    ),
}
# (architecture, kernel) -> head dims and tiles for causal_time without a window: its mask takes registers too
_CAUSAL = {
    ("sm_90", "fwd"): (range(129, 256), Config(128, 64, 8, 2)),
    ("sm_90", "dkdv"): (range(97, 129), Config(32, 128, 8, 2)),
}
_FLOAT32 = ((64, Config(64, 32, 4, 1)), (128, Config(32, 32, 4, 1)), (256, Config(16, 16, 4, 1)))


def configuration(
    kernel: str,
    dim: int,
    dtype: torch.dtype,
    architecture: str,
    cubes: bool = False,
    causal: bool = False,
) -> Config:
    """The tiles of a kernel for a shape class; the number of tokens has no part in it."""
    table = _TABLE[architecture][kernel]
    default = next(found[cubes] for widest, *found in table if dim <= widest)
    if dtype == torch.float32:
        default = next(config for widest, config in _FLOAT32 if dim <= widest)
    elif causal and not cubes and (architecture, kernel) in _CAUSAL:
        dims, config = _CAUSAL[architecture, kernel]
        default = config if dim in dims else default
    form = "cubes" if cubes else "causal" if causal else "runs"
    return triton_tuning.choose(f"attention3d.{kernel}", (dim, dtype, form), default)


def _candidates(kernel: str, key: triton_tuning.Key, default: Config) -> list[Config]:
    """What other head dims take on this GPU, and one stage more or less."""
    table = _TABLE[triton_launch.architecture(torch.device("cuda"))][kernel]
    found = [config for _, *both in table for config in both]
    found += [default._replace(num_stages=max(1, default.num_stages + d)) for d in (-1, 1)]
    return list(dict.fromkeys([default, *found]))


for _kernel in ("fwd", "dq", "dkdv"):
    triton_tuning.CANDIDATES[f"attention3d.{_kernel}"] = functools.partial(_candidates, _kernel)


def _apart(dim: int, dtype: torch.dtype, cubes: bool, architecture: str) -> bool:
    """Whether dk and dv take a launch each: where together they don't fit the registers.

    Above 128 that is with the masks of cubes; on sm_80, for head dims of three parts.
    """
    if dtype == torch.float32:
        return False
    return (cubes and dim > 128) or (architecture == "sm_80" and len(parts(dim)) == 3)


@functools.cache
def parts(dim: int, least: int = 16) -> tuple[int, ...]:
    """A head dim as at most three powers of two: 72 = 64 + 16, the second half empty; 112 = 64 + 32 + 16.

    Above 128 one, of 256, whose tiles the audit knows: 128 and a rest spill, by thousands on sm_80.
    """
    if dim > 128:
        return (256,)
    dim = -(-dim // least) * least
    while bin(dim).count("1") > 3:
        dim += dim & -dim
    return tuple(1 << bit for bit in reversed(range(dim.bit_length())) if dim >> bit & 1)


# -- a call ----------------------------------------------------------------------------------------------


def supports(
    q: Tensor, k: Tensor, v: Tensor, text_lens: Tensor | None, kv_lens: Tensor | None,
    cu_seqlens: Tensor | None, grid: Sequence[int], window_size: Sequence[int], stride: Sequence[int],
    text_tokens: int, text_first: bool, causal_time: bool, max_seqlen: int, scale: float, *_: Any,
) -> str | None:  # fmt: skip
    """Why Triton cannot serve this call, or None."""
    reason = triton_launch.unsupported((q, k, v, text_lens, kv_lens, cu_seqlens))
    if reason:
        return reason
    if q.shape[-1] > 256:
        return f"head dims go up to 256; got {q.shape[-1]}"
    if not scale > 0:
        return f"scale must be positive; got {scale}"
    if max(q.shape[1], k.shape[1]) >= 2**31 - 2**16:
        return f"a sequence has fewer than 2^31 tokens; got {max(q.shape[1], k.shape[1])}"
    return None


class _Call(NamedTuple):
    """What is known of a call before tiles are chosen."""

    grids: tuple[Triple, ...]  # () without a grid that matters
    window: Triple  # (0, 0, 0) without a window
    stride: Triple
    text: int  # text tokens, where they are treated apart
    text_first: bool
    causal: bool
    sequences: int  # of a packed batch, else 0

    @property
    def windowed(self) -> bool:
        return self.window != (0, 0, 0)


def _call(
    q: Tensor, cu_seqlens: Tensor | None, text_lens: Tensor | None, grid: Sequence[int],
    window_size: Sequence[int], stride: Sequence[int], text_tokens: int, text_first: bool, causal: bool,
) -> _Call:  # fmt: skip
    grids = tuple((grid[i], grid[i + 1], grid[i + 2]) for i in range(0, len(grid), 3))
    sequences = cu_seqlens.numel() - 1 if cu_seqlens is not None else 0
    causal = causal and any(one[0] > 1 for one in grids)
    windowed = bool(window_size) and any(one != tuple(window_size) for one in grids)
    if not windowed and not causal:
        grids = ()
    elif cu_seqlens is not None and len(grids) == 1:
        grids = grids * sequences
    apart = windowed or causal or text_lens is not None
    return _Call(
        grids,
        _triple(window_size) if windowed else (0, 0, 0),
        _triple(stride) if windowed else (1, 1, 1),
        text_tokens if apart else 0,
        text_first,
        causal,
        sequences,
    )


def _triple(values: Sequence[int]) -> Triple:
    t, h, w = values
    return t, h, w


class _Tiles(NamedTuple):
    """The arguments of a kernel that follow from its tiles."""

    table: Tensor | None  # [S + 1, 4]: grid and first tile of each packed sequence
    tiles: int  # a head
    geometry: tuple[int, ...]  # grid, window, stride, query cube, key cube


def _tiles(
    call: _Call, tokens: int, config: Config, by_key: bool, packed: bool, device: torch.device
) -> _Tiles:
    block = config.block_n if by_key else config.block_m
    cube: Triple = (1, 1, 1)
    cubes = (cube, cube)
    windowed = call.windowed
    if windowed and call.grids:
        cubes = choose_cubes(
            tuple(dict.fromkeys(call.grids)), call.window, call.stride, config.block_m, config.block_n
        )  # fmt: skip
        cube = cubes[by_key]
    grid = call.grids[0] if call.grids else (0, 0, 0)
    geometry = (*grid, *call.window, *call.stride, *cubes[0], *cubes[1])
    text = -(-call.text // block)
    table = None
    if packed:
        if windowed or call.causal:
            table, tiles = _sequence_table(call.grids, cube, text, device)
        if not windowed:
            tiles = tokens // block + call.sequences * (2 if call.text else 1) + 1
    elif windowed:
        tiles = count_tiles(grid, cube) + text
    else:
        tiles = -(-(tokens - call.text) // block) + text
    return _Tiles(table, tiles, geometry)


@functools.lru_cache(maxsize=256)
def _sequence_table(
    grids: tuple[Triple, ...], cube: Triple, text: int, device: torch.device
) -> tuple[Tensor, int]:
    """On the device, copied once for each list of grids; and the tiles in all."""
    rows, tiles = [], 0
    for one in grids:
        rows.append((*one, tiles))
        tiles += count_tiles(one, cube) + text
    rows.append((0, 0, 0, tiles))
    return torch.tensor(rows, dtype=torch.int32).to(device), tiles


def _unit(*tensors: Tensor) -> int:
    """How many elements 16 bytes are, if every row of every tensor begins at a multiple of them; else 1."""
    size = tensors[0].element_size()
    for x in tensors:
        strides = [s for s, n in zip(x.stride()[:3], x.shape[:3], strict=True) if n > 1]
        if x.stride(3) != 1 or x.data_ptr() % 16 or any(s * size % 16 for s in strides):
            return 1
    return 16 // size


def _strides(x: Tensor, unit: int) -> tuple[int, int, int]:
    """Of sample, token and head, in units; 0 along an axis of length 1, where any value may stand."""
    b, n, h = (s // unit if n > 1 else 0 for s, n in zip(x.stride()[:3], x.shape[:3], strict=True))
    return b, n, h


def _precision(dtype: torch.dtype) -> str:
    return triton_launch.float32_precision() if dtype == torch.float32 else "ieee"


def _wide(call: _Call, tensors: Sequence[Tensor], config: Config, tiles: _Tiles) -> bool:
    """Whether two rows of one tile can be 2^31 elements apart."""
    rows = max(config.block_m, config.block_n)
    if call.windowed:
        planes = max(tiles.geometry[9], tiles.geometry[12])
        rows = max(rows, planes * max(h * w for _, h, w in call.grids))
    row = max(tensors[0].shape[2] * tensors[0].shape[3], *(abs(x.stride(1)) for x in tensors))
    return rows * row >= 2**31


def _forms(
    call: _Call, tensors: Sequence[Tensor], config: Config, tiles: _Tiles, precision: str
) -> tuple[Any, ...]:
    """The kernels' last constants, CUBES to BLOCK_N."""
    return (
        call.windowed, call.causal, call.text > 0, _wide(call, tensors, config, tiles), precision,
        config.block_m, config.block_n,
    )  # fmt: skip


def _adjacent(*lengths: Tensor | None) -> list[Tensor | None]:
    """A number a sequence: nothing next to the tokens."""
    return [x if x is None else x.contiguous() for x in lengths]


def forward(
    q: Tensor, k: Tensor, v: Tensor, text_lens: Tensor | None, kv_lens: Tensor | None,
    cu_seqlens: Tensor | None, grid: Sequence[int], window_size: Sequence[int], stride: Sequence[int],
    text_tokens: int, text_first: bool, causal_time: bool, max_seqlen: int, scale: float,
    return_lse: bool, deterministic: bool, stats: bool,
) -> list[Tensor]:  # fmt: skip
    """[out], [lse] where it is asked for or saved."""
    samples, queries, heads, _ = q.shape
    tensors = (q, k, v, *_adjacent(text_lens, kv_lens, cu_seqlens))
    plan = _plans(
        tensors, tuple(grid), tuple(window_size), tuple(stride), text_tokens, text_first, causal_time, scale,
        _precision(q.dtype), return_lse or stats,
    )  # fmt: skip
    out = q.new_empty(q.shape)
    lse = None
    if return_lse or stats:
        lse = q.new_empty((samples, heads, queries), dtype=torch.float32)
    triton_launch.run(triton_forward.attention3d_fwd_kernel, plan, q, k, v, out, lse, *tensors[3:])
    return [out] if lse is None else [out, lse]


def _plan(
    tensors: Sequence[Tensor | None], grid: Sequence[int], window_size: Sequence[int], stride: Sequence[int],
    text_tokens: int, text_first: bool, causal_time: bool, scale: float, precision: str, with_lse: bool,
) -> triton_launch.Plan:  # fmt: skip
    """Of the forward kernel."""
    q, k, v, text_lens, _, cu_seqlens = tensors
    q, k, v = cast(Tensor, q), cast(Tensor, k), cast(Tensor, v)
    samples, queries, heads, dim = q.shape
    call = _call(
        q, cu_seqlens, text_lens, grid, window_size, stride, text_tokens, text_first, causal_time
    )
    config = configuration(
        "fwd", dim, q.dtype, triton_launch.architecture(q.device), call.windowed, call.causal
    )
    tiles = _tiles(call, queries, config, False, cu_seqlens is not None, q.device)
    unit = _unit(q, k, v)
    numbers = (
        tiles.table, *_strides(q, unit), *_strides(k, unit), *_strides(v, unit),
        queries, k.shape[1], heads, heads // k.shape[2], call.text, int(text_first), call.sequences,
        tiles.tiles, scale, *tiles.geometry,
        dim, parts(dim), (q.stride(3), k.stride(3), v.stride(3)), unit,
        *_forms(call, (q, k, v), config, tiles, precision),
    )  # fmt: skip
    options = dict(num_warps=config.num_warps, num_stages=config.num_stages)
    return triton_launch.Plan((samples * heads * tiles.tiles,), numbers, options, {})


_plans = triton_launch.Plans(_plan)


def backward(
    grads: Sequence[Tensor | None], q: Tensor, k: Tensor, v: Tensor, text_lens: Tensor | None,
    kv_lens: Tensor | None, cu_seqlens: Tensor | None, saved: Sequence[Tensor], grid: Sequence[int],
    window_size: Sequence[int], stride: Sequence[int], text_tokens: int, text_first: bool,
    causal_time: bool, max_seqlen: int, scale: float, return_lse: bool, deterministic: bool,
    needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """dq, dk and dv, those that are needed; the same bits in every run."""
    samples, queries, heads, dim = q.shape
    text_lens, kv_lens, cu_seqlens = _adjacent(text_lens, kv_lens, cu_seqlens)
    keys, kv_heads = k.shape[1], k.shape[2]
    out, lse = saved
    dout, dlse = grads[0], grads[1] if len(grads) > 1 else None
    if dout is None:
        dout = q.new_zeros(()).expand(q.shape)
    if dout.stride(3) != 1:
        dout = dout.contiguous()
    call = _call(
        q, cu_seqlens, text_lens, grid, window_size, stride, text_tokens, text_first, causal_time
    )
    rows = q.new_empty((samples, heads, queries, 4), dtype=torch.float32)
    row_tiles = -(-queries // 64)
    unit = _unit(dout)
    triton_launch.launch(
        triton_backward.attention3d_rows_kernel,
        (samples * heads * row_tiles,),
        out, dout, lse, None if dlse is None else dlse.contiguous(), rows, *_strides(dout, unit),
        queries, heads, row_tiles,
        D=dim, WIDTH=triton.next_power_of_2(dim), UNIT=unit, BLOCK_M=64, num_warps=4,
    )  # fmt: skip

    unit = _unit(q, k, v, dout)
    strides = [n for x in (q, k, v, dout) for n in _strides(x, unit)]
    steps = (q.stride(3), k.stride(3), v.stride(3))

    def run(kernel: Any, name: str, results: list[Tensor | None]) -> None:
        by_key = name == "dkdv"
        # sm_90: with a part of 16, ptxas makes the products of this kernel wait for one another (C7514)
        least = 32 if by_key and triton_launch.architecture(q.device) == "sm_90" else 16
        config = configuration(
            name, dim, q.dtype, triton_launch.architecture(q.device), call.windowed, call.causal
        )
        tiles = _tiles(
            call, keys if by_key else queries, config, by_key, cu_seqlens is not None, q.device
        )
        triton_launch.launch(
            kernel,
            (samples * (kv_heads if by_key else heads) * tiles.tiles,),
            q, k, v, dout, rows, *results, text_lens, kv_lens, cu_seqlens, tiles.table,
            *strides, queries, keys, heads, heads // kv_heads, call.text, int(text_first),
            call.sequences, tiles.tiles, scale, *tiles.geometry,
            dim, parts(dim, least), steps, unit, *([heads != kv_heads] if by_key else []),
            *_forms(call, (q, k, v, dout), config, tiles, _precision(q.dtype)),
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip

    found = [q.new_empty(q.shape)] if needs[0] else []
    if needs[0] or q.dtype == torch.float32:  # dk and dv want its sums of p
        run(triton_backward.attention3d_dq_kernel, "dq", [*found] or [None])
    dk, dv = (
        x.new_empty(x.shape) if need else None for x, need in zip((k, v), needs[1:3], strict=True)
    )
    if needs[1] or needs[2]:
        apart = _apart(dim, q.dtype, call.windowed, triton_launch.architecture(q.device))
        for results in ([dk, None], [None, dv]) if apart else ([dk, dv],):
            if any(result is not None for result in results):
                run(triton_backward.attention3d_dkdv_kernel, "dkdv", results)
    return [*found, *(grad for grad in (dk, dv) if grad is not None)]
