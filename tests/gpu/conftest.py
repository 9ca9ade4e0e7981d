"""Tests that need a GPU; they import nothing but torch, triton and this package.

Lack of a GPU is the only reason to skip one.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.gpu.isolation import harms_no_other_test


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "/gpu/" in item.nodeid:
            item.add_marker(
                pytest.mark.skip(reason="needs a GPU: run `make gpu` on a machine with one")
            )


@pytest.fixture(autouse=True)
def _isolated() -> Iterator[None]:
    with harms_no_other_test():
        yield
