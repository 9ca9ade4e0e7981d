"""The CUDA kernels of adaLN in the emulator, against the reference: every form, dtype, odd size and stride."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_kernels import ops, testing
from dit_kernels.ops import cuda_extension
from dit_kernels.ops.adaln import cuda as backend
from dit_kernels.testing import Case

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EXAMPLES = {case.name: case for case in testing.cases(torch.float32) if case.op == "adaln"}


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    seed = sum(s * 7**i for i, s in enumerate(shape))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def rows(monkeypatch) -> list[tuple[int, int]]:
    """(vectors, threads) of each launch: 0 vectors is the general kernel."""
    seen = []
    real = backend._row

    def watched(*args: Any) -> tuple[int, int]:
        seen.append(real(*args))
        return seen[-1]

    monkeypatch.setattr(backend, "_row", watched)
    monkeypatch.setattr(backend, "_plans", {})
    return seen


def check(function: str, kwargs: dict[str, Any], **options: Any) -> None:
    case = Case("adaln", function, function, kwargs)
    wrong = [a for a in testing.measure(case, backend="cuda", **options) if not a.ok]
    assert not wrong, wrong


@pytest.mark.parametrize("rounding", ["once", "eager"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", EXAMPLES)
def test_examples(name, dtype, rounding):
    case = EXAMPLES[name]
    check(case.function, testing.converted(case.kwargs, DTYPES[dtype]), rounding=rounding)


def block(channels: int, tokens: int, dtype: torch.dtype, **more: Any) -> dict[str, Any]:
    gate, shift, scale = randn(2, 3 * channels, dtype=dtype).chunk(3, dim=-1)
    residual = randn(2, tokens, channels, dtype=dtype)
    return dict(
        residual=residual, branch=residual.flip(1) + 1, gate=gate, shift=shift, scale=scale, **more
    )


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize(("channels", "tokens"), [(1, 3), (33, 1), (33, 11), (40, 9), (72, 17), (257, 3)])  # fmt: skip
def test_odd_sizes(channels, tokens, norm):
    dtype = torch.bfloat16
    # under rms of one channel every row is ±1, of which the exact gradient is 0 and eager's error too
    check("gated_adaln", block(
        channels, tokens, dtype, norm=norm, weight=randn(channels, dtype=dtype),
        bias=randn(channels, dtype=dtype), eps=1.0 if channels == 1 else 1e-6))  # fmt: skip


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("channels", [1152, 1536, 1920, 2304, 3072, 5120])
def test_the_models_rows_have_vector_kernels(rows, channels, dtype):
    check("gated_adaln", block(channels, 3, DTYPES[dtype]))
    assert len(rows) == 2
    assert all(vectors for vectors, _ in rows)
    width = 16 // DTYPES[dtype].itemsize
    for vectors, threads in rows:
        assert channels <= vectors * threads * width
        assert 3 * (vectors * threads * width - channels) <= channels


def test_affine_and_sandwich_norms_of_a_long_row_have_vector_kernels(rows):
    channels, dtype = 1536, torch.bfloat16
    check("gated_adaln", block(
        channels, 3, dtype, weight=randn(channels, dtype=dtype), bias=randn(channels, dtype=dtype),
        branch_norm="rms", branch_weight=randn(channels, dtype=dtype), gate_act="tanh"))  # fmt: skip
    assert [vectors for vectors, _ in rows] == [3, 2]


def test_rows_too_long_for_the_vector_kernels(rows):
    check("adaln", dict(x=randn(1, 2, 20488).bfloat16(), shift=randn(1, 20488).bfloat16()))
    check("adaln", dict(x=randn(1, 2, 9224).bfloat16(), scale=randn(1, 9224).bfloat16()))
    assert [vectors > 0 for vectors, _ in rows] == [False, False, True, False]


def test_rows_that_do_not_fit_shared_memory(rows, monkeypatch):
    """A block of an Ada GPU has 99 KiB: a token less in it at a time, or the general kernels."""
    for kib, forward, backward in ((227, True, True), (99, False, True), (48, False, False)):
        monkeypatch.setattr(cuda_extension, "shared_memory", lambda x, kib=kib: kib * 1024)
        monkeypatch.setattr(backend, "_plans", {})
        monkeypatch.setattr(backend, "_backward_plans", {})
        rows.clear()
        check("gated_adaln", block(16384, 1, torch.bfloat16), backward=False)
        assert (rows[-1][0] > 0) == forward
        rows.clear()
        check("gated_adaln", block(8192, 5, torch.bfloat16))
        assert (rows[-1][0] > 0) == backward


@pytest.mark.parametrize(
    "groups",
    [
        dict(gate=0, shift=0, scale=0), dict(gate=2, shift=2, scale=2), dict(gate=12, shift=12, scale=12),
        dict(gate=0, shift=12, scale=2), dict(gate=1, shift=4, scale=6), dict(gate=12, shift=0, scale=3),
    ],
    ids=lambda g: "-".join(f"{k}{v}" for k, v in g.items()),
)  # fmt: skip
@pytest.mark.parametrize("channels", [40, 36])
def test_modulation_of_each_form(groups, channels, rows):
    """0: [B, C]; else [B, G, C]. Also with tables and a second output; 36 is no multiple of 8."""
    dtype, c = torch.bfloat16, channels
    modulation = {name: randn(2, *([g] if g else []), c, dtype=dtype) for name, g in groups.items()}
    check("gated_adaln", dict(
        residual=randn(2, 12, c, dtype=dtype), branch=randn(2, 12, c, dtype=dtype).neg(), **modulation,
        gate_table=randn(c, dtype=dtype), scale_table=randn(c, dtype=dtype).neg(),
        shift2=modulation["scale"], gate_act="tanh"))  # fmt: skip
    assert {vectors > 0 for vectors, _ in rows} == {channels == 40}


@pytest.mark.parametrize("only", [{"gate"}, {"shift_table"}, {"weight", "scale"}, {"branch"}, {"residual"}, {"bias"}], ids=str)  # fmt: skip
@pytest.mark.parametrize("channels", [40, 33])
def test_only_some_gradients(only, channels):
    kwargs = dict(
        residual=randn(2, 9, channels), branch=randn(2, 9, channels), gate=randn(2, channels),
        shift=randn(2, channels), shift_table=randn(channels), scale=randn(2, 9, channels),
        weight=randn(channels), bias=randn(channels), branch_norm="rms",
    )  # fmt: skip

    def call(backend: str, dtype: torch.dtype) -> list[Tensor]:
        args = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
        leaves = [args[name].requires_grad_() for name in sorted(only)]
        _, y = ops.gated_adaln(**args, backend=backend)
        return list(torch.autograd.grad(y.square().sum(), leaves))

    actual, eager = call("cuda", torch.float32), call("reference", torch.float32)
    for a, e, exact in zip(actual, eager, call("reference", torch.float64), strict=True):
        testing.assert_accurate(a, exact, e)


@pytest.mark.parametrize("channels", [40, 33])
def test_gradient_of_one_output(channels):
    kwargs = dict(
        residual=randn(2, 9, channels), branch=randn(2, 9, channels), gate=randn(2, channels),
        scale=randn(2, channels), shift2=randn(2, channels),
    )  # fmt: skip

    def call(backend: str | None, which: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        leaves = {k: v.to(dtype, copy=True).requires_grad_() for k, v in kwargs.items()}
        out = ops.gated_adaln(**leaves, backend=backend)[which]
        return list(
            torch.autograd.grad(
                out.square().sum(), list(leaves.values()), allow_unused=True, materialize_grads=True
            )
        )

    for which in (0, 1, 2):
        oracle = call("reference", which, torch.float64)
        with testing.plain_torch():
            eager = call(None, which)
        for actual, exact, rough in zip(call("cuda", which), oracle, eager, strict=True):
            testing.assert_accurate(actual, exact, rough)


@pytest.mark.parametrize("layout", ["channels-first", "padded-rows", "expanded", "every-other", "off-by-one"])  # fmt: skip
def test_strides(layout, rows):
    shape = (2, 9, 40)
    make = {
        "channels-first": lambda: randn(2, 40, 9).transpose(1, 2),
        "padded-rows": lambda: randn(2, 9, 48)[..., :40],
        "expanded": lambda: randn(1, 1, 40).expand(shape),
        "every-other": lambda: randn(2, 9, 80)[..., ::2],
        "off-by-one": lambda: randn(2 * 9 * 40 + 1)[1:].view(shape),
    }[layout]
    check("gated_adaln", dict(residual=make(), branch=make(), scale=randn(2, 40)))
    vectors = layout in ("padded-rows", "expanded")
    assert rows[0][0] > 0 or not vectors
    vector = randn(80)[::2]
    check("gated_adaln", dict(
        residual=make(), branch=make(), gate=randn(40, 2).t(), shift=randn(2, 80)[:, ::2],
        scale=randn(2, 40), weight=vector, bias=vector))  # fmt: skip
    check("adaln", dict(x=make(), weight=vector))


@pytest.mark.parametrize("shape", [(1, 1, 40), (1, 1, 1)], ids=str)
def test_a_cotangent_without_strides(shape):
    """That of a sum, say: the second is not for the vector kernels."""
    dy = randn(*shape).expand(2, 9, 40)

    def grad(backend: str, dtype: torch.dtype) -> Tensor:
        x = randn(2, 9, 40).to(dtype).requires_grad_()
        y = ops.adaln(x, norm="rms", backend=backend)
        return torch.autograd.grad(y, x, dy.to(dtype))[0]

    oracle, eager = grad("reference", torch.float64), grad("reference", torch.float32)
    testing.assert_accurate(grad("cuda", torch.float32), oracle, eager)


@pytest.mark.parametrize("dtypes", list(itertools.permutations(DTYPES, 2)), ids="-".join)
@pytest.mark.parametrize("rounding", ["once", "eager"])
def test_mixed_dtypes(dtypes, rounding, rows):
    """A float32 residual with a 16-bit branch, as under autocast, has vector kernels."""
    one, other = (DTYPES[d] for d in dtypes)
    check("gated_adaln", dict(
        residual=randn(2, 6, 40, dtype=one), branch=randn(2, 6, 40, dtype=other), gate=randn(2, 40, dtype=other),
        gate_table=randn(40, dtype=one), shift=randn(2, 40, dtype=other), scale=randn(2, 40, dtype=other),
        weight=randn(40, dtype=one), rounding=rounding))  # fmt: skip
    assert {vectors > 0 for vectors, _ in rows} == {dtypes[0] == "fp32"}


@pytest.mark.parametrize("dtypes", list(itertools.permutations(DTYPES, 2)), ids="-".join)
@pytest.mark.parametrize("function", ["gated_residual", "gated_adaln"])
def test_gradient_of_a_branch_of_another_dtype_that_is_not_read(function, dtypes):
    """With no gate, d(branch) is all that has the branch's dtype."""
    one, other = (DTYPES[d] for d in dtypes)
    check(function, dict(
        residual=randn(2, 6, 40, dtype=one), branch=randn(2, 6, 40, dtype=other)))  # fmt: skip


