"""Patched models with the Triton kernels, in the interpreter, by the accuracy rule."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "integrations"))
from small_models import SMALL, assert_patched_is_accurate


@pytest.mark.parametrize("family", SMALL)
def test_forward_and_gradients(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIT_KERNELS_BACKEND", "triton")  # raises where it cannot serve a call
    assert_patched_is_accurate(SMALL[family], torch.float32, check=False)
