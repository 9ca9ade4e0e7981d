"""attention3d against torch's scaled_dot_product_attention with masks built token by token."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from dit_kernels import ops
from dit_kernels.ops.attention3d import reference


def qkv(samples, tokens, heads=2, dim=8, keys=None, kv_heads=None):
    q = torch.randn(samples, tokens, heads, dim, dtype=torch.float64)
    k, v = (
        torch.randn(samples, keys or tokens, kv_heads or heads, dim, dtype=torch.float64)
        for _ in range(2)
    )
    return q, k, v


def sdpa(q, k, v, mask=None, **options):
    out = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask, **options
    )
    return out.transpose(1, 2)


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def neighborhood(i, length, window, stride):
    """The published definition, a position at a time: the positions that i sees on its axis."""
    leader = min((i // stride) * stride + stride // 2, length - 1)
    start = leader - window // 2
    start = max(0, min(start, length - window))
    return range(start, start + window)


def mask_by_definition(grid, window=None, stride=(1, 1, 1), causal=False, text=0, text_first=False):
    """bool [N, N], True where the query (row) sees the key."""
    patches = list(itertools.product(*(range(n) for n in grid)))
    words = [None] * text
    tokens = words + patches if text_first else patches + words
    mask = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    for i, query in enumerate(tokens):
        for j, key in enumerate(tokens):
            if query is None or key is None:
                mask[i, j] = True
                continue
            near = all(
                key[a] in neighborhood(query[a], grid[a], window[a], stride[a]) for a in range(3)
            ) if window else True  # fmt: skip
            mask[i, j] = near and (not causal or key[0] <= query[0])
    return mask


def test_dense():
    q, k, v = qkv(2, 13)
    close(ops.attention3d(q, k, v), sdpa(q, k, v))
    close(ops.attention3d(q, k, v, scale=0.3), sdpa(q, k, v, scale=0.3))


def test_grouped_queries():
    q, k, v = qkv(2, 9, heads=6, kv_heads=2)
    close(ops.attention3d(q, k, v), sdpa(q, k, v, enable_gqa=True))


def test_cross_attention_with_padded_keys():
    q, k, v = qkv(3, 7, keys=5)
    lens = torch.tensor([5, 2, 1], dtype=torch.int32)
    mask = (torch.arange(5) < lens[:, None])[:, None, None]
    close(ops.attention3d(q, k, v, kv_lens=lens), sdpa(q, k, v, mask))


def test_log_sum_exp():
    q, k, v = qkv(2, 6)
    out, lse = ops.attention3d(q, k, v, return_lse=True)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * 8**-0.5
    close(lse, scores.exp().sum(-1).log())
    close(out, sdpa(q, k, v))
    _, lse32 = ops.attention3d(*(x.bfloat16() for x in (q, k, v)), return_lse=True)
    assert lse32.dtype == torch.float32
    assert lse32.shape == (2, 2, 6)


GRIDS = [
    ((1, 5, 7), (1, 3, 3), (1, 1, 1)),
    ((4, 5, 3), (3, 2, 3), (1, 1, 1)),
    ((3, 6, 4), (2, 4, 3), (2, 3, 1)),
    ((2, 4, 6), (1, 2, 3), (1, 2, 3)),
    ((5, 7, 3), (5, 3, 2), (3, 2, 2)),
    ((3, 4, 5), (3, 4, 5), (1, 1, 1)),
]


@pytest.mark.parametrize(("grid", "window", "stride"), GRIDS, ids=str)
@pytest.mark.parametrize("text", [0, 4], ids=["patches", "joint"])
@pytest.mark.parametrize("text_first", [False, True], ids=["last", "first"])
def test_windows(grid, window, stride, text, text_first):
    patches = grid[0] * grid[1] * grid[2]
    q, k, v = qkv(2, patches + text)
    mask = mask_by_definition(grid, window, stride, text=text, text_first=text_first)
    got = ops.attention3d(
        q, k, v, grid=grid, window_size=window, stride=stride, text_tokens=text, text_first=text_first
    )  # fmt: skip
    close(got, sdpa(q, k, v, mask))


def test_neighborhood_in_the_middle_is_centred():
    """Away from the borders an odd window of stride 1 is centred on its query."""
    seen = [list(neighborhood(i, 9, 5, 1)) for i in range(9)]
    assert seen[4] == [2, 3, 4, 5, 6]
    assert seen[0] == [0, 1, 2, 3, 4]
    assert seen[8] == [4, 5, 6, 7, 8]
    position, length = torch.arange(9), torch.full((9,), 9)
    assert reference.window_start(position, length, 5, 1).tolist() == [s[0] for s in seen]


def test_causal_time():
    q, k, v = qkv(1, 24 + 3)
    mask = mask_by_definition((4, 3, 2), causal=True, text=3)
    close(
        ops.attention3d(q, k, v, grid=(4, 3, 2), causal_time=True, text_tokens=3),
        sdpa(q, k, v, mask),
    )
    mask = mask_by_definition((4, 3, 2), (2, 3, 1), causal=True, text=3)
    got = ops.attention3d(
        q, k, v, grid=(4, 3, 2), causal_time=True, window_size=(2, 3, 1), text_tokens=3
    )
    close(got, sdpa(q, k, v, mask))


@pytest.mark.parametrize("text_first", [False, True])
def test_padded_text(text_first):
    grid, text = (2, 3, 2), 4
    q, k, v = qkv(2, 12 + text)
    lens = torch.tensor([1, 3], dtype=torch.int32)
    real = torch.arange(text) < lens[:, None]
    patches = torch.ones(2, 12, dtype=torch.bool)
    keys = torch.cat((real, patches) if text_first else (patches, real), dim=1)
    mask = mask_by_definition(grid, (1, 3, 2), text=text, text_first=text_first)
    got = ops.attention3d(
        q, k, v, grid=grid, window_size=(1, 3, 2), text_tokens=text, text_first=text_first, text_lens=lens
    )  # fmt: skip
    close(got, sdpa(q, k, v, (mask & keys[:, None])[:, None]))


def test_packed_is_each_sequence_alone():
    lengths = [5, 1, 9]
    q, k, v = qkv(1, sum(lengths))
    seqlens = torch.tensor([0, 5, 6, 15], dtype=torch.int32)
    got = ops.attention3d(q, k, v, cu_seqlens=seqlens, max_seqlen=9)
    alone = [sdpa(*parts) for parts in zip(*(x.split(lengths, 1) for x in (q, k, v)), strict=True)]
    close(got, torch.cat(alone, 1))


def test_packed_windows_of_different_grids():
    grids, text = [(3, 2, 4), (2, 5, 2)], 2
    lengths = [24 + text, 20 + text]
    q, k, v = qkv(1, sum(lengths))
    seqlens = torch.tensor([0, 26, 48], dtype=torch.int32)
    lens = torch.tensor([2, 1], dtype=torch.int32)
    got = ops.attention3d(
        q, k, v, cu_seqlens=seqlens, max_seqlen=26, grid=grids, window_size=(2, 2, 2), stride=(1, 2, 1),
        text_tokens=text, text_lens=lens,
    )  # fmt: skip
    alone = [
        ops.attention3d(
            *parts, grid=grid, window_size=(2, 2, 2), stride=(1, 2, 1), text_tokens=text,
            text_lens=lens[i : i + 1],
        )
        for i, (grid, *parts) in enumerate(
            zip(grids, *(x.split(lengths, 1) for x in (q, k, v)), strict=True)
        )
    ]  # fmt: skip
    close(got, torch.cat(alone, 1))


def test_a_query_that_sees_nothing():
    q, k, v = (x.requires_grad_() for x in qkv(2, 4, keys=3))
    lens = torch.tensor([0, 3], dtype=torch.int32)
    out, lse = ops.attention3d(q, k, v, kv_lens=lens, return_lse=True)
    assert (out[0] == 0).all()
    assert (lse[0] == -torch.inf).all()
    for grad in torch.autograd.grad(out.sum(), (q, k, v)):
        assert grad.isfinite().all()
        assert (grad[0] == 0).all()


def test_gradient_through_the_log_sum_exp():
    q, k, v = (x.requires_grad_() for x in qkv(1, 7))
    assert torch.autograd.gradcheck(
        lambda *x: ops.attention3d(*x, grid=(7, 1, 1), window_size=(3, 1, 1), return_lse=True),
        (q, k, v),
    )


def test_chunks_of_queries_change_nothing(monkeypatch):
    q, k, v = (x.requires_grad_() for x in qkv(2, 30))
    options = {"grid": (5, 3, 2), "window_size": (3, 3, 1)}
    whole = ops.attention3d(q, k, v, **options)
    grads = torch.autograd.grad(whole.square().sum(), (q, k, v))
    monkeypatch.setattr(reference, "_SCORES", 900)
    assert len(list(reference._chunks(q, k))) > 3
    parts = ops.attention3d(q, k, v, **options)
    close(parts, whole)
    for a, b in zip(torch.autograd.grad(parts.square().sum(), (q, k, v)), grads, strict=True):
        close(a, b)


def test_keys_and_values_may_be_one_tensor():
    q, k, _ = (x.requires_grad_() for x in qkv(1, 5))
    out = ops.attention3d(q, k, k)
    expected = sdpa(q, k, k)
    close(out, expected)
    for a, b in zip(
        torch.autograd.grad(out.sum(), (q, k)),
        torch.autograd.grad(expected.sum(), (q, k)),
        strict=True,
    ):
        close(a, b)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k: ops.attention3d(q, k, k), fullgraph=True, backend="aot_eager"
    )
    close(compiled(q, k), expected)


Q = torch.randn(2, 12, 4, 16)
INT = torch.int32


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"q": Q[0]}, ValueError, "attention3d: q must be [B, N, H, D]; got [12, 4, 16]"),
        ({"k": Q.half(), "v": Q.half()}, TypeError, "q, k and v must have one dtype"),
        ({"k": Q[:, :, :3], "v": Q[:, :, :3]}, ValueError, "heads of k must divide those of q; got 3 and 4"),
        ({"v": Q[:, :5]}, ValueError, "k and v must be [B, N', H', D]"),
        ({"grid": (2, 2, 2)}, ValueError, "grid (2, 2, 2) with 0 text tokens makes 8 tokens; got q of 12"),
        ({"grid": (3, 4)}, ValueError, "grid must be 3 ints (t, h, w); got (3, 4)"),
        ({"grid": (3.0, 2, 2)}, TypeError, "grid must be 3 ints (t, h, w); got (3.0, 2, 2)"),
        ({"text_tokens": 2.0}, TypeError, "text_tokens must be an int; got float"),
        ({"text_tokens": -1}, ValueError, "text_tokens must be at least 0; got -1"),
        ({"window_size": (1, 1, 1)}, ValueError, "window_size needs a grid"),
        ({"grid": (3, 2, 2), "window_size": (3, 3, 1)}, ValueError, "at most the grid (3, 2, 2)"),
        ({"grid": (3, 2, 2), "window_size": (0, 1, 1)}, ValueError, "must be at least 1 on each axis"),
        (
            {"grid": (3, 2, 2), "window_size": (2, 2, 2), "stride": (3, 1, 1)}, ValueError,
            "stride must be at most window_size (2, 2, 2) on each axis; got (3, 1, 1)",
        ),
        ({"stride": (1, 1, 1)}, ValueError, "stride needs window_size"),
        ({"causal_time": True}, ValueError, "causal_time needs a grid"),
        ({"text_lens": torch.ones(2, dtype=INT)}, ValueError, "text_lens needs text_tokens"),
        ({"kv_lens": torch.ones(2)}, TypeError, "kv_lens must be int32; got torch.float32"),
        ({"kv_lens": torch.ones(3, dtype=INT)}, ValueError, "kv_lens must be int32 [2]"),
        ({"cu_seqlens": torch.zeros(3, dtype=INT)}, ValueError, "cu_seqlens must be [S + 1] for q [1, N_total"),
        (
            {"q": Q[:1], "k": Q[:1], "v": Q[:1], "cu_seqlens": torch.zeros(3, dtype=INT)}, ValueError,
            "max_seqlen must be given with cu_seqlens",
        ),
        ({"text_tokens": 13}, ValueError, "text_tokens must lie in [0, N = 12]; got 13"),
        ({"q": Q.long()}, TypeError, "q must be float32"),
        ({"k": None}, TypeError, "attention3d: k must be a tensor; got NoneType"),
    ],
)  # fmt: skip
def test_errors_say_what_was_expected(kwargs, error, message):
    with pytest.raises(error) as caught:
        ops.attention3d(**{"q": Q, "k": Q, "v": Q, **kwargs})
    assert message in str(caught.value)


def test_lengths_are_checked_under_debug_only(monkeypatch):
    lens = torch.tensor([12, 13], dtype=INT)
    ops.attention3d(Q, Q, Q, kv_lens=lens)
    monkeypatch.setenv("DIT_KERNELS_DEBUG", "1")
    with pytest.raises(
        ValueError, match=r"kv_lens must lie in \[0, 12\]; got values from 12 to 13"
    ):
        ops.attention3d(Q, Q, Q, kv_lens=lens)
    packed = Q[:1]
    for seqlens, message in (
        ([1, 12], r"cu_seqlens\[0\] must lie in \[0, 0\]"),
        ([0, 9], r"cu_seqlens\[-1\]"),
    ):
        given = {"cu_seqlens": torch.tensor(seqlens, dtype=INT), "max_seqlen": 12}
        with pytest.raises(ValueError, match=message):
            ops.attention3d(packed, packed, packed, **given)
    given = {"cu_seqlens": torch.tensor([0, 6, 12], dtype=INT), "max_seqlen": 8}
    ops.attention3d(packed, packed, packed, grid=[(1, 2, 3), (1, 3, 2)], **given)
    with pytest.raises(ValueError, match=r"sequences of \[4, 8\] tokens, as grid; got \[6, 6\]"):
        ops.attention3d(packed, packed, packed, grid=[(1, 2, 2), (2, 2, 2)], **given)
    given["cu_seqlens"] = torch.tensor([0, 4, 12], dtype=INT)
    with pytest.raises(ValueError, match=r"sequences of \[6, 6\] tokens, as grid; got \[4, 8\]"):
        ops.attention3d(packed, packed, packed, grid=(1, 2, 3), **given)
