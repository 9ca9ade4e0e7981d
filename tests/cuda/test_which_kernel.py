"""Which of its CUDA kernels an op takes for a call: one with 16-byte vectors, or the general one."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_kernels import ops, testing
from dit_kernels.ops import cuda_extension
from dit_kernels.ops.adaln import cuda as adaln
from dit_kernels.ops.qk_norm_rope import cuda as qk_norm_rope

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


def check(function: str, *, backward: bool = True, **kwargs: Any) -> None:
    case = testing.Case("", "", function, kwargs)
    wrong = [a for a in testing.measure(case, backend="cuda", backward=backward) if not a.ok]
    assert not wrong, wrong


# -- adaln ---------------------------------------------------------------------------------------------


@pytest.fixture
def rows(monkeypatch) -> list[tuple[int, int]]:
    """(vectors, threads) of each launch: 0 vectors is the general kernel."""
    seen = []
    real = adaln._row

    def watched(*args: Any) -> tuple[int, int]:
        seen.append(real(*args))
        return seen[-1]

    monkeypatch.setattr(adaln, "_row", watched)
    monkeypatch.setattr(adaln, "_plans", {})
    return seen


def block(channels: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    gate, shift, scale = randn(2, 3 * channels, dtype=dtype).chunk(3, dim=-1)
    residual, branch = (randn(2, tokens, channels, dtype=dtype) for _ in range(2))
    return dict(residual=residual, branch=branch, gate=gate, shift=shift, scale=scale)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("channels", [1152, 1536, 1920, 2304, 3072, 5120])
def test_the_models_rows(rows, channels, dtype):
    check("gated_adaln", **block(channels, 3, DTYPES[dtype]))
    assert len(rows) == 2
    assert all(vectors for vectors, _ in rows)
    width = 16 // DTYPES[dtype].itemsize
    for vectors, threads in rows:
        assert channels <= vectors * threads * width
        assert 3 * (vectors * threads * width - channels) <= channels


def test_affine_and_sandwich_norms_of_a_long_row(rows):
    dtype = torch.bfloat16
    weights = {n: randn(1536, dtype=dtype) for n in ("weight", "bias", "branch_weight")}
    check("gated_adaln", **block(1536, 3, dtype), **weights, branch_norm="rms", gate_act="tanh")
    assert [vectors for vectors, _ in rows] == [3, 2]


def test_rows_too_long_for_vectors(rows):
    check("adaln", x=randn(1, 2, 20488).bfloat16(), shift=randn(1, 20488).bfloat16())
    check("adaln", x=randn(1, 2, 9224).bfloat16(), scale=randn(1, 9224).bfloat16())
    assert [vectors > 0 for vectors, _ in rows] == [False, False, True, False]


def test_rows_that_do_not_fit_shared_memory(rows, monkeypatch):
    """A block of an Ada GPU has 99 KiB: a token less in it at a time, or the general kernels."""
    for kib, forward, backward in ((227, True, True), (99, False, True), (48, False, False)):
        monkeypatch.setattr(cuda_extension, "shared_memory", lambda x, kib=kib: kib * 1024)
        monkeypatch.setattr(adaln, "_plans", {})
        monkeypatch.setattr(adaln, "_backward_plans", {})
        rows.clear()
        check("gated_adaln", **block(16384, 1, torch.bfloat16), backward=False)
        assert (rows[-1][0] > 0) == forward
        rows.clear()
        check("gated_adaln", **block(8192, 5, torch.bfloat16))
        assert (rows[-1][0] > 0) == backward


def test_rows_leave_room_for_what_the_kernel_declares(monkeypatch):
    """A KiB: rows that take all that a block can have are never launched."""
    monkeypatch.setattr(cuda_extension, "shared_memory", lambda x: 99 * 1024)
    x = torch.empty(1)
    assert 16 * 2 * 352 * 9 == 99 * 1024
    assert not adaln._fits((2, 352), 9, x)
    assert adaln._fits((2, 320), 9, x)


@pytest.mark.parametrize(("channels", "vectors"), [(40, True), (36, False), (33, False)])
def test_rows_of_whole_vectors(rows, channels, vectors):
    """Five vectors of eight in 16 bits; 36 is no multiple of 8."""
    testing.run("gated_adaln", block(channels, 6, torch.bfloat16), backend="cuda")
    assert [found > 0 for found, _ in rows] == [vectors] * 2


@pytest.mark.parametrize(
    ("layout", "vectors"),
    [
        ((360, 40, 1), True), ((720, 48, 1), True), ((0, 0, 1), True),
        ((360, 1, 9), False), ((720, 80, 2), False), ((360, 41, 1), False),
    ],
    ids=["rows", "padded-rows", "expanded", "channels-first", "every-other", "odd-rows"],
)  # fmt: skip
@pytest.mark.parametrize("offset", [0, 1])
def test_rows_that_start_at_16_bytes(rows, layout, vectors, offset):
    x = torch.randn(1440 + 1)[offset:].as_strided((2, 9, 40), layout, offset)
    testing.run("adaln", dict(x=x, scale=randn(2, 40)), backend="cuda")
    assert (rows[0][0] > 0) == (vectors and not offset)


@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, DTYPES)), ids="-".join)
def test_rows_of_mixed_dtypes(rows, dtypes):
    """A float32 residual with a 16-bit branch, as under autocast; float32 modulation of 16-bit rows, as Wan's."""
    one, other = (DTYPES[d] for d in dtypes)
    kwargs = block(40, 6, one)
    testing.run("gated_adaln", {**kwargs, "branch": kwargs["branch"].to(other)}, backend="cuda")
    assert {vectors > 0 for vectors, _ in rows} == {dtypes[0] in ("fp32", dtypes[1])}
    rows.clear()
    modulation = {name: kwargs[name].float() for name in ("gate", "shift", "scale")}
    testing.run("gated_adaln", kwargs | modulation, backend="cuda")
    assert all(vectors for vectors, _ in rows)