@pytest.mark.parametrize("rounding", ["once", "eager"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_float32_modulation_of_16_bit_rows(dtype, rounding, rows):
    """Wan's: the modulation and its tables in float32."""
    dtype = DTYPES[dtype]
    check("gated_adaln", dict(
        residual=randn(2, 6, 40, dtype=dtype), branch=randn(2, 6, 40, dtype=dtype).neg(), gate=randn(2, 40),
        gate_table=randn(40), shift=randn(2, 3, 40), scale=randn(2, 3, 40), scale_table=randn(40).neg(),
        rounding=rounding))  # fmt: skip
    assert all(vectors for vectors, _ in rows)


@pytest.mark.parametrize("n_rows", [1, 5, 20])
@pytest.mark.parametrize("channels", [40, 33])
def test_row_index(n_rows, channels):
    """Rows of many chunks, of one token and of none."""
    generator = torch.Generator().manual_seed(n_rows)
    index = (torch.rand(3, 13, generator=generator).square() * n_rows).int()
    c = channels
    check("gated_adaln", dict(
        residual=randn(3, 13, c), branch=randn(3, 13, c), gate=randn(n_rows, c), shift=randn(n_rows, c),
        scale=randn(n_rows, c), scale_table=randn(c), weight=randn(c), row_index=index))  # fmt: skip


@pytest.mark.parametrize("shape", [(0, 5, 40), (2, 0, 40), (0, 40)], ids=str)
def test_empty(shape):
    x = randn(*shape).requires_grad_()
    shift = randn(shape[0], 40).requires_grad_()
    weight = randn(40).requires_grad_()
    y = ops.adaln(x, shift, shift, weight=weight, backend="cuda")
    assert y.shape == x.shape
    dx, dshift, dweight = torch.autograd.grad(y.sum(), (x, shift, weight))
    assert dx.shape == x.shape
    assert not dshift.any()
    assert not dweight.any()


def test_token_list_without_samples():
    """[N, C]: each row is a sample; thousands of samples must not be thousands of partial sums."""
    check(
        "adaln", dict(x=randn(20, 40), shift=randn(20, 40), scale=randn(20, 40), weight=randn(40))
    )


@pytest.mark.parametrize("name", ["block-rows-sandwich", "block-frame-tables"])
def test_order_of_threads_and_blocks_changes_nothing(name):
    case = EXAMPLES[name]
    runs = []
    for seed in range(3):
        cuda_extension.kernels().set_seed(seed)
        runs.append(testing.run(case.function, case.kwargs, backend="cuda").all())
    assert all(torch.equal(run[key], runs[0][key]) for run in runs for key in run)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("act", ["none", "tanh"])
@pytest.mark.parametrize("form", ["sample", "frame-table", "token"])
def test_eager_gated_residual_equals_eager(form, act, dtype):
    dtype = DTYPES[dtype]
    gate = randn(2, *{"sample": (), "frame-table": (3,), "token": (12,)}[form], 72, dtype=dtype)
    kwargs = dict(
        residual=randn(2, 12, 72, dtype=dtype), branch=randn(2, 12, 72, dtype=dtype).neg(), gate=gate,
        gate_table=randn(72, dtype=dtype) if form == "frame-table" else None, gate_act=act,
    )  # fmt: skip
    with testing.plain_torch():
        expected = testing.run("gated_residual", kwargs)
    actual = testing.run("gated_residual", kwargs, backend="cuda", rounding="eager")
    assert torch.equal(actual.outputs["out0"], expected.outputs["out0"])
    for name in ("residual", "branch"):
        assert torch.equal(actual.grads[name], expected.grads[name])


@pytest.mark.parametrize("form", ["sample", "frame-table", "token", "rows"])
def test_eager_adaln_equals_eager_given_the_statistics(form):
    """Rows of mean 0 and a power of four as mean square: no reduction order can change the statistics."""
    generator = torch.Generator().manual_seed(0)
    half = torch.randint(0, 2, (2, 12, 32), generator=generator) * 2.0 - 1
    x = torch.cat([half, -half], dim=-1).to(torch.bfloat16) * 2
    shape = {"sample": (2, 64), "frame-table": (2, 3, 64), "token": (2, 12, 64), "rows": (5, 64)}[
        form
    ]
    kwargs = dict(
        x=x, shift=randn(*shape, dtype=x.dtype), scale=randn(*shape, dtype=x.dtype).neg(), eps=0.0,
        shift_table=randn(64, dtype=x.dtype) if form == "frame-table" else None,
        weight=randn(64, dtype=x.dtype), bias=randn(64, dtype=x.dtype).neg(),
        row_index=torch.randint(0, 5, (2, 12), generator=generator).int() if form == "rows" else None,
    )  # fmt: skip
    for norm in ("layer", "rms"):
        with testing.plain_torch():
            expected = ops.adaln(**kwargs, norm=norm)
        got = ops.adaln(**kwargs, norm=norm, rounding="eager", backend="cuda")
        assert torch.equal(got, expected)


def test_offsets_beyond_two_to_the_31(rows):
    for channels in (40, 33):
        far = torch.empty(2**31 + 4096, dtype=torch.bfloat16).as_strided((2, 3, channels), (2**31, 40, 1))  # fmt: skip
        far.copy_(randn(2, 3, channels))
        shift = torch.empty(2**31 + 64, dtype=torch.bfloat16).as_strided((2, channels), (2**31, 1))
        shift.copy_(randn(2, channels))
        y = ops.adaln(far, shift, backend="cuda")
        assert torch.equal(y, ops.adaln(far.contiguous(), shift.contiguous(), backend="cuda"))
    assert [vectors > 0 for vectors, _ in rows] == [True, True, False, False]


def test_float64_is_refused():
    x = randn(2, 3, 40).double()
    with pytest.raises(RuntimeError, match=r"'cuda' cannot serve this call: .*float64"):
        ops.adaln(x, backend="cuda")


def plan(channels: int = 40, vectors: int = 3, threads: int = 32, stride: int = 40) -> Any:
    absent = (0, 0, 0, 1, False, 0)
    tokens = [(0, 0, 0, 0), (0, stride, 1, 0)]
    return cuda_extension.kernels().AdalnForward(
        (1, 2, channels, vectors, threads), (2, False, False, False), 1e-6, 1, tokens, [absent] * 5, [0] * 6
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "shift", "message"),
    [
        ({}, 1, r"adaln_forward: a row must start at a multiple of 16 bytes.*address % 16 = 4.*float32 \[2, 40\]"),
        (dict(stride=41), 0, "strides 0, 41, 1 of 4 bytes"),
        (dict(vectors=4), 0, "no kernel has 4 vectors a thread"),
        (dict(channels=400), 0, "a row of 400 channels is not 3 vectors of 4 in 32 threads"),
        (dict(threads=48), 0, "whole warps; got 1 x 2 x 40 and 48 threads"),
        (dict(threads=1024), 0, "in 1024 threads"),
    ],
)  # fmt: skip
def test_launchers_refuse_what_their_kernels_cannot_read(arguments, shift, message):
    x = torch.zeros(128)[shift : shift + 80].view(2, 40)
    y = torch.empty_like(x)
    with pytest.raises(RuntimeError, match=message):
        cuda_extension.kernels().adaln_forward(
            *cuda_extension.where(x), plan(**arguments), None, x, *[None] * 13, y, None, None, None, None
        )  # fmt: skip


def test_rows_leave_room_for_what_the_kernel_declares(monkeypatch):
    """A KiB: rows that take all that a block can have are never launched."""
    monkeypatch.setattr(cuda_extension, "shared_memory", lambda x: 99 * 1024)
    x = torch.empty(1)
    assert 16 * 2 * 352 * 9 == 99 * 1024
    assert not backend._fits((2, 352), 9, x)
    assert backend._fits((2, 320), 9, x)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_one_graph(dynamic):
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=dynamic, backend="aot_eager")
    def compiled(**kwargs: Tensor) -> Any:
        return ops.gated_adaln(**kwargs, backend="cuda")

    for tokens in (3, 5):
        kwargs = dict(residual=randn(2, tokens, 40), branch=randn(2, tokens, 40).neg(),
            gate=randn(2, 40), shift=randn(2, 40), scale=randn(2, tokens, 40))  # fmt: skip
        expected = testing.run("gated_adaln", kwargs, backend="cuda").all()
        actual = testing.run(compiled, kwargs).all()
        assert all(torch.equal(actual[name], expected[name]) for name in expected)
