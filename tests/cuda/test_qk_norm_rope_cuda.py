"""The CUDA kernels of qk_norm_rope in the emulator, against the reference."""

from __future__ import annotations

import pytest
import torch

from dit_kernels import ops, testing
from dit_kernels.ops import cuda_extension
from dit_kernels.ops.qk_norm_rope import cuda

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CASES = [case.name for case in testing.cases(torch.float32) if case.op == "qk_norm_rope"]
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def check(**kwargs):
    case = testing.Case("qk_norm_rope", "", "qk_norm_rope", kwargs)
    for measured in testing.measure(case, backend="cuda"):
        assert measured.ok, measured


def angles(*shape):
    angle = 6.0 * torch.rand(shape)
    return {"cos": angle.cos(), "sin": angle.sin()}


def qk(*shape, k_heads=None):
    q = torch.randn(shape)
    return {"q": q, "k": torch.randn(*shape[:2], k_heads or shape[2], shape[3])}


@pytest.fixture
def lanes(monkeypatch):
    """Threads of a row of each launch: 0 is the general kernel."""
    seen = []
    real = cuda._plan

    def watched(*args):
        monkeypatch.setattr(cuda, "_lanes", lambda *given: found(given))
        seen.append(0)
        return real(*args)

    def found(given):
        seen[-1] = real_lanes(*given)[0]
        return real_lanes(*given)

    real_lanes = cuda._lanes
    monkeypatch.setattr(cuda, "_plan", watched)
    monkeypatch.setattr(cuda, "_plans", {})
    return seen


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
def test_the_models_heads_have_vector_kernels(lanes, dim, options, dtype):
    options = dict(options)
    dtype, rotated = DTYPES[dtype], options.pop("rotated", dim // 2)
    packed = torch.randn(2, 7, 3, 3, dim).to(dtype)
    weights = {name: torch.randn(dim).to(dtype) for name in ("q_weight", "k_weight", "k_bias")}
    q, k, _ = packed.unbind(2)
    check(q=q, k=k, **weights, **options, rope_start=1, rope_len=5, **angles(5, rotated))
    assert len(lanes) == 2
    assert all(lanes)


@pytest.mark.parametrize(("heads", "dim"), [(12, 128), (40, 128), (32, 64)])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_models_hidden_rows_have_vector_kernels(lanes, heads, dim, dtype):
    dtype = DTYPES[dtype]
    q, k, _ = torch.randn(1, 3, 3, heads, dim).to(dtype).unbind(2)
    weights = {name: torch.randn(heads * dim).to(dtype) for name in ("q_weight", "k_weight")}
    check(q=q, k=k, **weights, over="hidden", **angles(3, dim // 2))
    check(q=q, k=k[:, :, :3], over="hidden", act="relu", **angles(1, 3, 1, dim // 2))
    assert len(lanes) == 4
    assert all(lanes)


def test_heads_for_the_general_kernels(lanes):
    check(**qk(1, 3, 2, 18), **angles(3, 9))
    check(q=torch.randn(1, 3, 2, 72).bfloat16(), layout="half", **angles(3, 36))
    check(q=torch.randn(1, 3, 2, 32)[..., ::2], **angles(3, 8))
    check(q=torch.randn(97)[1:].view(1, 3, 2, 16), **angles(3, 8))
    check(q=torch.randn(1, 3, 2, 16), k=torch.randn(1, 3, 2, 16).half(), **angles(3, 8))
    check(q=torch.randn(1, 2, 1, 1024).bfloat16(), **angles(2, 512))
    assert not any(lanes)


@every_dtype
@pytest.mark.parametrize("name", CASES)
def test_examples(name, dtype):
    (case,) = [c for c in testing.cases(dtype) if c.op == "qk_norm_rope" and c.name == name]
    for measured in testing.measure(case, backend="cuda"):
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
    monkeypatch.setattr(cuda_extension, "multiprocessors", lambda tensor: 1)
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
    got = testing.run("qk_norm_rope", kwargs, backward=False, backend="cuda").all()
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


def test_gradients_of_other_strides_and_of_one_output():
    x, weights = qk(2, 5, 2, 16), {name: torch.randn(16) for name in ("q_weight", "k_weight")}
    dy = torch.randn(2, 2, 16, 5).permute(0, 3, 1, 2)

    def grads(i, backend, dtype):
        leaves = {n: t.to(dtype, copy=True).requires_grad_() for n, t in (x | weights).items()}
        out = ops.qk_norm_rope(**leaves, backend=backend)[i]
        return torch.autograd.grad(
            out, list(leaves.values()), dy.to(dtype), allow_unused=True, materialize_grads=True
        )

    for i in (0, 1):
        runs = (("cuda", torch.float32), ("reference", torch.float64), ("reference", torch.float32))
        for got, oracle, eager in zip(*(grads(i, *run) for run in runs), strict=True):
            testing.assert_accurate(got, oracle, eager)


@pytest.mark.parametrize("shape", [(0, 5, 2, 16), (2, 0, 2, 16)])
def test_empty(shape):
    x = {name: value.requires_grad_() for name, value in qk(*shape).items()}
    weight = torch.randn(16, requires_grad=True)
    table = {name: value.requires_grad_() for name, value in angles(shape[1], 8).items()}
    q, k = ops.qk_norm_rope(**x, q_weight=weight, **table, backend="cuda")
    grads = torch.autograd.grad((q.sum() + k.sum()), [*x.values(), weight, *table.values()])
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)


def test_keys_of_no_tokens():
    q, k = ops.qk_norm_rope(torch.randn(1, 3, 2, 8), torch.randn(1, 0, 2, 8), backend="cuda")
    assert q.shape == (1, 3, 2, 8)
    assert k.shape == (1, 0, 2, 8)


@pytest.mark.parametrize("dim", [16, 15])
def test_order_of_threads_and_blocks_changes_nothing(dim):
    kwargs = dict(**qk(2, 40, 2, dim), q_weight=torch.randn(dim), **angles(40, 7))
    runs = []
    for seed in range(3):
        cuda_extension.kernels().set_seed(seed)
        runs.append(testing.run("qk_norm_rope", kwargs, backend="cuda").all())
    assert all(torch.equal(run[name], runs[0][name]) for run in runs for name in run)


@pytest.mark.parametrize(
    ("lanes", "threads", "channels", "message"),
    [
        (4, 48, 16, "a head of 16 channels in 1 sections does not fit vectors of 4 in 4 of 48 threads"),
        (4, 32, 64, "does not fit"), (3, 32, 16, "does not fit"), (2, 64, 20, "does not fit"), (2, 64, 18, "from multiples of 16 bytes"),
    ],
)  # fmt: skip
def test_launchers_refuse_what_their_kernels_cannot_read(lanes, threads, channels, message):
    x = torch.zeros(1, 2, 1, channels)
    side = [1, 2, 1, 1, 2, *x.stride()[:3], 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    plan = cuda_extension.kernels().QkNormRope(
        [0, 0, 0, 0, 0], 1e-6, [channels, 1, 0, lanes, threads], [0] * 7, [side, [0] * 18]
    )
    with pytest.raises(RuntimeError, match=message):
        cuda_extension.kernels().qk_norm_rope_fwd(
            *cuda_extension.where(x), plan, x, *[None] * 7, torch.empty_like(x), *[None] * 5
        )


def test_unsupported():
    with pytest.raises(RuntimeError, match="float64"):
        ops.qk_norm_rope(torch.randn(1, 2, 2, 8).double(), backend="cuda")


@pytest.mark.parametrize("dim", [16, 15])
def test_offsets_beyond_two_to_the_31(dim):
    far = torch.empty(2**31 + 4096, dtype=torch.bfloat16).as_strided(
        (2, 3, 2, dim), (2**31, 32, 16, 1)
    )
    far.copy_(torch.randn(2, 3, 2, dim))
    near = far.contiguous()
    table = angles(3, 7)
    (got, _), (expected, _) = (ops.qk_norm_rope(x, **table, backend="cuda") for x in (far, near))
    assert torch.equal(got, expected)
