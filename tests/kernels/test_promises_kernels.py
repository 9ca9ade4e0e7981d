"""What every op promises, kept by the kernels: tests/test_promises.py, where it holds in their dtypes."""

from __future__ import annotations

import pytest

from dit_kernels import backends
from tests.test_promises import (  # noqa: F401
    test_a_new_length_does_not_recompile,
    test_autocast_keeps_the_gradients_dtypes,
    test_deterministic,
    test_empty_batch,
    test_export,
    test_opcheck,
    test_outputs_are_written_everywhere,
    test_torch_compile_fullgraph_forward_and_backward,
)


@pytest.fixture(autouse=True)
def served(backend, monkeypatch):
    """Calls go to this backend, or to the reference where it has no kernel for the op; never elsewhere."""
    alone = {op: tuple({backend}.intersection(names)) for op, names in backends.TABLE.items()}
    monkeypatch.setattr(backends, "TABLE", alone)
    seen = set()
    select = backends.select

    def watched(op, name, args, **options):
        module = select(op, name, args, **options)
        seen.add((op, module.__name__.rpartition(".")[2]))
        return module

    monkeypatch.setattr(backends, "select", watched)
    yield
    assert seen
    for op, found in seen:
        assert found == (alone[op] or ("reference",))[0], seen
