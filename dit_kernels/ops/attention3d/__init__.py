"""Attention over 3D grids of patches: dense, windowed, joint with text, packed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dit_kernels import debug
from dit_kernels.ops.arguments import (
    autocast_dtype,
    check_float,
    check_given,
    check_int,
    check_int32,
    check_range,
    triple,
)
from dit_kernels.ops.attention3d import reference
from dit_kernels.ops.registration import FusedOp

NAME = "attention3d"


def attention3d(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    grid: Sequence[int] | Sequence[Sequence[int]] | None = None,
    window_size: Sequence[int] | None = None,
    stride: Sequence[int] | None = None,
    text_tokens: int = 0,
    text_first: bool = False,
    text_lens: Tensor | None = None,
    kv_lens: Tensor | None = None,
    causal_time: bool = False,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of each token over the tokens that it sees.

        out = softmax(scale * q k^T) v,    lse = log sum exp(scale * q k^T)

    On an axis of length L, with window w and stride s, position i sees [start, start + w):

        leader(i) = min((i // s) * s + s // 2, L - 1);  start(i) = clamp(leader(i) - w // 2, 0, L - w)

    Stride (1, 1, 1) is neighborhood attention, stride == window_size blocked attention, between them
    sliding-tile attention. A query that sees no key gets 0, and lse -inf.

    Args:
        q: [B, N, H, D], any strides; packed [1, N_total, H, D] with cu_seqlens.
        k, v: the same; with fewer heads (H' | H: grouped queries) and, without a grid, another length.
        grid: (Gt, Gh, Gw) in patches, N = Gt * Gh * Gw + text_tokens, w fastest; packed also a sequence
            of such triples, one a sequence.
        window_size, stride: 3 ints in patches; stride <= window_size <= grid on each axis.
        text_tokens: how many of the N tokens are text; text sees and is seen by everything.
        text_first: text precedes the patches instead of following them.
        text_lens: int32 [B] (packed [S]): text keys at and past it are padding.
        kv_lens: int32 [B]: keys at and past it are padding.
        causal_time: a patch sees only its own and earlier frames.
        cu_seqlens: int32 [S + 1]: sequence s is tokens cu_seqlens[s] to cu_seqlens[s + 1].
        max_seqlen: the longest sequence; required with cu_seqlens, which is never read on the host.
        scale: of the scores; D ** -0.5 by default.
        return_lse: also return the log-sum-exp.
        deterministic: bit-equal gradients from run to run; None follows torch's global setting.
        backend: "auto", "reference", "triton" or "cuda"; None leaves it to `use_backend`.

    Returns:
        out [B, N, H, D] in q's dtype, contiguous; with return_lse also lse, float32 [B, H, N], natural
        logarithm (float64 for float64 inputs).

    Raises:
        ValueError: a shape or a value that does not fit; TypeError: a dtype; RuntimeError: the backend
        asked for is not there.

    Source: Vaswani et al. 2017, equation 1; windows: Generalized Neighborhood Attention (Hassani et al.
    2025), section 3. Scores and sums are accumulated in float32.
    """
    check_given(NAME, q=q, k=k, v=v)
    check_float(NAME, q=q, k=k, v=v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{NAME}: {name} must be [B, N, H, D]; got {list(x.shape)}")
    dtype = autocast_dtype(q)
    if dtype is not None and q.dtype != torch.float64:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise TypeError(
            f"{NAME}: q, k and v must have one dtype; got {q.dtype}, {k.dtype} and {v.dtype}"
        )
    samples, tokens, heads, dim = q.shape
    if k.shape != v.shape or k.shape[0] != samples or k.shape[3] != dim:
        raise ValueError(
            f"{NAME}: k and v must be [B, N', H', D] for q {list(q.shape)};"
            f" got {list(k.shape)} and {list(v.shape)}"
        )
    if k.shape[2] == 0 or heads % k.shape[2]:
        raise ValueError(
            f"{NAME}: the heads of k must divide those of q; got {k.shape[2]} and {heads}"
        )
    sequences = samples
    if cu_seqlens is not None:
        check_int32(NAME, "cu_seqlens", cu_seqlens, q)
        if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1 or samples != 1:
            raise ValueError(
                f"{NAME}: cu_seqlens must be [S + 1] for q [1, N_total, H, D];"
                f" got {list(cu_seqlens.shape)} for q {list(q.shape)}"
            )
        if max_seqlen is None:
            raise ValueError(f"{NAME}: max_seqlen must be given with cu_seqlens; got None")
        check_int(NAME, "max_seqlen", max_seqlen)
        if kv_lens is not None:
            raise ValueError(f"{NAME}: kv_lens is for unpacked batches; cu_seqlens came with it")
        sequences = cu_seqlens.numel() - 1
        check_range(NAME, "cu_seqlens[0]", cu_seqlens[:1], 0, 0)
        check_range(NAME, "cu_seqlens[-1]", cu_seqlens[-1:], tokens, tokens)
        check_range(NAME, "sequence lengths", cu_seqlens.diff(), 0, max_seqlen)
    if k.shape[1] != tokens and (grid is not None or cu_seqlens is not None or text_tokens):
        raise ValueError(
            f"{NAME}: keys of another length need an unpacked batch without grid and text_tokens;"
            f" got {k.shape[1]} keys for {tokens} queries"
        )
    check_int(NAME, "text_tokens", text_tokens)
    if text_tokens > tokens:
        raise ValueError(f"{NAME}: text_tokens must lie in [0, N = {tokens}]; got {text_tokens}")
    grids = _check_grid(grid, tokens, text_tokens, sequences if cu_seqlens is not None else 0)
    if grids and cu_seqlens is not None and debug():
        _check_lengths(grids, text_tokens, cu_seqlens)
    window, steps = _check_window(grids, window_size, stride)
    if causal_time and not grids:
        raise ValueError(f"{NAME}: causal_time needs a grid; got None")
    if text_lens is not None and not text_tokens:
        raise ValueError(f"{NAME}: text_lens needs text_tokens; got 0")
    for name, lens, most in (
        ("text_lens", text_lens, text_tokens),
        ("kv_lens", kv_lens, k.shape[1]),
    ):
        if lens is None:
            continue
        check_int32(NAME, name, lens, q)
        if tuple(lens.shape) != (sequences,):
            raise ValueError(
                f"{NAME}: {name} must be int32 [{sequences}], one a sequence; got {list(lens.shape)}"
            )
        check_range(NAME, name, lens, 0, most)
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    out = _op(
        (q, k, v, text_lens, kv_lens, cu_seqlens),
        (
            [length for one in grids for length in one], window, steps, text_tokens, text_first, causal_time,
            max_seqlen or 0, dim**-0.5 if scale is None else scale, return_lse, deterministic,
        ),
        backend,
        outputs=2 if return_lse else 1,
        save=(0, 1) if return_lse else (0,),
    )  # fmt: skip
    return (out[0], out[1]) if return_lse else out[0]


def _check_grid(
    grid: Sequence[int] | Sequence[Sequence[int]] | None,
    tokens: int,
    text_tokens: int,
    sequences: int,
) -> list[tuple[int, int, int]]:
    """One triple, or one a packed sequence; none without a grid. `sequences` is 0 for an unpacked batch."""
    if grid is None:
        return []
    if len(grid) and not isinstance(grid[0], Sequence):
        one = triple(NAME, "grid", grid, least=0)  # type: ignore[arg-type]
        grids, expected = [one], one[0] * one[1] * one[2] + text_tokens
        if sequences:
            expected *= sequences
    else:
        grids = [triple(NAME, "grid", g, least=0) for g in grid]  # type: ignore[arg-type]
        expected = sum(t * h * w + text_tokens for t, h, w in grids)
        if len(grids) != sequences:
            raise ValueError(
                f"{NAME}: a grid a sequence needs cu_seqlens of as many;"
                f" got {len(grids)} grids and {sequences} sequences"
            )
    if expected != tokens:
        raise ValueError(
            f"{NAME}: grid {tuple(grid)} with {text_tokens} text tokens makes {expected} tokens;"
            f" got q of {tokens}"
        )
    return grids


def _check_lengths(grids: list[tuple[int, int, int]], text_tokens: int, cu_seqlens: Tensor) -> None:
    """Only under DIT_KERNELS_DEBUG=1: it waits for the device."""
    lengths = cu_seqlens.diff().tolist()
    expected = [t * h * w + text_tokens for t, h, w in grids]
    if len(grids) == 1:
        expected *= len(lengths)
    if lengths != expected:
        raise ValueError(
            f"{NAME}: cu_seqlens must hold sequences of {expected} tokens, as grid; got {lengths}"
        )


def _check_window(
    grids: list[tuple[int, int, int]],
    window_size: Sequence[int] | None,
    stride: Sequence[int] | None,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if window_size is None:
        if stride is not None:
            raise ValueError(f"{NAME}: stride needs window_size; got stride {tuple(stride)} alone")
        return (), ()
    if not grids:
        raise ValueError(f"{NAME}: window_size needs a grid; got None")
    window = triple(NAME, "window_size", window_size)
    steps = triple(NAME, "stride", (1, 1, 1) if stride is None else stride)
    for grid in grids:
        if any(w > length for w, length in zip(window, grid, strict=True)):
            raise ValueError(
                f"{NAME}: window_size must be at most the grid {grid} on each axis; got {window}"
            )
    if any(s > w for s, w in zip(steps, window, strict=True)):
        raise ValueError(
            f"{NAME}: stride must be at most window_size {window} on each axis; got {steps}"
        )
    return window, steps


def _fake(q: Tensor, *args: object) -> list[Tensor]:
    return_lse, _, stats = args[-3:]
    out = [q.new_empty(q.shape)]
    if return_lse or stats:
        exact = torch.promote_types(q.dtype, torch.float32)
        out.append(q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=exact))
    return out


_op = FusedOp(
    NAME,
    "Tensor q, Tensor k, Tensor v, Tensor? text_lens, Tensor? kv_lens, Tensor? cu_seqlens",
    "SymInt[] grid, int[] window_size, int[] stride, SymInt text_tokens, bool text_first, bool causal_time,"
    " SymInt max_seqlen, float scale, bool return_lse, bool deterministic",
    reference,
    _fake,
)
