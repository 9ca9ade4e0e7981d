"""adaLN: `adaln`, `gated_residual` and `gated_adaln` of every backend."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_kernels import ops, testing
from tests.kernels.rounding import settled_rows

OP = "adaln"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = [case.name for case in testing.cases(torch.float32) if case.op == OP]


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


@pytest.mark.parametrize("rounding", ["once", "eager"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_examples(check, example, name, dtype, rounding):
    case = example(name, DTYPES[dtype])
    check(case.function, **case.kwargs, rounding=rounding)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("channels", "tokens"),
    [(1, 3), (33, 1), (33, 11), (40, 9), (72, 17), (257, 3), (1152, 1), (1152, 11)],
)
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_odd_sizes(check, channels, tokens, norm, dtype):
    dtype = DTYPES[dtype]
    gate, shift, scale = randn(2, 3 * channels, dtype=dtype).chunk(3, dim=-1)
    residual = randn(2, tokens, channels, dtype=dtype)
    # one channel: every row is ±1 under rms, of which the exact gradient is 0 and eager's error too
    check("gated_adaln",
        residual=residual, branch=residual.flip(1) + 1, gate=gate, shift=shift, scale=scale, norm=norm,
        weight=randn(channels, dtype=dtype), bias=randn(channels, dtype=dtype),
        eps=1.0 if channels == 1 else 1e-6)  # fmt: skip


@pytest.mark.parametrize(
    "groups",
    [
        dict(gate=0, shift=0, scale=0), dict(gate=2, shift=2, scale=2), dict(gate=12, shift=12, scale=12),
        dict(gate=0, shift=12, scale=2), dict(gate=1, shift=4, scale=6), dict(gate=12, shift=0, scale=3),
    ],
    ids=lambda g: "-".join(f"{k}{v}" for k, v in g.items()),
)  # fmt: skip
@pytest.mark.parametrize("channels", [40, 36])
def test_modulation_of_each_form(check, groups, channels):
    """0: [B, C]; else [B, G, C]. Also with tables and a second output; 36 is no multiple of 8."""
    dtype, c = torch.bfloat16, channels
    rows = {name: randn(2, *([g] if g else []), c, dtype=dtype) for name, g in groups.items()}
    check("gated_adaln",
        residual=randn(2, 12, c, dtype=dtype), branch=randn(2, 12, c, dtype=dtype), **rows,
        gate_table=randn(c, dtype=dtype), scale_table=randn(c, dtype=dtype),
        shift2=rows["scale"], gate_act="tanh")  # fmt: skip


def test_frames_that_share_a_row_and_frames_that_do_not(check):
    """Triton's programs keep a row that serves 16 tokens, and read shorter groups a token at a time."""
    check("adaln", x=randn(1, 34, 40), shift=randn(1, 2, 40), scale=randn(1, 17, 40))


