"""adaln, gated_residual, gated_adaln against torch's own norms, and their errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dit_kernels import ops
from dit_kernels.ops.adaln import tokens

B, N, C = 2, 12, 48


def randn(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype)


def test_layer_norm_and_modulation():
    x, shift, scale = randn(B, N, C), randn(B, C), randn(B, C)
    weight, bias = randn(C), randn(C)
    normed = F.layer_norm(x, (C,), weight, bias, 1e-5)
    expected = normed * (1 + scale[:, None]) + shift[:, None]
    got = ops.adaln(x, shift, scale, weight=weight, bias=bias, eps=1e-5)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_rms_norm_by_hand():
    x, scale, weight = randn(B, N, C), randn(B, C), randn(C)
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    got = ops.adaln(x, None, scale, norm="rms", weight=weight)
    torch.testing.assert_close(got, normed * (1 + scale[:, None]), rtol=1e-12, atol=1e-12)


def test_no_modulation_is_the_norm():
    x = randn(B, N, C)
    torch.testing.assert_close(
        ops.adaln(x), F.layer_norm(x, (C,), eps=1e-6), rtol=1e-12, atol=1e-12
    )


def test_the_four_index_forms_agree():
    """The same rows given a frame, a token, and by index."""
    groups = 3
    x, frame = randn(B, N, C), randn(B, groups, C)
    token = frame.repeat_interleave(N // groups, dim=1)
    rows = frame.flatten(0, 1)
    index = torch.arange(B * groups, dtype=torch.int32).repeat_interleave(N // groups).view(B, N)
    expected = ops.adaln(x, frame, frame)
    assert torch.equal(ops.adaln(x, token, token), expected)
    assert torch.equal(ops.adaln(x, rows, rows, row_index=index), expected)
    assert torch.equal(ops.adaln(x, rows, rows, row_index=index.flatten()), expected)
    packed = ops.adaln(x.flatten(0, 1), rows, rows, row_index=index.flatten())
    assert torch.equal(packed, expected.flatten(0, 1))
    sample = frame[:, :1]
    assert torch.equal(ops.adaln(x, sample[:, 0], sample[:, 0]), ops.adaln(x, sample, sample))


def test_gradients_come_in_the_modulations_own_shape():
    x, index = randn(B, N, C), torch.randint(5, (B, N), dtype=torch.int32)
    for shape, options in (
        ((B, C), {}), ((B, 4, C), {}), ((B, N, C), {}), ((5, C), {"row_index": index})
    ):  # fmt: skip
        shift, scale = randn(*shape).requires_grad_(), randn(*shape).requires_grad_()
        ops.adaln(x, shift, scale, **options).sum().backward()
        assert shift.grad.shape == scale.grad.shape == shape
    # every token adds one to its own row
    expected = torch.bincount(index.flatten(), minlength=5).double()
    torch.testing.assert_close(shift.grad[:, 0], expected)


def test_a_backward_by_row_index_has_programs_for_the_rows_of_the_longest_modulation():
    x, gate, shift, index = randn(B, N, C), randn(3, C), randn(5, C), torch.zeros(B, N).int()
    layout, _ = tokens.arrange((x,), (gate, shift), index)
    cut = tokens.cut_backward(layout, (gate, None, shift), index, resident=4)
    order, row, *_, first = tokens.segments(index, cut.rows, cut.chunk)
    assert (cut.rows, len(first), len(row), len(order)) == (5, 6, cut.programs, B * N)


def test_tables_are_added_to_every_row():
    x, shift, scale = randn(B, N, C), randn(B, 3, C), randn(B, 3, C)
    shift_table, scale_table = randn(C), randn(C)
    expected = ops.adaln(x, shift + shift_table, scale + scale_table)
    got = ops.adaln(x, shift, scale, shift_table=shift_table, scale_table=scale_table)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    alone = ops.adaln(x, shift_table=shift_table, scale_table=scale_table)
    rows = (shift_table.expand(B, C), scale_table.expand(B, C))
    torch.testing.assert_close(alone, ops.adaln(x, *rows), rtol=1e-12, atol=1e-12)


def test_a_table_alone_beside_indexed_rows():
    """Every token reads the table, whichever row its index names for the others."""
    x, shift, table = randn(B, N, C), randn(3, C), randn(C).requires_grad_()
    index = torch.arange(B * N, dtype=torch.int32).view(B, N) % 3
    got = ops.adaln(x, shift, scale_table=table, row_index=index)
    assert torch.equal(got, ops.adaln(x, shift, table.expand(3, C), row_index=index))
    alone = ops.adaln(x, scale_table=table, row_index=index)
    assert torch.equal(alone, ops.adaln(x, scale_table=table))
    (grad,) = torch.autograd.grad(got.sum(), table)
    torch.testing.assert_close(grad, F.layer_norm(x, (C,), eps=1e-6).sum((0, 1)))


def test_second_output_shares_the_norm():
    x, rows = randn(B, N, C), [randn(B, C) for _ in range(4)]
    first, second = ops.adaln(x, rows[0], rows[1], shift2=rows[2], scale2=rows[3])
    assert torch.equal(first, ops.adaln(x, rows[0], rows[1]))
    assert torch.equal(second, ops.adaln(x, rows[2], rows[3]))


def test_gated_residual():
    residual, branch, gate, table = randn(B, N, C), randn(B, N, C), randn(B, C), randn(C)
    weight = randn(C)
    normed = F.rms_norm(branch, (C,), weight, 1e-5)
    expected = residual + torch.tanh(gate + table)[:, None] * normed
    got = ops.gated_residual(
        residual, branch, gate, gate_table=table, gate_act="tanh", branch_norm="rms",
        branch_weight=weight, eps=1e-5,
    )  # fmt: skip
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(ops.gated_residual(residual, branch), residual + branch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rounding", ["once", "eager"])
def test_gated_adaln_is_the_two_ops_in_a_row(dtype, rounding):
    residual, branch = randn(B, N, C, dtype=dtype), randn(B, N, C, dtype=dtype)
    gate, shift, scale = randn(B, 3 * C, dtype=dtype).chunk(3, dim=-1)
    out, y = ops.gated_adaln(residual, branch, gate, shift, scale, rounding=rounding)
    expected = ops.gated_residual(residual, branch, gate, rounding=rounding)
    assert torch.equal(out, expected)
    assert torch.equal(y, ops.adaln(expected, shift, scale, rounding=rounding))


def test_eager_rounding_is_the_eager_formula_bit_for_bit():
    dtype = torch.bfloat16
    x, branch = randn(B, N, C, dtype=dtype), randn(B, N, C, dtype=dtype)
    gate, shift, scale = (m[:, None] for m in randn(B, 3 * C, dtype=dtype).chunk(3, dim=-1))
    expected = F.layer_norm(x, (C,), eps=1e-6) * (1 + scale) + shift
    assert torch.equal(ops.adaln(x, shift, scale, rounding="eager"), expected)
    once = ops.adaln(x, shift, scale, rounding="once")
    assert not torch.equal(once, expected)
    expected = x + gate.tanh() * branch
    assert torch.equal(
        ops.gated_residual(x, branch, gate, gate_act="tanh", rounding="eager"), expected
    )


def test_once_rounds_the_exact_result():
    """Wan: bf16 tokens, float32 modulation; float32 inside and one rounding."""
    x, shift, scale = randn(B, N, C, dtype=torch.bfloat16), randn(B, C).float(), randn(B, C).float()
    normed = F.layer_norm(x.float(), (C,), eps=1e-6)
    expected = (normed * (1 + scale[:, None]) + shift[:, None]).to(torch.bfloat16)
    got = ops.adaln(x, shift, scale)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, expected)


def test_output_dtype_is_the_residuals():
    residual, branch = randn(B, N, C, dtype=torch.float32), randn(B, N, C, dtype=torch.bfloat16)
    out, y = ops.gated_adaln(residual, branch, randn(B, C, dtype=torch.bfloat16))
    assert out.dtype == y.dtype == torch.float32


def test_any_number_of_token_dimensions():
    x, shift = randn(B, 3, 4, C), randn(B, 3, C)
    expected = ops.adaln(x.flatten(1, 2), shift).view(x.shape)
    assert torch.equal(ops.adaln(x, shift), expected)
    vector = randn(B, C)
    assert torch.equal(ops.adaln(vector, randn(B, C) * 0), ops.adaln(vector[:, None])[:, 0])


X = torch.randn(2, 12, 64)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        (
            {"scale": torch.randn(2, 7, 64)}, ValueError,
            "adaln: scale must be [B, C], [B, G, C] with G | N, or [B, N, C]; got [2, 7, 64] for x [2, 12, 64]",
        ),
        ({"shift": torch.randn(3, 64)}, ValueError, "adaln: shift must be [B, C]"),
        ({"shift": torch.randn(2, 32)}, ValueError, "got [2, 32] for x [2, 12, 64]"),
        ({"weight": torch.randn(32)}, ValueError, "adaln: weight must be [C] = [64]; got [32]"),
        ({"norm": "group"}, ValueError, "adaln: norm must be one of 'layer', 'rms'; got 'group'"),
        ({"eps": -1e-6}, ValueError, "adaln: eps must be a finite number of at least 0; got -1e-06"),
        ({"eps": float("nan")}, ValueError, "adaln: eps must be a finite number of at least 0; got nan"),
        ({"eps": "1e-6"}, TypeError, "adaln: eps must be a number; got str"),
        ({"rounding": "twice"}, ValueError, "adaln: rounding must be one of 'once', 'eager'"),
        ({"backend": "cudnn"}, ValueError, "adaln: backend must be one of"),
        ({"shift": torch.ones(2, 64, dtype=torch.int64)}, TypeError, "adaln: shift must be float32"),
        (
            {"shift": torch.randn(3, 64), "row_index": torch.zeros(2, 12, dtype=torch.int64)}, TypeError,
            "adaln: row_index must be int32; got torch.int64",
        ),
        (
            {"shift": torch.randn(3, 64), "row_index": torch.zeros(2, 11, dtype=torch.int32)}, ValueError,
            "adaln: row_index must be [B, N] or [N_total]; got [2, 11] for x [2, 12, 64]",
        ),
        (
            {"shift": torch.randn(3, 64), "row_index": torch.zeros(12, 2, dtype=torch.int32)}, ValueError,
            "adaln: row_index must be [B, N] or [N_total]; got [12, 2] for x [2, 12, 64]",
        ),
        (
            {"shift": torch.randn(3, 64), "row_index": [0] * 24}, TypeError,
            "adaln: row_index must be an int32 tensor; got list",
        ),
        (
            {"shift": torch.randn(2, 3, 64), "row_index": torch.zeros(2, 12, dtype=torch.int32)},
            ValueError, "adaln: with row_index shift must be [R, C]",
        ),
        ({"shift": torch.randn(2, 64, device="meta")}, ValueError, "adaln: shift must be on cpu; got meta"),
    ],
)  # fmt: skip
def test_errors_say_what_was_expected(kwargs, error, message):
    with pytest.raises(error) as caught:
        ops.adaln(X, **kwargs)
    assert message in str(caught.value)


def test_gated_errors():
    with pytest.raises(ValueError, match="residual and branch must have one shape"):
        ops.gated_residual(X, X[:1])
    with pytest.raises(ValueError, match="branch_weight needs branch_norm"):
        ops.gated_residual(X, X, branch_weight=torch.ones(64))
    with pytest.raises(ValueError, match="gate_act must be one of"):
        ops.gated_adaln(X, X, gate_act="sigmoid")
    with pytest.raises(ValueError, match="gated_residual: eps must be a finite number"):
        ops.gated_residual(X, X, branch_norm="rms", eps=-1.0)
    with pytest.raises(TypeError, match="adaln: x must be a tensor; got NoneType"):
        ops.adaln(None)
    with pytest.raises(TypeError, match="gated_adaln: branch must be a tensor; got NoneType"):
        ops.gated_adaln(X, None)
    with pytest.raises(TypeError, match="residual must be a tensor"):
        ops.gated_residual(1.0, X)


def test_values_on_the_device_are_checked_under_debug_only(monkeypatch):
    index = torch.full((2, 12), 3, dtype=torch.int32)
    monkeypatch.setenv("DIT_KERNELS_DEBUG", "1")
    with pytest.raises(ValueError, match=r"row_index for shift must lie in \[0, 2\]"):
        ops.adaln(X, torch.randn(3, 64), row_index=index)
