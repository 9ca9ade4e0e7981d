"""The accuracy rule itself: it must fail where it should."""

from __future__ import annotations

import pytest
import torch

from dit_kernels import check, ops, testing

ORACLE = torch.tensor([1.0, -2.0, 4.0], dtype=torch.float64)


def test_the_bound_is_twice_eagers_error_and_one_rounding():
    eager = (ORACLE + torch.tensor([0.0, 0.1, 0.0])).float()
    bound = 2 * (0.1 + 4.0 * torch.finfo(torch.float32).eps)
    assert testing.allowed(eager, ORACLE) == pytest.approx(bound)
    testing.assert_accurate(ORACLE + 0.19, ORACLE, eager)
    with pytest.raises(
        AssertionError, match=r"dx: error 2.100e-01 is above 2.000e-01, the largest at \[0\]"
    ):
        testing.assert_accurate(ORACLE + 0.21, ORACLE, eager, "dx")


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_nan_and_infinity_never_pass(wrong):
    actual = ORACLE.clone()
    actual[1] = wrong
    with pytest.raises(AssertionError):
        testing.assert_accurate(actual, ORACLE, ORACLE.float())


def test_an_infinite_oracle_wants_the_same_infinity():
    oracle = torch.tensor([1.0, -torch.inf], dtype=torch.float64)
    testing.assert_accurate(oracle.float(), oracle, oracle.float())
    with pytest.raises(AssertionError):
        testing.assert_accurate(torch.zeros(2), oracle, oracle.float())


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_an_eager_that_overflows_excuses_nothing(wrong):
    eager, actual = ORACLE.half(), ORACLE.half()
    eager[0], actual[1] = torch.inf, wrong
    assert testing.allowed(eager, ORACLE) < 0.01
    with pytest.raises(AssertionError, match=r"error inf is above .*, the largest at \[1\]"):
        testing.assert_accurate(actual, ORACLE, eager)


def test_an_oracle_of_nan_passes_nothing():
    oracle = torch.tensor([1.0, torch.nan], dtype=torch.float64)
    with pytest.raises(AssertionError):
        testing.assert_accurate(oracle.float(), oracle, oracle.float())


def test_an_oracle_past_the_dtypes_range_wants_infinity():
    oracle = torch.tensor([1.0, 1e6], dtype=torch.float64)
    testing.assert_accurate(oracle.half(), oracle, oracle.half())
    with pytest.raises(AssertionError):
        testing.assert_accurate(torch.tensor([1.0, torch.nan]).half(), oracle, oracle.half())


def test_another_shape_is_an_error():
    with pytest.raises(ValueError, match=r"must have the oracle's shape \[3\]; got \[1\]"):
        testing.error(torch.zeros(1), ORACLE)


def test_plain_torch_calls_no_op():
    x = torch.randn(2, 3, 8, requires_grad=True)
    with testing.plain_torch():
        y = ops.adaln(x)
    assert y.grad_fn.name() == "NativeLayerNormBackward0"
    assert ops.adaln(x).grad_fn.name() != "NativeLayerNormBackward0"


def test_check_measures_every_op_and_reports_a_broken_one(monkeypatch):
    rows = list(check.run("cpu", dtypes=(torch.bfloat16,)))
    assert {row.op for row in rows} == set(testing.backends.TABLE)
    assert {row.direction for row in rows} == {"forward", "backward"}
    assert all(row.ok for row in rows)
    from dit_kernels.ops.feed_forward import reference

    right = reference.forward

    def wrong(x, bias, act, stats):
        (y,) = right(x, bias, act, stats)
        return [y * 1.05 if x.dtype == torch.bfloat16 else y]

    monkeypatch.setattr(reference, "forward", wrong)
    broken = [row for row in check.run("cpu", dtypes=(torch.bfloat16,)) if not row.ok]
    assert {row.op for row in broken} == {"feed_forward"}
