"""Attention over a grid of patches in plain torch.

    out = softmax(scale * q k^T, over the keys that a query sees) v

What a query sees is decided from coordinates, a few query rows at a time:

    the keys of its own sequence that are no padding, and of these
    - all, if the query or the key is a text token;
    - otherwise those inside its window on each of the three axes (generalized neighborhood attention)
      and, with causal_time, in its own frame or an earlier one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# query rows are taken in chunks of about this many scores
_SCORES = 1 << 25


def supports(*args: Any) -> str | None:
    return None


class _Tokens(NamedTuple):
    """Where each token is: [N] each."""

    sequence: Tensor  # index of its sequence in a packed batch, else 0
    offset: Tensor  # within its sequence
    text: Tensor  # bool
    text_index: Tensor  # among the text tokens
    position: tuple[Tensor, Tensor, Tensor]  # (t, h, w) of a patch
    length: tuple[Tensor, Tensor, Tensor]  # of its grid along each axis


def forward(
    q: Tensor,  # [B, N, H, D]; packed: [1, N_total, H, D]
    k: Tensor,  # [B, N', H', D], H' | H
    v: Tensor,
    text_lens: Tensor | None,  # [B] or, packed, [S] int32
    kv_lens: Tensor | None,
    cu_seqlens: Tensor | None,  # [S + 1] int32
    grid: Sequence[int],  # () or 3 ints, packed also 3 a sequence
    window_size: Sequence[int],  # () or 3 ints
    stride: Sequence[int],
    text_tokens: int,
    text_first: bool,
    causal_time: bool,
    max_seqlen: int,
    scale: float,
    return_lse: bool,
    deterministic: bool,
    stats: bool,
) -> list[Tensor]:
    """[out], [lse] where it is asked for or saved."""
    exact = torch.promote_types(q.dtype, torch.float32)
    seen = _visibility(
        q, k, text_lens, kv_lens, cu_seqlens, grid, window_size, stride, text_tokens, text_first, causal_time
    )  # fmt: skip
    want_lse = return_lse or stats
    out, lse = [], []
    for rows in _chunks(q, k):
        scores = _scores(q[:, rows], k, seen(rows), scale, exact)
        out.append(_out(scores, v, exact))
        lse += [_lse(scores)] if want_lse else []
    outputs = [torch.cat(out, dim=1).to(q.dtype)]
    return [*outputs, torch.cat(lse, dim=2)] if want_lse else outputs


def backward(
    grads: Sequence[Tensor | None],
    tensors: Sequence[Any],
    statics: Sequence[Any],
    needs: Sequence[bool],
) -> list[Tensor]:
    """Chunk by chunk, so that the N x N scores of all chunks never exist at once."""
    q, k, v, text_lens, kv_lens, cu_seqlens = tensors
    grid, window_size, stride, text_tokens, text_first, causal_time, _, scale, *_ = statics
    exact = torch.promote_types(q.dtype, torch.float32)
    seen = _visibility(
        q, k, text_lens, kv_lens, cu_seqlens, grid, window_size, stride, text_tokens, text_first, causal_time
    )  # fmt: skip
    dout, dlse = grads[0], grads[1] if len(grads) > 1 else None
    dq, dk, dv = (torch.zeros_like(x, dtype=exact) for x in (q, k, v))
    keys, values = (x.detach().to(exact).requires_grad_() for x in (k, v))
    for rows in _chunks(q, k):
        queries = q[:, rows].detach().to(exact).requires_grad_()
        with torch.enable_grad():
            scores = _scores(queries, keys, seen(rows), scale, exact)
            pairs = []
            if dout is not None:
                pairs.append((_out(scores, values, exact), dout[:, rows].to(exact)))
            if dlse is not None:
                pairs.append((_lse(scores), dlse[:, :, rows]))
        if not pairs:
            continue
        dq[:, rows], step_k, step_v = torch.autograd.grad(
            [o for o, _ in pairs],
            (queries, keys, values),
            [g for _, g in pairs],
            allow_unused=True,
            materialize_grads=True,
        )
        dk += step_k
        dv += step_v
    found = zip((dq, dk, dv), (q, k, v), needs, strict=False)
    return [g.to(x.dtype) for g, x, need in found if need]


def eager(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> list[Tensor]:
    """The same formula computed in the inputs' own dtype: what the accuracy rule compares with."""
    scale = args[10]
    seen = _visibility(q, k, *args[:9])
    parts = [_scores(q[:, rows], k, seen(rows), scale, q.dtype) for rows in _chunks(q, k)]
    out = torch.cat([_out(scores, v, q.dtype) for scores in parts], dim=1)
    return [out, torch.cat([_lse(scores) for scores in parts], dim=2)]


class _Scores(NamedTuple):
    """Scores [B, H, n, N'], -inf where a query does not see; 0 in a row that sees nothing at all."""

    scores: Tensor
    blind: Tensor | None  # bool [B or 1, 1, n, 1]: those rows


