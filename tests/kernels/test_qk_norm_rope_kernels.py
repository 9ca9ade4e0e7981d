"""QK-norm and rotation: `qk_norm_rope` of every backend."""

from __future__ import annotations

import pytest
import torch

from dit_kernels import ops, testing
from tests.kernels.rounding import settled_rows

OP = "qk_norm_rope"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = [case.name for case in testing.cases(torch.float32) if case.op == OP]
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def angles(*shape):
    angle = 6.0 * torch.rand(shape)
    return {"cos": angle.cos(), "sin": angle.sin()}


def qk(*shape, k_heads=None):
    q = torch.randn(shape)
    return {"q": q, "k": torch.randn(*shape[:2], k_heads or shape[2], shape[3])}


@every_dtype
@pytest.mark.parametrize("name", NAMES)
def test_examples(check, example, name, dtype):
    check(OP, **example(name, dtype).kwargs)


@pytest.mark.parametrize("dim", [72, 112])
@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_head_dims_in_parts(check, dim, layout):
    x = qk(1, 9, 3, dim)
    weights = {"q_weight": torch.randn(dim), "k_weight": torch.randn(dim)}
    check(OP, **x, **weights, layout=layout, **angles(9, dim // 2))


@pytest.mark.parametrize("layout", ["interleaved", "half"])
@pytest.mark.parametrize(
    ("dim", "sections", "rotated"), [(24, 3, 6), (15, 1, 4), (21, 3, 6), (12, 2, 6), (7, 1, 0)]
)
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_sections_partial_and_odd(check, dim, sections, rotated, layout, norm):
    check(
        OP,
        **qk(2, 5, 3, dim),
        norm=norm,
        q_weight=torch.randn(dim),
        k_bias=torch.randn(dim),
        layout=layout,
        sections=sections,
        **angles(5, rotated),
    )


@pytest.mark.parametrize("heads", [12, 20, 5])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_over_the_hidden_size(check, heads, norm):
    x = qk(1, 5, heads, 28, k_heads=3)
    weights = {
        "q_weight": torch.randn(heads * 28),
        "q_bias": torch.randn(heads * 28),
        "k_weight": torch.randn(84),
    }
    check(OP, **x, **weights, over="hidden", norm=norm, act="relu", **angles(5, 14))


@pytest.mark.parametrize("over", ["head", "hidden"])
@pytest.mark.usefixtures("one_multiprocessor")
def test_programs_that_walk_over_several_tiles(check, over):
    x = torch.randn(1, 601, 3, 2, 8)
    weight = torch.randn(8 if over == "head" else 16)
    check(
        OP,
        q=x[:, :, 0],
        k=x[:, :, 1],
        over=over,
        q_weight=weight,
        k_weight=weight,
        **angles(601, 4),
    )


@pytest.mark.parametrize("rows", [(6, 8), (1, 6, 1, 8), (2, 6, 1, 8), (1, 6, 4, 8), (2, 6, 4, 8)])
@pytest.mark.parametrize("norm", ["rms", None])
def test_angles_of_every_form(check, rows, norm):
    check(OP, **qk(2, 9, 4, 16), norm=norm, rope_start=2, rope_len=6, **angles(*rows))


def test_angles_of_other_strides(check):
    table = torch.rand(5, 2, 8)
    check(OP, **qk(2, 5, 2, 16), cos=table[:, 0], sin=table[:, 1])
    check(OP, **qk(2, 5, 2, 16), cos=table[:, 0], sin=table[:, 1].contiguous())
    check(OP, **qk(2, 5, 2, 8), cos=table[:, 0, ::2], sin=table[:, 1, ::2])


@every_dtype
@pytest.mark.parametrize("dims", [2, 4])
def test_one_token_turns(check, dims, dtype):
    """The stride of a table of one row, 72 bytes here, means nothing."""
    shape = (1, 36) if dims == 2 else (1, 1, 1, 36)
    table = {name: value.to(dtype) for name, value in angles(*shape).items()}
    q = torch.randn(1, 3, 2, 72).to(dtype)
    check(OP, q=q[:, :1], **table)
    check(OP, q=q, rope_start=1, rope_len=1, **table)


def test_parameters_of_other_dtypes(check):
    x = {name: value.bfloat16() for name, value in qk(2, 5, 2, 16).items()}
    weights = {"q_weight": torch.randn(16), "k_weight": torch.randn(32)[::2].half()}
    check(OP, **x, **weights, **angles(5, 8))
    check(
        OP, **x, **weights, norm="layer", k_bias=torch.randn(16), rounding="eager", **angles(5, 8)
    )


@every_dtype
@pytest.mark.parametrize("over", ["head", "hidden"])
def test_eager_rounding_is_accurate(check, over, dtype):
    width = 16 if over == "head" else 32
    options = {name: torch.randn(width).to(dtype) for name in ("q_weight", "q_bias", "k_weight")}
    x = {name: value.to(dtype) for name, value in qk(2, 5, 2, 16).items()}
    check(OP, **x, **options, over=over, act="relu", rounding="eager", **angles(5, 8))


@every_dtype
@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_eager_rounding_is_equal_where_nothing_is_reduced(backend, layout, dtype):
    x = {name: value.to(dtype) for name, value in qk(2, 9, 2, 16).items()}
    kwargs = dict(
        **x,
        norm=None,
        act="relu",
        layout=layout,
        rounding="eager",
        **angles(7, 8),
        rope_start=1,
        rope_len=7,
    )
    got = testing.run(OP, kwargs, backward=False, backend=backend).all()
    with testing.plain_torch():
        expected = testing.run(OP, kwargs, backward=False).all()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("affine", ["", "weight", "bias", "weight bias", "wide-weight bias"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize(("over", "layout"), [("head", "interleaved"), ("hidden", "half")])
def test_eager_rounding_is_equal_on_settled_rows(backend, over, layout, norm, dtype, affine):
    """The output, and the gradients of angles of which each turns one pair: a sum of two exact products."""
    dtype, rows, width = DTYPES[dtype], *((24, 16) if over == "head" else (8, 48))
    weight = torch.randn(width).to(torch.float32 if "wide" in affine else dtype)
    bias = torch.randn(width).to(dtype)
    affine = {n: v for n, v in {"weight": weight, "bias": bias}.items() if n in affine}
    q = settled_rows(rows, norm, dtype, width, **affine).view(2, 4, 3, 16)
    kwargs = dict(q=q, norm=norm, over=over, act="relu", layout=layout, **angles(2, 4, 3, 8))
    kwargs |= {f"q_{name}": value for name, value in affine.items()}
    got = testing.run(OP, kwargs, rounding="eager", backend=backend).all()
    with testing.plain_torch():
        expected = testing.run(OP, kwargs).all()
    for name in ("out0", "dcos", "dsin"):
        assert torch.equal(got[name], expected[name]), name


def test_views(check):
    wide = torch.randn(3, 2, 6, 40).permute(1, 2, 0, 3)
    check(OP, q=wide[..., :16], k=wide[:, :, :1, 20:36], **angles(6, 8))
    check(
        OP,
        q=wide[..., ::2],
        k=wide[..., 1::2],
        over="hidden",
        q_weight=torch.randn(60),
        **angles(6, 10),
    )


@pytest.mark.parametrize("apart", [0, 3])
def test_a_row_whose_heads_are_a_head_dim_apart_in_memory(check, apart):
    """It lies in one piece only if its channels do: they are `apart` here."""
    memory = torch.randn(2 * 5 * 100)
    k = memory.as_strided((2, 5, 4, 16), (500, 100, 16, apart))
    check(
        OP, q=torch.randn(2, 5, 4, 16), k=k, over="hidden", k_weight=torch.randn(64), **angles(5, 8)
    )


@every_dtype
@pytest.mark.parametrize("over", ["head", "hidden"])
def test_padded_heads(check, over, dtype):
    """Rows of 16 bytes, of which one head does not end where the next begins."""
    wide = torch.randn(2, 5, 3, 24).to(dtype)
    weight = torch.randn(16 if over == "head" else 48).to(dtype)
    check(OP, q=wide[..., :16], q_weight=weight, over=over, **angles(5, 8))
    check(OP, q=wide[..., 8:], q_weight=weight, over=over, layout="half", **angles(5, 8))


@every_dtype
@pytest.mark.parametrize("name", ["q", "q_weight", "q_bias", "cos", "sin"])
def test_one_tensor_that_starts_at_no_multiple_of_16_bytes(check, name, dtype):
    kwargs = dict(q=torch.randn(2, 5, 2, 16), q_weight=torch.randn(16), q_bias=torch.randn(16))
    kwargs = testing.converted(kwargs, dtype) | angles(5, 8)
    value = kwargs[name]
    off = torch.empty(value.numel() + 1, dtype=value.dtype)[1:].view(value.shape).copy_(value)
    check(OP, **{**kwargs, name: off})


@pytest.mark.parametrize("which", [0, 1])
def test_gradients_of_other_strides_and_of_one_output(agree, which):
    values = {**qk(2, 5, 2, 16), "q_weight": torch.randn(16), "k_weight": torch.randn(16)}
    dy = torch.randn(2, 2, 16, 5).permute(0, 3, 1, 2)

    def grads(served, dtype):
        leaves = {n: value.to(dtype, copy=True).requires_grad_() for n, value in values.items()}
        out = ops.qk_norm_rope(**leaves, backend=served)[which]
        return torch.autograd.grad(
            out, list(leaves.values()), dy.to(dtype), allow_unused=True, materialize_grads=True
        )

    agree(grads)


@pytest.mark.parametrize("shape", [(0, 5, 2, 16), (2, 0, 2, 16)])
def test_empty(backend, shape):
    x = {name: value.requires_grad_() for name, value in qk(*shape).items()}
    weight = torch.randn(16, requires_grad=True)
    table = {name: value.requires_grad_() for name, value in angles(shape[1], 8).items()}
    q, k = ops.qk_norm_rope(**x, q_weight=weight, **table, backend=backend)
    grads = torch.autograd.grad((q.sum() + k.sum()), [*x.values(), weight, *table.values()])
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)


def test_keys_of_no_tokens(backend):
    q, k = ops.qk_norm_rope(torch.randn(1, 3, 2, 8), torch.randn(1, 0, 2, 8), backend=backend)
    assert q.shape == (1, 3, 2, 8)
    assert k.shape == (1, 0, 2, 8)


@pytest.mark.parametrize("dim", [16, 15])
def test_same_bits_in_every_run(same_bits, dim):
    same_bits(OP, **qk(2, 40, 2, dim), q_weight=torch.randn(dim), **angles(40, 7))


@pytest.mark.parametrize("dim", [16, 15])
def test_offsets_beyond_two_to_the_31(backend, dim, far):
    x, table = torch.randn(2, 3, 2, dim).bfloat16(), angles(3, 7)
    got, _ = ops.qk_norm_rope(far(x, 32, 16, 1), **table, backend=backend)
    expected, _ = ops.qk_norm_rope(x, **table, backend=backend)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dim", [16, 15])
@pytest.mark.parametrize("over", ["head", "hidden"])
def test_offsets_beyond_two_to_the_31_in_backward(agree_from_afar, over, dim):
    q, table = torch.randn(2, 3, 2, dim).bfloat16(), angles(3, 7 if dim == 15 else 8)
    weight = torch.randn(dim if over == "head" else 2 * dim).bfloat16()
    agree_from_afar(OP, "q", q=q, q_weight=weight, over=over, **table)


@pytest.mark.parametrize("dim", [16, 15])
def test_a_table_whose_samples_are_2_to_the_31_apart(backend, far, dim):
    q = torch.randn(2, 3, 2, dim).bfloat16()
    table = {n: t.bfloat16() for n, t in angles(2, 3, 1, 7 if dim == 15 else 8).items()}
    got, _ = ops.qk_norm_rope(q, **{n: far(t) for n, t in table.items()}, backend=backend)
    expected, _ = ops.qk_norm_rope(q, **table, backend=backend)
    assert torch.equal(got, expected)


def test_float64_is_not_served(backend):
    with pytest.raises(RuntimeError, match="float64"):
        ops.qk_norm_rope(torch.randn(1, 2, 2, 8).double(), backend=backend)
