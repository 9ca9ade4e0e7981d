"""Attention: `attention3d` of every backend."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from dit_kernels import ops, testing
from dit_kernels.ops import triton_launch
from dit_kernels.ops.attention3d import reference
from dit_kernels.ops.attention3d import triton as triton_backend

OP = "attention3d"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = [case.name for case in testing.cases(torch.float32) if case.op == OP]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Where Triton is interpreted: many tiles of small shapes. A GPU runs what is chosen for it."""
    if triton_launch.INTERPRETED:
        config = triton_backend.Config(32, 16, 4, 1)
        monkeypatch.setattr(triton_backend, "configuration", lambda *_: config)


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


def qkv(samples, tokens, heads, dim, *, keys=None, kv_heads=None, dtype=torch.float32):
    shapes = [(samples, tokens, heads, dim)]
    shapes += [(samples, keys or tokens, kv_heads or heads, dim)] * 2
    return dict(zip("qkv", (torch.randn(s).to(dtype) for s in shapes), strict=True))


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.fixture
def check(backend):
    """The bound must be one: eager is right as well."""

    def check(**kwargs):
        for found in testing.measure(testing.Case(OP, "", OP, kwargs), backend=backend):
            assert found.allowed < 0.5, f"{found.tensor}: eager itself is wrong"
            assert found.ok, found

    return check


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_examples(check, example, name, dtype):
    check(**example(name, DTYPES[dtype]).kwargs)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("dim", [8, 16, 40, 64, 72, 80, 88, 96, 112, 128, 240, 256])
def test_head_dims(check, dim, dtype):
    check(**qkv(1, 37, 2, dim, kv_heads=1, dtype=DTYPES[dtype]))


@pytest.mark.parametrize("layout", ["qkv-packed", "heads-first", "dim-strided", "unaligned"])
def test_strides(check, layout):
    shapes = {
        "qkv-packed": lambda: torch.randn(2, 19, 3, 2, 24).half().unbind(2),
        "heads-first": lambda: (torch.randn(2, 2, 19, 24).half().transpose(1, 2) for _ in "qkv"),
        "dim-strided": lambda: (torch.randn(2, 19, 24, 2).half().transpose(2, 3) for _ in "qkv"),
        "unaligned": lambda: (torch.randn(2, 19, 2, 25).half()[..., 1:] for _ in "qkv"),
    }
    q, k, v = shapes[layout]()
    check(q=q, k=k, v=v)


@pytest.mark.parametrize("tokens", [1, 15, 32, 33, 70, 300])
def test_lengths_that_fill_no_tile(check, tokens):
    check(**qkv(2, tokens, 1, 16, dtype=torch.bfloat16), return_lse=True)


@pytest.mark.parametrize("name", ["kv_lens", "text_lens", "cu_seqlens"])
def test_lengths_that_are_a_column_of_a_table(check, name):
    """Beside each there is a number that is another length."""
    columns = {"kv_lens": [7, 3], "text_lens": [2, 5], "cu_seqlens": [0, 5, 6, 17]}
    other = {"kv_lens": {}, "text_lens": dict(text_tokens=5), "cu_seqlens": dict(max_seqlen=11)}
    column = columns[name]
    table = torch.tensor([[n, 1] for n in column], dtype=torch.int32)
    samples = 1 if name == "cu_seqlens" else 2
    check(**qkv(samples, 17, 2, 16), **other[name], **{name: table[:, 0]})


@pytest.mark.parametrize("shape", [(0, 8, 2, 16), (2, 0, 2, 16)])
def test_empty(backend, shape):
    found = testing.run(OP, qkv(*shape), backend=backend).all()
    assert [x.shape for x in found.values()] == [shape] * 4


def test_no_keys(backend):
    kwargs = dict(
        q=torch.randn(1, 5, 1, 16), k=torch.randn(1, 0, 1, 16), v=torch.randn(1, 0, 1, 16)
    )
    out, lse = ops.attention3d(**kwargs, return_lse=True, backend=backend)
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
def test_windows(check, name, causal):
    grid, window, stride, text = WINDOWS[name]
    kwargs = qkv(1, math.prod(grid) + text, 1, 16)
    check(
        **kwargs, grid=grid, window_size=window, stride=stride, text_tokens=text, causal_time=causal,
    )  # fmt: skip


