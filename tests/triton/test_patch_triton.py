"""Patched models with the Triton kernels, in the interpreter, by the accuracy rule."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "integrations"))
from small_models import SMALL, build, inputs, output

import dit_kernels
from dit_kernels import testing
from dit_kernels.integrations import checking


@pytest.fixture(autouse=True)
def _triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIT_KERNELS_BACKEND", "triton")  # raises where it cannot serve a call


@pytest.mark.parametrize("family", ["wan", "flux"])
def test_forward_and_input_gradient(family: str) -> None:
    small = SMALL[family]
    model, given = build(small), inputs(small)
    patched = copy.deepcopy(model)
    dit_kernels.patch(patched, check=False)

    def run(one: torch.nn.Module, dtype: torch.dtype) -> list[torch.Tensor]:
        values = {
            k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
            for k, v in given.items()
        }
        x = values["hidden_states"].requires_grad_()
        out = output(one, values)
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
        (dx,) = torch.autograd.grad(out, x, cotangent.to(out.dtype))
        return [out.detach(), dx]

    actual, eager = run(patched, torch.float32), run(model, torch.float32)
    with checking.InFloat64():
        oracle = run(model.double(), torch.float64)
    for name, *sides in zip(("output", "dx"), actual, oracle, eager, strict=True):
        testing.assert_accurate(*sides, name)