def _scores(q: Tensor, k: Tensor, seen: Tensor | None, scale: float, dtype: torch.dtype) -> _Scores:
    q, k = q.to(dtype).transpose(1, 2), _heads(k, q.shape[2], dtype)
    scores = (q * scale) @ k.transpose(-1, -2)
    if seen is None:
        return _Scores(scores, None)
    seen = seen[:, None]  # [B or 1, 1, n, N']
    blind = ~seen.any(-1, keepdim=True)
    return _Scores(scores.masked_fill(~seen, -torch.inf).masked_fill(blind, 0.0), blind)


def _out(scores: _Scores, v: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, n, H, D]; 0 for a query that sees nothing."""
    weights = scores.scores.softmax(-1)
    if scores.blind is not None:
        weights = weights.masked_fill(scores.blind, 0.0)
    return (weights @ _heads(v, weights.shape[1], dtype)).transpose(1, 2)


def _lse(scores: _Scores) -> Tensor:
    """[B, H, n]; -inf for a query that sees nothing."""
    lse = scores.scores.logsumexp(-1)
    return lse if scores.blind is None else lse.masked_fill(scores.blind[..., 0], -torch.inf)


def _heads(x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """Keys or values as [B, H, N', D], a head for each query head."""
    x = x.to(dtype).transpose(1, 2)
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _chunks(q: Tensor, k: Tensor) -> Iterator[slice]:
    rows = max(1, _SCORES // max(1, q.shape[0] * q.shape[2] * k.shape[1]))
    for start in range(0, max(1, q.shape[1]), rows):
        yield slice(start, start + rows)


def _visibility(
    q: Tensor,
    k: Tensor,
    text_lens: Tensor | None,
    kv_lens: Tensor | None,
    cu_seqlens: Tensor | None,
    grid: Sequence[int],
    window_size: Sequence[int],
    stride: Sequence[int],
    text_tokens: int,
    text_first: bool,
    causal_time: bool,
) -> Any:
    """rows -> bool [B or 1, n, N'], or None where every query sees every key."""
    lens = (text_lens, kv_lens, cu_seqlens)
    if all(given is None for given in lens) and not window_size and not causal_time:
        return lambda rows: None
    queries = _locate(q, cu_seqlens, grid, text_tokens, text_first)
    keys = queries
    if k.shape[1] != q.shape[1]:
        keys = _locate(k, cu_seqlens, grid, text_tokens, text_first)
    valid = torch.ones(1, k.shape[1], dtype=torch.bool, device=k.device)
    for limits, offset, bound in (
        (text_lens, keys.text_index, keys.text),
        (kv_lens, keys.offset, torch.ones_like(keys.text)),
    ):
        if limits is not None:
            # packed: each key has its own sequence's length; else [B, 1] against [N']
            limit = (
                limits.long()[keys.sequence] if cu_seqlens is not None else limits.long()[:, None]
            )
            valid = valid & ((offset < limit) | ~bound)

    def seen(rows: slice) -> Tensor:
        def of(x: Tensor) -> Tensor:
            return x[rows, None]

        near = torch.ones((), dtype=torch.bool, device=q.device)
        if window_size:
            for axis in range(3):
                start = window_start(
                    queries.position[axis], queries.length[axis], window_size[axis], stride[axis]
                )
                inside = keys.position[axis][None] - of(start)
                near = near & (inside >= 0) & (inside < window_size[axis])
        if causal_time:
            near = near & (keys.position[0][None] <= of(queries.position[0]))
        near = near | of(queries.text) | keys.text[None]
        near = near & (of(queries.sequence) == keys.sequence[None])
        return near[None] & valid[:, None]

    return seen


def window_start(position: Tensor, length: Tensor, window: int, stride: int) -> Tensor:
    """First position that a query at `position` sees on one axis: its group's leader, centred, clamped."""
    leader = torch.minimum(position // stride * stride + stride // 2, length - 1)
    return torch.minimum((leader - window // 2).clamp(min=0), length - window)


def _locate(
    x: Tensor, cu_seqlens: Tensor | None, grid: Sequence[int], text_tokens: int, text_first: bool
) -> _Tokens:
    total, device = x.shape[1], x.device
    token = torch.arange(total, device=device)
    sequence = torch.zeros_like(token)
    first, count = torch.zeros_like(token), torch.full_like(token, total)
    if cu_seqlens is not None:
        starts = cu_seqlens.long()
        sequence = torch.searchsorted(starts, token, right=True) - 1
        sequence = sequence.clamp(0, max(0, len(starts) - 2))
        first = starts[sequence]
        count = starts[sequence + 1] - first
    index = token - first
    patches = count - text_tokens
    patch = index - text_tokens if text_first else index
    text = (patch < 0) | (patch >= patches)
    text_index = index if text_first else index - patches
    gt, gh, gw = patches, torch.ones_like(patches), torch.ones_like(patches)
    if grid:
        # filled on the device: a copy from the host could not be captured in a CUDA graph
        sizes = [torch.full((1,), size, device=device) for size in grid]
        which = sequence if len(grid) > 3 else torch.zeros_like(sequence)
        gt, gh, gw = (torch.cat(sizes[axis::3])[which] for axis in range(3))
    position = (patch // (gh * gw), patch // gw % gh, patch % gw)
    return _Tokens(sequence, index, text, text_index, position, (gt, gh, gw))


def pairs(
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor | None,
    grid: Sequence[int],
    window_size: Sequence[int],
    text_tokens: int,
    causal_time: bool,
    max_seqlen: int,
) -> int:
    """Query-key pairs that count, over the batch. Padding counts as keys: lengths live on the device."""
    if not grid:
        if cu_seqlens is not None:  # the longest possible: sequence lengths live on the device too
            return q.shape[1] * max_seqlen
        return q.shape[0] * q.shape[1] * k.shape[1]
    total = 0
    sequences = [grid[i : i + 3] for i in range(0, len(grid), 3)]
    for gt, gh, gw in sequences:
        patches = gt * gh * gw
        wt, wh, ww = window_size or (gt, gh, gw)
        frames = gt * (gt + 1) / 2 if causal_time and wt == gt else gt * wt
        total += int(frames * gh * wh * gw * ww) + text_tokens * (2 * patches + text_tokens)
    if len(sequences) == 1:
        size = max(1, grid[0] * grid[1] * grid[2] + text_tokens)
        total *= q.shape[0] * (q.shape[1] // size)
    return total


def cost(
    q: Tensor, k: Tensor, v: Tensor, text_lens: Any, kv_lens: Any, cu_seqlens: Tensor | None,
    grid: Sequence[int], window_size: Sequence[int], stride: Any, text_tokens: int, text_first: bool,
    causal_time: bool, max_seqlen: int, *args: Any,
) -> dict[str, tuple[int, int]]:  # fmt: skip
    """(FLOPs, least bytes): two matrix products forward, five backward, over the pairs that count."""
    n = pairs(q, k, cu_seqlens, grid, window_size, text_tokens, causal_time, max_seqlen)
    product = 2 * n * q.shape[2] * q.shape[3]
    size = q.element_size()
    forward = (2 * q.numel() + k.numel() + v.numel()) * size
    return {"forward": (2 * product, forward), "backward": (5 * product, 2 * forward)}


def example_inputs(
    dtype: torch.dtype, device: str = "cpu"
) -> dict[str, tuple[str, dict[str, Any]]]:
    """case -> (function, keyword arguments): the forms of the models out there, small."""
    generator = torch.Generator().manual_seed(0)

    def qkv(
        samples: int, tokens: int, heads: int, dim: int, *, kv_heads: int = 0, keys: int = 0
    ) -> dict[str, Tensor]:
        shapes = [(samples, tokens, heads, dim)]
        shapes += [(samples, keys or tokens, kv_heads or heads, dim)] * 2
        made = (torch.randn(s, generator=generator).to(device, dtype) for s in shapes)
        return dict(zip("qkv", made, strict=True))

    def int32(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    function = "attention3d"
    packed = torch.randn((1, 17, 3, 2, 16), generator=generator).to(device, dtype)
    return {
        "dense-d72": (function, dict(**qkv(2, 24, 2, 72))),
        "gqa-lse": (function, dict(**qkv(1, 13, 4, 24, kv_heads=2), return_lse=True)),
        "cross-padded": (function, dict(**qkv(2, 11, 2, 16, keys=7), kv_lens=int32(7, 3))),
        "joint-text-padded": (function, dict(
            **qkv(2, 17, 2, 16), text_tokens=5, text_lens=int32(2, 5))),
        "window": (function, dict(**qkv(1, 60, 2, 16), grid=(3, 4, 5), window_size=(2, 3, 3))),
        "sliding-tile-text": (function, dict(
            **qkv(2, 64, 1, 16), grid=(3, 4, 5), window_size=(3, 2, 4), stride=(1, 2, 3), text_tokens=4,
            text_first=True, text_lens=int32(4, 1))),
        "blocked": (function, dict(
            **qkv(1, 48, 1, 16), grid=(2, 4, 6), window_size=(1, 2, 3), stride=(1, 2, 3))),
        "causal-time": (function, dict(**qkv(1, 36, 2, 16), grid=(4, 3, 3), causal_time=True)),
        "packed": (function, dict(
            q=packed[:, :, 0], k=packed[:, :, 1], v=packed[:, :, 2], cu_seqlens=int32(0, 5, 6, 17),
            max_seqlen=11)),
        "packed-windows": (function, dict(
            **qkv(1, 12 + 3 + 8 + 3, 2, 16), cu_seqlens=int32(0, 15, 26), max_seqlen=15,
            grid=((3, 2, 2), (2, 2, 2)), window_size=(2, 1, 2), text_tokens=3, text_lens=int32(3, 1))),
    }  # fmt: skip
