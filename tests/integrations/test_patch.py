"""Every family's small random model: patched against untouched, by the accuracy rule."""

from __future__ import annotations

import copy
import warnings
from collections import Counter

import pytest
import torch
from small_models import SMALL, build, inputs, output

import dit_kernels
from dit_kernels import testing
from dit_kernels.integrations import checking

DTYPES = (torch.float32, torch.bfloat16)


def double(value: object) -> object:
    """The same inputs in float64, for the oracle."""
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.double()
    if isinstance(value, (tuple, list)):
        return type(value)(double(v) for v in value)
    return {k: double(v) for k, v in value.items()} if isinstance(value, dict) else value


@pytest.fixture(autouse=True)
def _nothing_is_put_back() -> object:
    """A check of a first call that finds a difference warns."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="dit_kernels.patch")
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", SMALL)
def test_forward_and_gradients_by_the_accuracy_rule(family: str, dtype: torch.dtype) -> None:
    small = SMALL[family]
    model, given = build(small, dtype), inputs(small, dtype)
    oracle_model = copy.deepcopy(model).double()
    patched = copy.deepcopy(model)
    report = dit_kernels.patch(patched)
    assert Counter(op for _, op in report.replaced) == small.rows

    def run(one: torch.nn.Module, values: dict) -> dict[str, torch.Tensor]:
        out = output(one, values)
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
        out.backward(cotangent.to(out.dtype))
        grads = {name: p.grad for name, p in one.named_parameters() if p.grad is not None}
        return {"output": out.detach(), **grads}

    with checking.InFloat64():
        oracle = run(oracle_model, double(given))
    eager, actual = run(model, given), run(patched, given)
    assert actual.keys() == eager.keys() == oracle.keys()
    testing.assert_accurate(actual["output"], oracle["output"], eager["output"])

    def together(of: dict[str, torch.Tensor]) -> torch.Tensor:
        """All gradients, each in parts of its largest value."""
        grads = [
            of[n].double() / oracle[n].abs().max() for n in oracle if oracle[n].abs().max() > 0
        ]
        return torch.cat([g.flatten() for g in grads])

    sides = (together(actual), together(oracle), together(eager))
    testing.assert_accurate(*sides, "gradients", dtype=dtype)
    assert not [reason for _, reason in report.left if "put back" in reason]


@pytest.mark.parametrize("family", SMALL)
def test_as_many_op_calls_as_the_report_says(family: str, count_ops: Counter) -> None:
    small = SMALL[family]
    model, given = build(small), inputs(small)
    dit_kernels.patch(model, check=False)
    with torch.no_grad():
        output(model, given)
    assert count_ops == small.rows
    count_ops.clear()
    dit_kernels.unpatch(model)
    with torch.no_grad():
        output(model, given)
    assert not count_ops


@pytest.mark.parametrize("family", SMALL)
def test_unpatch_gives_the_same_bits(family: str) -> None:
    small = SMALL[family]
    model, given = build(small, torch.bfloat16), inputs(small, torch.bfloat16)
    names = list(model.state_dict())
    with torch.no_grad():
        before = output(model, given)
        dit_kernels.patch(model)
        output(model, given)
        assert list(model.state_dict()) == names
        dit_kernels.unpatch(model)
        assert torch.equal(output(model, given), before)
    assert not [m for m in model.modules() if "forward" in m.__dict__]


def test_attention_may_be_asked_for_and_is_left() -> None:
    model, given = build(SMALL["wan"]), inputs(SMALL["wan"])
    with torch.no_grad():
        before = output(model, given)
        report = dit_kernels.patch(model, ops=("attention3d",))
        assert torch.equal(output(model, given), before)
    assert not report.replaced
    processors = [n for n, m in model.named_modules() if getattr(m, "processor", None) is not None]
    reason = "attention3d: attention stays with the backend that the model uses"
    assert [site for site, why in report.left if why == reason] == processors
