"""`pytest benchmarks` needs pytest-benchmark, which the development environment has."""

import importlib.util

import pytest

if importlib.util.find_spec("pytest_benchmark") is None:
    raise pytest.UsageError(
        "pytest benchmarks needs pytest-benchmark, which is not installed: pip install pytest-benchmark;"
        " `python -m benchmarks.bench` needs only torch"
    )
