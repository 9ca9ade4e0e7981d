"""The Triton kernels of qk_norm_rope, interpreted on the CPU."""

from __future__ import annotations

import pytest
import torch

from dit_kernels import ops, testing
from dit_kernels.ops import triton_launch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CASES = [case.name for case in testing.cases(torch.float32) if case.op == "qk_norm_rope"]
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def check(**kwargs):
    case = testing.Case("qk_norm_rope", "", "qk_norm_rope", kwargs)
    for measured in testing.measure(case, backend="triton"):
        assert measured.ok, measured


def angles(*shape):
    angle = 6.0 * torch.rand(shape)
    return {"cos": angle.cos(), "sin": angle.sin()}


def qk(*shape, k_heads=None):
    q = torch.randn(shape)
    return {"q": q, "k": torch.randn(*shape[:2], k_heads or shape[2], shape[3])}


@every_dtype
@pytest.mark.parametrize("name", CASES)
def test_examples(name, dtype):
    (case,) = [c for c in testing.cases(dtype) if c.op == "qk_norm_rope" and c.name == name]
    for measured in testing.measure(case, backend="triton"):
        assert measured.ok, measured


@pytest.mark.parametrize("dim", [72, 112])
@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_head_dims_in_parts(dim, layout):
    x = qk(1, 9, 3, dim)
    weights = {"q_weight": torch.randn(dim), "k_weight": torch.randn(dim)}
    check(**x, **weights, layout=layout, **angles(9, dim // 2))


@pytest.mark.parametrize("layout", ["interleaved", "half"])
@pytest.mark.parametrize(
    ("dim", "sections", "rotated"), [(24, 3, 6), (15, 1, 4), (21, 3, 6), (12, 2, 6), (7, 1, 0)]
)
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_sections_partial_and_odd(dim, sections, rotated, layout, norm):
    check(
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
def test_over_the_hidden_size(heads, norm):
    x = qk(1, 5, heads, 28, k_heads=3)
    weights = {
        "q_weight": torch.randn(heads * 28),
        "q_bias": torch.randn(heads * 28),
        "k_weight": torch.randn(84),
    }
    check(**x, **weights, over="hidden", norm=norm, act="relu", **angles(5, 14))


@pytest.mark.parametrize("over", ["head", "hidden"])
def test_programs_that_walk_over_several_tiles(over, monkeypatch):
    monkeypatch.setattr(triton_launch, "multiprocessors", lambda tensor: 1)
    x = torch.randn(1, 601, 3, 2, 8)
    weight = torch.randn(8 if over == "head" else 16)
    check(q=x[:, :, 0], k=x[:, :, 1], over=over, q_weight=weight, k_weight=weight, **angles(601, 4))


@pytest.mark.parametrize("rows", [(6, 8), (1, 6, 1, 8), (2, 6, 1, 8), (1, 6, 4, 8), (2, 6, 4, 8)])
@pytest.mark.parametrize("norm", ["rms", None])
def test_angles_of_every_form(rows, norm):
    check(**qk(2, 9, 4, 16), norm=norm, rope_start=2, rope_len=6, **angles(*rows))


def test_angles_of_other_strides():
    table = torch.rand(5, 2, 8)
    check(**qk(2, 5, 2, 16), cos=table[:, 0], sin=table[:, 1])
    check(**qk(2, 5, 2, 16), cos=table[:, 0], sin=table[:, 1].contiguous())
    check(**qk(2, 5, 2, 8), cos=table[:, 0, ::2], sin=table[:, 1, ::2])


def test_parameters_of_other_dtypes():
    x = {name: value.bfloat16() for name, value in qk(2, 5, 2, 16).items()}
    weights = {"q_weight": torch.randn(16), "k_weight": torch.randn(32)[::2].half()}
    check(**x, **weights, **angles(5, 8))
    check(**x, **weights, norm="layer", k_bias=torch.randn(16), rounding="eager", **angles(5, 8))


@every_dtype
@pytest.mark.parametrize("over", ["head", "hidden"])
def test_eager_rounding_is_accurate(over, dtype):
    width = 16 if over == "head" else 32
    options = {name: torch.randn(width).to(dtype) for name in ("q_weight", "q_bias", "k_weight")}
    x = {name: value.to(dtype) for name, value in qk(2, 5, 2, 16).items()}
    check(**x, **options, over=over, act="relu", rounding="eager", **angles(5, 8))


@every_dtype
@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_eager_rounding_is_equal_where_nothing_is_reduced(layout, dtype):
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
    got = testing.run("qk_norm_rope", kwargs, backward=False, backend="triton").all()
    with testing.plain_torch():
        expected = testing.run("qk_norm_rope", kwargs, backward=False).all()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_views():
    wide = torch.randn(3, 2, 6, 40).permute(1, 2, 0, 3)
    check(q=wide[..., :16], k=wide[:, :, :1, 20:36], **angles(6, 8))
    check(
        q=wide[..., ::2],
        k=wide[..., 1::2],
        over="hidden",
        q_weight=torch.randn(60),
        **angles(6, 10),
    )


@pytest.mark.parametrize("apart", [0, 3])
def test_a_row_whose_heads_are_a_head_dim_apart_in_memory(apart):
    """It lies in one piece only if its channels do: they are `apart` here."""
    memory = torch.randn(2 * 5 * 100)
    k = memory.as_strided((2, 5, 4, 16), (500, 100, 16, apart))
    check(q=torch.randn(2, 5, 4, 16), k=k, over="hidden", k_weight=torch.randn(64), **angles(5, 8))


def test_gradients_of_other_strides_and_of_one_output():
    values = {**qk(2, 5, 2, 16), "q_weight": torch.randn(16), "k_weight": torch.randn(16)}
    dy = torch.randn(2, 2, 16, 5).permute(0, 3, 1, 2)

    def grads(backend: str | None, i: int, dtype: torch.dtype = torch.float32):
        leaves = {
            name: value.to(dtype, copy=True).requires_grad_() for name, value in values.items()
        }
        out = ops.qk_norm_rope(**leaves, backend=backend)[i]
        return torch.autograd.grad(
            out, list(leaves.values()), dy.to(dtype), allow_unused=True, materialize_grads=True
        )

    for i in (0, 1):
        with testing.plain_torch():
            eager = grads(None, i)
        oracle = grads("reference", i, torch.float64)
        for got, exact, rough in zip(grads("triton", i), oracle, eager, strict=True):
            testing.assert_accurate(got, exact, rough)


@pytest.mark.parametrize("shape", [(0, 5, 2, 16), (2, 0, 2, 16)])
def test_empty(shape):
    x = {name: value.requires_grad_() for name, value in qk(*shape).items()}
    weight = torch.randn(16, requires_grad=True)
    table = {name: value.requires_grad_() for name, value in angles(shape[1], 8).items()}
    q, k = ops.qk_norm_rope(**x, q_weight=weight, **table, backend="triton")
    grads = torch.autograd.grad((q.sum() + k.sum()), [*x.values(), weight, *table.values()])
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)


def test_keys_of_no_tokens():
    q, k = ops.qk_norm_rope(torch.randn(1, 3, 2, 8), torch.randn(1, 0, 2, 8), backend="triton")
    assert q.shape == (1, 3, 2, 8)
    assert k.shape == (1, 0, 2, 8)


def test_deterministic():
    kwargs = dict(**qk(2, 40, 2, 16), q_weight=torch.randn(16), **angles(40, 8))
    first, second = (testing.run("qk_norm_rope", kwargs, backend="triton").all() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_unsupported():
    with pytest.raises(RuntimeError, match="float64"):
        ops.qk_norm_rope(torch.randn(1, 2, 2, 8).double(), backend="triton")
    with pytest.raises(RuntimeError, match="1 to 2048 channels"):
        ops.qk_norm_rope(torch.randn(1, 1, 1, 4096), backend="triton")
