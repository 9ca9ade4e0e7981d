"""Shared fixtures of the tests of patched models."""

from __future__ import annotations

from collections import Counter

import pytest

from dit_kernels import ops

OPS = (
    "adaln",
    "gated_adaln",
    "gated_residual",
    "qk_norm_rope",
    "patch_embed",
    "gelu_bias",
    "swiglu",
)


@pytest.fixture
def count_ops(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """How often each public op is called."""
    calls: Counter = Counter()

    def counted(name: str) -> object:
        function = getattr(ops, name)

        def call(*args: object, **kwargs: object) -> object:
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    for name in OPS:
        monkeypatch.setattr(ops, name, counted(name))
    return calls