# -- qk_norm_rope --------------------------------------------------------------------------------------


@pytest.fixture
def lanes(monkeypatch) -> list[int]:
    """Threads of a row of each launch: 0 is the general kernel."""
    seen = []
    real_plan, real_lanes = qk_norm_rope._plan, qk_norm_rope._lanes

    def watched(*args):
        monkeypatch.setattr(qk_norm_rope, "_lanes", lambda *given: found(given))
        seen.append(0)
        return real_plan(*args)

    def found(given):
        seen[-1] = real_lanes(*given)[0]
        return real_lanes(*given)

    monkeypatch.setattr(qk_norm_rope, "_plan", watched)
    monkeypatch.setattr(qk_norm_rope, "_plans", {})
    return seen


def angles(*shape: int) -> dict[str, Tensor]:
    angle = 6.0 * torch.rand(shape)
    return {"cos": angle.cos(), "sin": angle.sin()}


@pytest.mark.parametrize(
    ("dim", "options"),
    [
        (64, {}), (72, {}), (96, dict(layout="half", sections=3)), (112, {}), (128, {}),
        (128, dict(layout="half")), (128, dict(norm="layer")), (256, dict(layout="half", rotated=32)),
        (80, dict(rotated=20)), (96, dict(sections=3)),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_models_heads(lanes, dim, options, dtype):
    options = dict(options)
    dtype, rotated = DTYPES[dtype], options.pop("rotated", dim // 2)
    q, k, _ = randn(2, 7, 3, 3, dim, dtype=dtype).unbind(2)
    weights = {name: randn(dim, dtype=dtype) for name in ("q_weight", "k_weight", "k_bias")}
    table = angles(5, rotated)
    check("qk_norm_rope", q=q, k=k, **weights, **options, rope_start=1, rope_len=5, **table)
    assert len(lanes) == 2
    assert all(lanes)


@pytest.mark.parametrize(("heads", "dim"), [(12, 128), (40, 128), (32, 64)])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_models_hidden_rows(lanes, heads, dim, dtype):
    dtype = DTYPES[dtype]
    q, k, _ = randn(1, 3, 3, heads, dim, dtype=dtype).unbind(2)
    weights = {name: randn(heads * dim, dtype=dtype) for name in ("q_weight", "k_weight")}
    check("qk_norm_rope", q=q, k=k, **weights, over="hidden", **angles(3, dim // 2))
    table = angles(1, 3, 1, dim // 2)
    check("qk_norm_rope", q=q, k=k[:, :, :3], over="hidden", act="relu", **table)
    assert len(lanes) == 4
    assert all(lanes)


@pytest.mark.parametrize(
    ("q", "k", "options"),
    [
        (lambda: randn(1, 3, 2, 18), lambda: randn(1, 3, 2, 18), dict(rotated=9)),
        (lambda: randn(1, 3, 2, 72).bfloat16(), None, dict(rotated=36, layout="half")),
        (lambda: randn(1, 3, 2, 32)[..., ::2], None, dict(rotated=8)),
        (lambda: randn(97)[1:].view(1, 3, 2, 16), None, dict(rotated=8)),
        (lambda: randn(1, 3, 2, 16), lambda: randn(1, 3, 2, 16).half(), dict(rotated=8)),
        (lambda: randn(1, 2, 1, 1024).bfloat16(), None, dict(rotated=512)),
    ],
    ids=["odd", "halves-of-half-vectors", "every-other", "off-by-one", "mixed-dtypes", "long"],
)
def test_heads_for_the_general_kernels(lanes, q, k, options):
    q, options = q(), dict(options)
    table = angles(q.shape[1], options.pop("rotated"))
    check("qk_norm_rope", q=q, k=k and k(), **options, **table)
    assert lanes == [0, 0]


# -- unpatchify ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "wide"), [((13, 30, 45), True), ((1, 31, 45), False), ((28, 30, 53), True)]
)
def test_odd_widths_take_several_rows_at_a_time(grid, wide):
    """Rows of 90 values are no multiple of 16 bytes; four of them are."""
    kernels = cuda_extension.kernels()
    kernels.record(True)
    try:
        tokens = torch.empty(1, math.prod(grid), 64, dtype=torch.bfloat16, requires_grad=True)
        video = ops.unpatchify(tokens, grid, (1, 2, 2), 16, backend="cuda")
        torch.autograd.grad(video, tokens, torch.empty_like(video))
        names = [launched[0] for launched in kernels.recorded()]
    finally:
        kernels.record(False)
    vectors = 8 if wide else 1
    expected = [
        f"unpatchify_kernel<unsigned short, {way}, 8, {vectors}>" for way in ("false", "true")
    ]
    assert names == expected
