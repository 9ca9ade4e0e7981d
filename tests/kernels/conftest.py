"""The kernels against the reference: every form, dtype, odd size and stride, the same for each backend.

    TRITON_INTERPRET=1 pytest tests/kernels       Triton's, interpreted on the CPU
    DIT_KERNELS_EMULATE=1 pytest tests/kernels    CUDA's, in the emulator
    pytest tests/kernels                          on a GPU, both

The variables have to be there before anything imports the ops. What belongs to one backend alone (which of
its kernels takes a call, its tiles, what its launchers refuse) is in tests/triton and tests/cuda.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_kernels import backends, ops, testing
from dit_kernels.ops import cuda_extension, triton_launch
from tests.gpu.isolation import harms_no_other_test

ON_CPU = {"triton": "TRITON_INTERPRET", "cuda": "DIT_KERNELS_EMULATE"}
BACKENDS = [backend for backend, variable in ON_CPU.items() if os.environ.get(variable) == "1"]
DEVICE = "cpu"
if not BACKENDS and torch.cuda.is_available():
    BACKENDS, DEVICE = list(ON_CPU), "cuda"
if not BACKENDS:
    collect_ignore_glob = ["test_*.py"]


def pytest_report_header() -> str:
    if not BACKENDS:
        return f"kernels: skipped without a GPU: set {' or '.join(ON_CPU.values())} to 1"
    return f"kernels: {' and '.join(BACKENDS)} on the {DEVICE}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A module of one op names it in OP: those backends that serve it are tested."""
    if "backend" in metafunc.fixturenames:
        op = getattr(metafunc.module, "OP", None)
        serve = backends.TABLE[op] if op else BACKENDS
        metafunc.parametrize("backend", [b for b in BACKENDS if b in serve])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where a backend has no kernel for the op, there is nothing to test."""
    ops = {
        key: case.op for case in testing.cases(torch.float32) for key in (case.id, case.function)
    }

    def to_test(item: pytest.Item) -> bool:
        if not (isinstance(item, pytest.Function) and "/kernels/" in item.nodeid):
            return True
        params = item.callspec.params
        named = [params.get(key) for key in ("name", "function", "op")]
        named += [name.partition("-")[0] for name in named if isinstance(name, str)]
        serve = [backends.TABLE[ops[name]] for name in named if name in ops]
        # what is no string stands for an empty list of backends
        return isinstance(params["backend"], str) and all(params["backend"] in s for s in serve)

    kept = [item for item in items if to_test(item)]
    if len(kept) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


@pytest.fixture(autouse=True)
def machine() -> Iterator[None]:
    """Tensors are made where the kernels run; no plan is left that another test's patches were in."""
    triton_launch.Plans.clear()
    isolated = harms_no_other_test() if DEVICE == "cuda" else contextlib.nullcontext()
    with isolated, torch.device(DEVICE):
        yield


@pytest.fixture(autouse=True, scope="session")
def loaded() -> None:
    """None of the backends that are asked for may be missing."""
    missing = {b: reason for b in BACKENDS if (reason := backends.unavailable(b)) is not None}
    assert not missing, missing


@functools.cache
def examples(dtype: torch.dtype) -> dict[tuple[str, str], testing.Case]:
    return {(case.op, case.name): case for case in testing.cases(dtype, DEVICE)}


@pytest.fixture
def example(request: pytest.FixtureRequest) -> Callable[[str, torch.dtype], testing.Case]:
    """The call of that name among the op's example inputs."""
    return lambda name, dtype: examples(dtype)[request.module.OP, name]


@pytest.fixture
def check(backend: str) -> Callable[..., None]:
    """Outputs and every gradient of a call, by the accuracy rule."""

    def check(function: str, /, **kwargs: Any) -> None:
        case = testing.Case("", "", function, kwargs)
        wrong = [a for a in testing.measure(case, backend=backend) if not a.ok]
        assert not wrong, wrong

    return check


@pytest.fixture
def agree(backend: str) -> Callable[..., None]:
    """What found(backend, dtype) gives, by the accuracy rule: for gradients taken in a way of their own."""

    def agree(found: Callable[[str | None, torch.dtype], Sequence[Tensor]]) -> None:
        actual = found(backend, torch.float32)
        oracle = found("reference", torch.float64)
        with testing.plain_torch():
            eager = found(None, torch.float32)
        for got, exact, rough in zip(actual, oracle, eager, strict=True):
            testing.assert_accurate(got, exact, rough)

    return agree


@pytest.fixture
def same_bits(backend: str) -> Iterator[Callable[..., None]]:
    """Three runs of a call: in the emulator each with threads and blocks in another order."""
    emulator = cuda_extension.kernels() if backend == "cuda" and DEVICE == "cpu" else None

    def same_bits(function: str, /, **kwargs: Any) -> None:
        runs = []
        for seed in range(3):
            if emulator:
                emulator.set_seed(seed)
            runs.append(testing.run(function, kwargs, backend=backend).all())
        assert all(torch.equal(run[name], runs[0][name]) for run in runs for name in run)

    yield same_bits
    if emulator:
        emulator.set_seed(0)


@pytest.fixture
def one_multiprocessor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few programs or blocks are launched, so that each walks over several tiles."""
    for module in (triton_launch, cuda_extension):
        monkeypatch.setattr(module, "multiprocessors", lambda tensor: 1)


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    """far(values, *strides): the values in memory whose samples lie 2^31 elements apart; else it is as theirs."""
    if triton_launch.INTERPRETED:
        from triton.runtime import interpreter  # needs numpy

        # it would copy each whole storage back
        monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *args: None)

    def far(values: Tensor, *strides: int) -> Tensor:
        storage = torch.empty(2**31 + 4096, dtype=values.dtype)
        strides = strides or values.stride()[1:]
        return storage.as_strided(values.shape, (2**31, *strides)).copy_(values)

    return far


@pytest.fixture
def agree_from_afar(
    backend: str, far: Callable[..., Tensor], agree: Callable[..., None]
) -> Callable[..., None]:
    """Gradients of a call's last output where one argument and the cotangent have their samples so far apart."""

    def agree_from_afar(function: str, name: str, /, **kwargs: Any) -> None:
        with testing.plain_torch():
            like = list(testing.run(function, kwargs, backward=False).outputs.values())[-1]
        dy = torch.randn(like.shape).to(like.dtype)
        distant, far_dy = {**kwargs, name: far(kwargs[name])}, far(dy)

        def found(served: str | None, dtype: torch.dtype) -> Sequence[Tensor]:
            values, cotangent = (distant, far_dy) if served == backend else (kwargs, dy)
            if dtype == torch.float64:
                values, cotangent = testing.converted(values, dtype), dy.double()
            leaves = {
                n: v.detach().requires_grad_() for n, v in values.items() if isinstance(v, Tensor)
            }
            made = getattr(ops, function)(**{**values, **leaves}, backend=served)
            last = made if isinstance(made, Tensor) else [o for o in made if o is not None][-1]
            return torch.autograd.grad(last, list(leaves.values()), cotangent)

        agree(found)

    return agree_from_afar
