"""Every family's small random model: patched against untouched, by the accuracy rule."""

from __future__ import annotations

import warnings
from collections import Counter

import pytest
import torch
from small_models import SMALL, assert_patched_is_accurate, build, inputs, output

import dit_kernels

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def _nothing_is_put_back() -> object:
    """A check of a first call that finds a difference warns."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="dit_kernels.patch")
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", SMALL)
def test_forward_and_gradients_by_the_accuracy_rule(family: str, dtype: torch.dtype) -> None:
    assert_patched_is_accurate(SMALL[family], dtype)


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