@pytest.mark.parametrize("window", [None, (2, 2, 3)], ids=["dense", "window"])
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("first", [False, True], ids=["text-last", "text-first"])
def test_text(check, first, causal, window):
    check(
        **qkv(2, 27 + 19, 1, 16), grid=(3, 3, 3), window_size=window, causal_time=causal,
        text_tokens=19, text_first=first, text_lens=int32(3, 18), kv_lens=int32(46, 40), return_lse=True,
    )  # fmt: skip


@pytest.mark.parametrize("window", [None, (2, 2, 2)], ids=["dense", "window"])
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
def test_packed_grids(check, causal, window):
    """A grid a sequence, and text in each."""
    grids = ((3, 2, 3), (2, 2, 2), (2, 3, 5))
    lengths = [t * h * w + 5 for t, h, w in grids]
    ends = list(itertools.accumulate(lengths, initial=0))
    check(
        **qkv(1, ends[-1], 1, 16), cu_seqlens=int32(*ends), max_seqlen=max(lengths), grid=grids,
        window_size=window, text_tokens=5, text_lens=int32(2, 5, 3), causal_time=causal, text_first=True,
    )  # fmt: skip


def test_packed_one_grid(check):
    check(
        **qkv(1, 72, 1, 16), cu_seqlens=int32(0, 24, 48, 72), max_seqlen=24, grid=(2, 3, 4),
        window_size=(1, 3, 3),
    )  # fmt: skip


def test_packed_many_short_and_empty_sequences(check):
    ends = [0, 1, 1, 4, 37, 37, 38, 100]
    check(**qkv(1, 100, 2, 16), cu_seqlens=int32(*ends), max_seqlen=62, return_lse=True)


def test_packed_tail_of_no_sequence(backend):
    """Tokens past the last sequence (a padded batch) give 0 and -inf, and get no gradient."""
    kwargs = dict(**qkv(1, 100, 1, 16), cu_seqlens=int32(0, 9, 30), max_seqlen=21, return_lse=True)
    found = testing.run(OP, kwargs, backend=backend)
    assert found.outputs["out0"][:, 30:].eq(0).all()
    assert found.outputs["out1"][..., 30:].eq(-torch.inf).all()
    assert all(grad[:, 30:].eq(0).all() for grad in found.grads.values())


def test_query_that_sees_nothing(check, backend):
    kwargs = dict(**qkv(2, 9, 2, 16, keys=33), kv_lens=int32(0, 20), return_lse=True)
    found = testing.run(OP, kwargs, backend=backend)
    assert found.outputs["out0"][0].eq(0).all()
    assert found.outputs["out1"][0].eq(-torch.inf).all()
    assert all(grad[0].eq(0).all() for grad in found.grads.values())
    check(**kwargs)


def test_padding_may_hold_anything(backend):
    kwargs = dict(**qkv(1, 9, 1, 16, keys=40), kv_lens=int32(21))
    clean = testing.run(OP, kwargs, backend=backend).all()
    for x in (kwargs["k"], kwargs["v"]):
        x[:, 21:] = torch.nan
    dirty = testing.run(OP, kwargs, backend=backend).all()
    assert all(torch.equal(clean[name], dirty[name]) for name in clean)


def test_large_scores(check):
    """Scores whose exponential alone would overflow."""
    kwargs = qkv(1, 40, 1, 16, dtype=torch.float16)
    kwargs["q"] *= 15
    check(**kwargs, kv_lens=int32(35))


def test_same_bits_in_every_run(same_bits):
    x = qkv(1, 60, 4, 16, kv_heads=2, dtype=torch.bfloat16)
    same_bits(OP, **x, grid=(3, 4, 5), window_size=(2, 3, 3))


@pytest.mark.parametrize("wanted", ["q", "k", "v", "kv"])
def test_only_the_gradients_asked_for(backend, wanted):
    kwargs = qkv(1, 20, 1, 16, dtype=torch.bfloat16)
    everything = testing.run(OP, kwargs, backend=backend).grads

    def call(**leaves):
        return ops.attention3d(**kwargs | leaves, backend=backend)

    grads = testing.run(call, {name: kwargs[name] for name in wanted}).grads
    assert all(torch.equal(grads[name], everything[name]) for name in wanted)


def test_float64_is_not_served(backend):
    kwargs = qkv(1, 4, 1, 16, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="float64"):
        ops.attention3d(**kwargs, backend=backend)
    by_auto = ops.attention3d(**kwargs, backend="auto")
    assert torch.equal(by_auto, ops.attention3d(**kwargs, backend="reference"))
