"""The Triton kernels of adaLN against the reference: every form, dtype, odd size and stride; small shapes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from dit_kernels import ops, testing
from dit_kernels.ops.adaln import tiling
from dit_kernels.testing import Case

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EXAMPLES = {case.name: case for case in testing.cases(torch.float32) if case.op == "adaln"}


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    seed = sum(s * 7**i for i, s in enumerate(shape))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(function: str, kwargs: dict[str, Any], **options: Any) -> None:
    case = Case("adaln", function, function, kwargs)
    wrong = [a for a in testing.measure(case, backend="triton", **options) if not a.ok]
    assert not wrong, wrong


@pytest.mark.parametrize("rounding", ["once", "eager"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", EXAMPLES)
def test_examples(name, dtype, rounding):
    case = EXAMPLES[name]
    check(case.function, testing.converted(case.kwargs, DTYPES[dtype]), rounding=rounding)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize(
    ("channels", "tokens"), [(1, 3), (33, 1), (33, 11), (40, 9), (72, 17), (1152, 1), (1152, 11)]
)
def test_odd_sizes(channels, tokens, norm):
    dtype = torch.bfloat16
    gate, shift, scale = randn(2, 3 * channels, dtype=dtype).chunk(3, dim=-1)
    residual = randn(2, tokens, channels, dtype=dtype)
    # under rms of one channel every row is ±1, of which the exact gradient is 0 and eager's error too
    check("gated_adaln", dict(
        residual=residual, branch=residual.flip(1) + 1, gate=gate, shift=shift, scale=scale, norm=norm,
        weight=randn(channels, dtype=dtype), bias=randn(channels, dtype=dtype),
        eps=1.0 if channels == 1 else 1e-6))  # fmt: skip


@pytest.mark.parametrize(
    "groups",
    [
        dict(gate=0, shift=0, scale=0), dict(gate=2, shift=2, scale=2), dict(gate=12, shift=12, scale=12),
        dict(gate=0, shift=12, scale=2), dict(gate=1, shift=4, scale=6), dict(gate=12, shift=0, scale=3),
    ],
    ids=lambda g: "-".join(f"{k}{v}" for k, v in g.items()),
)  # fmt: skip
def test_modulation_of_each_form(groups):
    """0: [B, C]; else [B, G, C]. Also with tables and a second output."""
    dtype = torch.bfloat16
    rows = {name: randn(2, *([g] if g else []), 40, dtype=dtype) for name, g in groups.items()}
    check("gated_adaln", dict(
        residual=randn(2, 12, 40, dtype=dtype), branch=randn(2, 12, 40, dtype=dtype).neg(), **rows,
        gate_table=randn(40, dtype=dtype), scale_table=randn(40, dtype=dtype).neg(),
        shift2=rows["scale"], gate_act="tanh"))  # fmt: skip


def test_frames_that_share_a_row_and_frames_that_do_not():
    """In forward a program keeps a row that serves 16 tokens; it reads shorter groups a token at a time."""
    kwargs = dict(x=randn(1, 34, 40), shift=randn(1, 2, 40), scale=randn(1, 17, 40))
    check("adaln", kwargs, backward=False)


@pytest.mark.parametrize("only", [{"gate"}, {"shift_table"}, {"weight", "scale"}, {"branch"}, {"residual"}, {"bias"}], ids=str)  # fmt: skip
def test_only_some_gradients(only):
    kwargs = dict(
        residual=randn(2, 9, 40), branch=randn(2, 9, 40), gate=randn(2, 40), shift=randn(2, 40),
        shift_table=randn(40), scale=randn(2, 9, 40), weight=randn(40), bias=randn(40), branch_norm="rms",
    )  # fmt: skip

    def call(backend: str, dtype: torch.dtype) -> list[Tensor]:
        args = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
        leaves = [args[name].requires_grad_() for name in sorted(only)]
        _, y = ops.gated_adaln(**args, backend=backend)
        return list(torch.autograd.grad(y.square().sum(), leaves))

    actual, eager = call("triton", torch.float32), call("reference", torch.float32)
    for a, e, exact in zip(actual, eager, call("reference", torch.float64), strict=True):
        testing.assert_accurate(a, exact, e)


def test_gradient_of_one_output():
    kwargs = dict(
        residual=randn(2, 9, 40), branch=randn(2, 9, 40), gate=randn(2, 40), scale=randn(2, 40)
    )

    def call(backend: str | None, which: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        leaves = {k: v.to(dtype, copy=True).requires_grad_() for k, v in kwargs.items()}
        out = ops.gated_adaln(**leaves, backend=backend)[which]
        return list(
            torch.autograd.grad(
                out.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True
            )
        )

    for which in (0, 1):
        oracle = call("reference", which, torch.float64)
        with testing.plain_torch():
            eager = call(None, which)
        for actual, exact, rough in zip(call("triton", which), oracle, eager, strict=True):
            testing.assert_accurate(actual, exact, rough)


@pytest.mark.parametrize("layout", ["channels-first", "padded-rows", "expanded", "every-other"])
def test_strides(layout):
    shape = (2, 9, 40)
    make = {
        "channels-first": lambda: randn(2, 40, 9).transpose(1, 2),
        "padded-rows": lambda: randn(2, 9, 48)[..., :40],
        "expanded": lambda: randn(1, 1, 40).expand(shape),
        "every-other": lambda: randn(2, 9, 80)[..., ::2],
    }[layout]
    vector = randn(80)[::2]
    check("gated_adaln", dict(
        residual=make(), branch=make(), gate=randn(40, 2).t(), shift=randn(2, 80)[:, ::2],
        scale=randn(2, 40), weight=vector, bias=vector))  # fmt: skip
    check("adaln", dict(x=make(), weight=vector))
    x = make().clone().requires_grad_()  # a cotangent of zero strides
    assert torch.equal(
        torch.autograd.grad(ops.adaln(x, backend="triton").sum(), x)[0],
        torch.autograd.grad(ops.adaln(x, backend="triton"), x, torch.ones(shape))[0],
    )


@pytest.mark.parametrize("dtypes", list(itertools.permutations(DTYPES, 2)), ids="-".join)
@pytest.mark.parametrize("rounding", ["once", "eager"])
def test_mixed_dtypes(dtypes, rounding):
    one, other = (DTYPES[d] for d in dtypes)
    check("gated_adaln", dict(
        residual=randn(2, 6, 40, dtype=one), branch=randn(2, 6, 40, dtype=other), gate=randn(2, 40, dtype=other),
        gate_table=randn(40, dtype=one), shift=randn(2, 40, dtype=other), scale=randn(2, 40, dtype=other),
        weight=randn(40, dtype=one), rounding=rounding))  # fmt: skip


@pytest.mark.parametrize("rows", [1, 5, 20])
def test_row_index(rows):
    """Rows of many chunks, of one token and of none."""
    generator = torch.Generator().manual_seed(rows)
    index = (torch.rand(3, 13, generator=generator).square() * rows).int()
    check("gated_adaln", dict(
        residual=randn(3, 13, 40), branch=randn(3, 13, 40), gate=randn(rows, 40), shift=randn(rows, 40),
        scale=randn(rows, 40), scale_table=randn(40), weight=randn(40), row_index=index))  # fmt: skip


@pytest.mark.parametrize("shape", [(0, 5, 40), (2, 0, 40), (0, 40)], ids=str)
def test_empty(shape):
    x = randn(*shape).requires_grad_()
    shift = randn(shape[0], 40).requires_grad_()
    weight = randn(40).requires_grad_()
    y = ops.adaln(x, shift, shift, weight=weight, backend="triton")
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


def test_backward_is_deterministic():
    kwargs = EXAMPLES["block-rows-sandwich"].kwargs
    one, two = (testing.run("gated_adaln", kwargs, backend="triton").all() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


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
    actual = testing.run("gated_residual", kwargs, backend="triton", rounding="eager")
    assert torch.equal(actual.outputs["out0"], expected.outputs["out0"])
    for name in ("residual", "branch"):
        assert torch.equal(actual.grads[name], expected.grads[name])


def test_tanh_of_every_bfloat16_gate():
    gate = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    gate = gate[gate.isfinite()].view(1, 4, -1)
    zeros, ones = torch.zeros_like(gate), torch.ones_like(gate)
    out = ops.gated_residual(zeros, ones, gate, gate_act="tanh", rounding="eager", backend="triton")
    assert torch.equal(out, gate.tanh())


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
        assert torch.equal(
            ops.adaln(**kwargs, norm=norm, rounding="eager", backend="triton"), expected
        )


def test_offsets_beyond_two_to_the_31(monkeypatch):
    # the interpreter would copy each whole storage back
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *args: None)
    far = torch.empty(2**31 + 4096, dtype=torch.bfloat16).as_strided((2, 3, 40), (2**31, 40, 1))
    far.copy_(randn(2, 3, 40))
    shift = torch.empty(2**31 + 64, dtype=torch.bfloat16).as_strided((2, 40), (2**31, 1))
    shift.copy_(randn(2, 40))
    y = ops.adaln(far, shift, backend="triton")
    assert torch.equal(y, ops.adaln(far.contiguous(), shift.contiguous(), backend="triton"))


def test_float64_is_refused():
    x = randn(2, 3, 40).double()
    with pytest.raises(RuntimeError, match="'triton' cannot serve this call: float64"):
        ops.adaln(x, backend="triton")
    assert ops.adaln(x).dtype == torch.float64


def test_long_rows_are_refused():
    with pytest.raises(RuntimeError, match="at most 16384 channels; got 16385"):
        ops.adaln(torch.empty(1, 1, 16385), backend="triton")


def test_rows_are_cut_without_waste():
    for kernel, channels in itertools.product(tiling.HELD, range(1, 16385, 7)):
        parts = tiling.configure(channels, kernel).parts
        assert sum(parts) >= channels > sum(parts[:-1])
        assert all(p & (p - 1) == 0 for p in parts)
        assert channels < 512 or 7 * (sum(parts) - channels) <= channels
    assert tiling.split_row(1152, warps=2) == (1024, 128)
    assert tiling.split_row(5120, warps=4) == (1024,) * 5