@pytest.mark.parametrize(
    "only",
    [
        ("gate",),
        ("shift_table",),
        ("scale", "weight"),
        ("branch",),
        ("branch_weight",),
        ("residual",),
        ("bias",),
    ],
    ids="-".join,
)
@pytest.mark.parametrize("channels", [40, 33])
def test_only_some_gradients(agree, only, channels):
    kwargs: dict[str, Any] = dict(
        residual=randn(2, 9, channels), branch=randn(2, 9, channels), gate=randn(2, channels),
        shift=randn(2, channels), shift_table=randn(channels), scale=randn(2, 9, channels),
        weight=randn(channels), bias=randn(channels), branch_norm="rms", branch_weight=randn(channels),
    )  # fmt: skip

    def grads(backend: str | None, dtype: torch.dtype) -> tuple[Tensor, ...]:
        args = testing.converted(kwargs, dtype)
        leaves = [args[name].detach().requires_grad_() for name in only]
        args |= dict(zip(only, leaves, strict=True))
        _, y = ops.gated_adaln(**args, backend=backend)
        return torch.autograd.grad(y.square().sum(), leaves)

    agree(grads)


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("channels", [40, 33])
def test_gradient_of_one_output(agree, channels, which):
    kwargs = dict(
        residual=randn(2, 9, channels), branch=randn(2, 9, channels), gate=randn(2, channels),
        scale=randn(2, channels), shift2=randn(2, channels),
    )  # fmt: skip

    def grads(backend: str | None, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = {k: v.to(dtype, copy=True).requires_grad_() for k, v in kwargs.items()}
        out = ops.gated_adaln(**leaves, backend=backend)[which]
        return torch.autograd.grad(
            out.square().sum(), list(leaves.values()), allow_unused=True, materialize_grads=True
        )

    agree(grads)


@pytest.mark.parametrize(
    "layout", ["channels-first", "padded-rows", "expanded", "every-other", "off-by-one"]
)
def test_strides(check, layout):
    shape = (2, 9, 40)
    make = {
        "channels-first": lambda: randn(2, 40, 9).transpose(1, 2),
        "padded-rows": lambda: randn(2, 9, 48)[..., :40],
        "expanded": lambda: randn(1, 1, 40).expand(shape),
        "every-other": lambda: randn(2, 9, 80)[..., ::2],
        "off-by-one": lambda: randn(2 * 9 * 40 + 1)[1:].view(shape),
    }[layout]
    vector = randn(80)[::2]
    check("gated_adaln", residual=make(), branch=make(), scale=randn(2, 40))
    check("gated_adaln",
        residual=make(), branch=make(), gate=randn(40, 2).t(), shift=randn(2, 80)[:, ::2],
        scale=randn(2, 40), weight=vector, bias=vector)  # fmt: skip
    check("adaln", x=make(), weight=vector)


@pytest.mark.parametrize("shape", [(1, 1, 40), (1, 1, 1)], ids=str)
def test_a_cotangent_without_strides(agree, shape):
    """That of a sum, say: the second is not for the CUDA vector kernels."""
    values, dy = randn(2, 9, 40), randn(*shape).expand(2, 9, 40)

    def grads(backend: str | None, dtype: torch.dtype) -> tuple[Tensor, ...]:
        x = values.to(dtype, copy=True).requires_grad_()
        return torch.autograd.grad(ops.adaln(x, norm="rms", backend=backend), x, dy.to(dtype))

    agree(grads)


@pytest.mark.parametrize("dtypes", list(itertools.permutations(DTYPES, 2)), ids="-".join)
@pytest.mark.parametrize("rounding", ["once", "eager"])
def test_mixed_dtypes(check, dtypes, rounding):
    one, other = (DTYPES[d] for d in dtypes)
    check("gated_adaln",
        residual=randn(2, 6, 40, dtype=one), branch=randn(2, 6, 40, dtype=other), gate=randn(2, 40, dtype=other),
        gate_table=randn(40, dtype=one), shift=randn(2, 40, dtype=other), scale=randn(2, 40, dtype=other),
        weight=randn(40, dtype=one), rounding=rounding)  # fmt: skip


@pytest.mark.parametrize("dtypes", list(itertools.permutations(DTYPES, 2)), ids="-".join)
@pytest.mark.parametrize("function", ["gated_residual", "gated_adaln"])
def test_gradient_of_a_branch_of_another_dtype_that_is_not_read(check, function, dtypes):
    """With no gate, d(branch) is all that has the branch's dtype."""
    one, other = (DTYPES[d] for d in dtypes)
    check(function,
        residual=randn(2, 6, 40, dtype=one), branch=randn(2, 6, 40, dtype=other))  # fmt: skip


@pytest.mark.parametrize("rounding", ["once", "eager"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_float32_modulation_of_16_bit_rows(check, dtype, rounding):
    """Wan's: the modulation and its tables in float32."""
    dtype = DTYPES[dtype]
    check("gated_adaln",
        residual=randn(2, 6, 40, dtype=dtype), branch=randn(2, 6, 40, dtype=dtype), gate=randn(2, 40),
        gate_table=randn(40), shift=randn(2, 3, 40), scale=randn(2, 3, 40), scale_table=randn(40),
        rounding=rounding)  # fmt: skip


@pytest.mark.parametrize("rows", [1, 5, 20])
@pytest.mark.parametrize("channels", [40, 33])
def test_row_index(check, rows, channels):
    """Rows of many chunks, of one token and of none."""
    c, index = channels, (torch.rand(3, 13).square() * rows).int()
    check("gated_adaln",
        residual=randn(3, 13, c), branch=randn(3, 13, c), gate=randn(rows, c), shift=randn(rows, c),
        scale=randn(rows, c), scale_table=randn(c), weight=randn(c), row_index=index)  # fmt: skip


@pytest.mark.parametrize("rows", [(3, 9), (9, 3)], ids=str)
def test_row_index_into_tables_of_other_lengths(check, rows):
    """It stays within the shorter one."""
    gate, shift = (randn(n, 40) for n in rows)
    check(
        "gated_adaln", residual=randn(2, 7, 40), branch=randn(2, 7, 40), gate=gate, shift=shift,
        row_index=torch.randint(0, 3, (2, 7)).int())  # fmt: skip


@pytest.mark.parametrize("shape", [(0, 5, 40), (2, 0, 40), (0, 40)], ids=str)
def test_empty(backend, shape):
    x = randn(*shape).requires_grad_()
    shift = randn(shape[0], 40).requires_grad_()
    weight = randn(40).requires_grad_()
    y = ops.adaln(x, shift, shift, weight=weight, backend=backend)
    assert y.shape == x.shape
    dx, dshift, dweight = torch.autograd.grad(y.sum(), (x, shift, weight))
    assert dx.shape == x.shape
    assert not dshift.any()
    assert not dweight.any()


def test_token_list_without_samples(check):
    """[N, C]: each row is a sample; thousands of samples must not be thousands of partial sums."""
    check("adaln", x=randn(20, 40), shift=randn(20, 40), scale=randn(20, 40), weight=randn(40))


@pytest.mark.parametrize("name", ["block-rows-sandwich", "block-frame-tables"])
def test_same_bits_in_every_run(same_bits, example, name):
    case = example(name, torch.float32)
    same_bits(case.function, **case.kwargs)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("act", ["none", "tanh"])
@pytest.mark.parametrize("form", ["sample", "frame-table", "token"])
def test_eager_gated_residual_equals_eager(backend, form, act, dtype):
    dtype = DTYPES[dtype]
    gate = randn(2, *{"sample": (), "frame-table": (3,), "token": (12,)}[form], 72, dtype=dtype)
    kwargs = dict(
        residual=randn(2, 12, 72, dtype=dtype), branch=randn(2, 12, 72, dtype=dtype), gate=gate,
        gate_table=randn(72, dtype=dtype) if form == "frame-table" else None, gate_act=act,
    )  # fmt: skip
    with testing.plain_torch():
        expected = testing.run("gated_residual", kwargs)
    actual = testing.run("gated_residual", kwargs, backend=backend, rounding="eager")
    assert torch.equal(actual.outputs["out0"], expected.outputs["out0"])
    for name in ("residual", "branch"):
        assert torch.equal(actual.grads[name], expected.grads[name])


def test_tanh_of_every_bfloat16_gate(backend):
    gate = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    gate = gate[gate.isfinite()].view(1, 4, -1)
    zeros, ones = torch.zeros_like(gate), torch.ones_like(gate)
    out = ops.gated_residual(zeros, ones, gate, gate_act="tanh", rounding="eager", backend=backend)
    assert torch.equal(out, gate.tanh())


@pytest.mark.parametrize("form", ["sample", "frame-table", "token", "rows"])
def test_eager_adaln_equals_eager_given_the_statistics(backend, form):
    """Rows of mean 0 and a power of four as mean square: no reduction order can change the statistics."""
    half = torch.randint(0, 2, (2, 12, 32)) * 2.0 - 1
    x = torch.cat([half, -half], dim=-1).to(torch.bfloat16) * 2
    shapes = {"sample": (2, 64), "frame-table": (2, 3, 64), "token": (2, 12, 64), "rows": (5, 64)}
    shape = shapes[form]
    kwargs = dict(
        x=x, shift=randn(*shape, dtype=x.dtype), scale=randn(*shape, dtype=x.dtype), eps=0.0,
        shift_table=randn(64, dtype=x.dtype) if form == "frame-table" else None,
        weight=randn(64, dtype=x.dtype), bias=randn(64, dtype=x.dtype),
        row_index=torch.randint(0, 5, (2, 12)).int() if form == "rows" else None,
    )  # fmt: skip
    for norm in ("layer", "rms"):
        with testing.plain_torch():
            expected = ops.adaln(**kwargs, norm=norm)
        got = ops.adaln(**kwargs, norm=norm, rounding="eager", backend=backend)
        assert torch.equal(got, expected)


def by_eager(backend: str, function: str, kwargs: dict[str, Any]) -> list[dict[str, Tensor]]:
    """What this backend makes of a call with eager rounding, and what torch does."""
    with testing.plain_torch():
        expected = testing.run(function, kwargs).all()
    return [testing.run(function, kwargs, rounding="eager", backend=backend).all(), expected]


@pytest.mark.parametrize("affine", ["", "weight", "bias", "weight bias", "wide-weight bias"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_eager_adaln_equals_eager_on_settled_rows(backend, norm, dtype, affine):
    """The outputs, and those gradients that are no sums: of modulation with a row a token."""
    dtype, shape = DTYPES[dtype], (2, 12, 40)
    weight = randn(40, dtype=torch.float32 if "wide" in affine else dtype)
    affine = {
        n: v for n, v in dict(weight=weight, bias=randn(40, dtype=dtype)).items() if n in affine
    }
    x = settled_rows(24, norm, dtype, 40, **affine).view(shape)
    modulation = {n: randn(*shape, dtype=dtype) for n in ("shift", "scale", "shift2", "scale2")}
    for names in (("shift", "scale"), modulation):
        rows = {name: modulation[name] for name in names}
        got, expected = by_eager(backend, "adaln", dict(x=x, norm=norm, **affine, **rows))
        for name in (n for n in expected if n.startswith("out") or n[1:] in rows):
            assert torch.equal(got[name], expected[name]), name


@pytest.mark.parametrize("weight", [None, "fp32", "bf16"])
def test_eager_sandwich_norm_equals_eager_on_settled_rows(backend, weight):
    dtype, shape = torch.bfloat16, (2, 12, 40)
    weight = None if weight is None else randn(40, dtype=DTYPES[weight])
    branch = settled_rows(24, "rms", dtype, 40, weight).view(shape)
    residual, gate = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype)
    got, expected = by_eager(backend, "gated_residual", dict(
        residual=residual, branch=branch, gate=gate, branch_norm="rms", branch_weight=weight))  # fmt: skip
    for name in ("out0", "dresidual", "dgate"):
        assert torch.equal(got[name], expected[name]), name


@pytest.mark.parametrize("channels", [40, 33])
def test_offsets_beyond_two_to_the_31(backend, channels, far):
    values, rows = randn(2, 3, channels).bfloat16(), randn(2, channels).bfloat16()
    x, shift = far(values, 40, 1), far(rows, 1)
    y = ops.adaln(x, shift, backend=backend)
    assert torch.equal(y, ops.adaln(values, rows, backend=backend))


@pytest.mark.parametrize("channels", [40, 33])
@pytest.mark.parametrize(
    ("function", "name"), [("adaln", "x"), ("gated_adaln", "residual"), ("gated_adaln", "branch")]
)
def test_offsets_beyond_two_to_the_31_in_backward(agree_from_afar, function, name, channels):
    names = ("x",) if function == "adaln" else ("residual", "branch")
    tokens = {name: randn(2, 3, channels, dtype=torch.bfloat16) for name in names}
    rows = {name: randn(2, channels, dtype=torch.bfloat16) for name in ("shift", "scale")}
    gate = {} if function == "adaln" else {"gate": rows["shift"]}
    agree_from_afar(function, name, **tokens, **rows, **gate)


def test_float64_is_not_served(backend):
    x = randn(1, 2, 8).double()
    with pytest.raises(RuntimeError, match=f"'{backend}' cannot serve this call: .*float64"):
        ops.adaln(x, backend=backend)
    assert ops.adaln(x).dtype == torch.float64
