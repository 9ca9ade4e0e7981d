"""The one accuracy rule of the project, and the runs that it compares.

    max |actual - oracle|  <=  2 * (max |eager - oracle| + eps(dtype) * max |oracle|)

oracle: the reference in float64 on the same values. eager: the formula as people write it in PyTorch, in
the inputs' own dtype. Tests, `dit-kernels check` and the benchmarks use this rule and no other tolerance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dit_kernels import backends, ops


@contextmanager
def plain_torch() -> Iterator[None]:
    """Inside, every op of this thread is its formula in plain torch, in the inputs' dtype."""
    with backends.as_requested(backends.PLAIN):
        yield


def error(actual: Tensor, oracle: Tensor) -> float:
    """max |actual - oracle|; infinite where one of them is NaN, or infinite without the other.

    An oracle past the largest number of actual's dtype is infinite in that dtype.
    """
    difference = _difference(actual, oracle)
    return float(difference.max()) if oracle.numel() else 0.0


def _difference(actual: Tensor, oracle: Tensor) -> Tensor:
    if actual.shape != oracle.shape:
        raise ValueError(
            f"error: actual must have the oracle's shape {list(oracle.shape)}; got {list(actual.shape)}"
        )
    actual, oracle = actual.detach(), oracle.detach()
    same_infinity = actual.isinf() & (actual == oracle.to(actual.dtype))
    difference = (actual.double() - oracle.double()).abs().nan_to_num(torch.inf, posinf=torch.inf)
    return torch.where(same_infinity, 0.0, difference)


def allowed(eager: Tensor, oracle: Tensor, dtype: torch.dtype | None = None) -> float:
    """The bound of the accuracy rule at `dtype`, by default eager's. It is finite.

    Where eager overflows it excuses nothing: its error counts where it is finite.
    """
    if not oracle.numel():
        return 0.0
    finite = oracle.detach().double().nan_to_num(posinf=0.0, neginf=0.0)
    floor = torch.finfo(dtype or eager.dtype).eps * float(finite.abs().max())
    difference = _difference(eager, oracle)
    return 2.0 * (float(difference.where(difference.isfinite(), 0.0).max()) + floor)


def assert_accurate(
    actual: Tensor,
    oracle: Tensor,
    eager: Tensor,
    name: str = "result",
    dtype: torch.dtype | None = None,
) -> None:
    """The accuracy rule.

    Raises:
        AssertionError: with the error, what is allowed and where the largest difference is.
    """
    worst, bound = error(actual, oracle), allowed(eager, oracle, dtype)
    if not worst <= bound:
        largest = _difference(actual, oracle).argmax()
        where = [int(i) for i in torch.unravel_index(largest, oracle.shape)]
        raise AssertionError(
            f"{name}: error {worst:.3e} is above {bound:.3e}, the largest at {where} of {list(oracle.shape)}"
        )


@dataclass(frozen=True)
class Case:
    """A call of a public op: what `example_inputs` of its reference made."""

    op: str
    name: str
    function: str
    kwargs: dict[str, Any]

    @property
    def id(self) -> str:
        return f"{self.function}-{self.name}"


@dataclass(frozen=True)
class Run:
    """Outputs and gradients of one call, by name."""

    outputs: dict[str, Tensor]
    grads: dict[str, Tensor] = field(default_factory=dict)

    def all(self) -> dict[str, Tensor]:
        return {**self.outputs, **{f"d{name}": grad for name, grad in self.grads.items()}}


def cases(dtype: torch.dtype, device: str = "cpu") -> Iterator[Case]:
    """The example inputs of every op."""
    for op in backends.TABLE:
        examples = backends.load(op, "reference").example_inputs(dtype, device)
        for name, (function, kwargs) in examples.items():
            yield Case(op, name, function, kwargs)


def converted(kwargs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The same values with every floating tensor in `dtype`."""
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in kwargs.items()
    }


def run(
    call: Callable[..., Any] | str, kwargs: dict[str, Any], *, backward: bool = True, **options: Any
) -> Run:
    """Call an op, by default also backward, with cotangents that depend on nothing but the shapes.

    A tensor argument enters as a leaf of its own strides; so the gradient is of what was passed.
    """
    function = getattr(ops, call) if isinstance(call, str) else call
    leaves = {
        name: value.detach().requires_grad_()
        if backward and isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in kwargs.items()
    }
    with torch.enable_grad() if backward else torch.no_grad():
        result = function(**leaves, **options)
    result = result if isinstance(result, tuple) else (result,)
    outputs = {f"out{i}": out for i, out in enumerate(result) if out is not None}
    if not backward:
        return Run(outputs)
    device = next(iter(outputs.values())).device  # large ones take seconds to draw on a CPU
    generator = torch.Generator(device).manual_seed(1)
    total: list[Tensor] = []
    cotangents: list[Tensor] = []
    for out in outputs.values():
        # drawn in bfloat16 so that every dtype is given the same values
        cotangent = torch.randn(out.shape, generator=generator, device=device).bfloat16()
        total.append(out)
        cotangents.append(cotangent.to(out.dtype))
    wanted = {n: v for n, v in leaves.items() if isinstance(v, Tensor) and v.requires_grad}
    grads = torch.autograd.grad(
        total, list(wanted.values()), cotangents, allow_unused=True, materialize_grads=True
    )
    return Run(
        {n: out.detach() for n, out in outputs.items()}, dict(zip(wanted, grads, strict=True))
    )


@dataclass(frozen=True)
class Accuracy:
    """One compared tensor."""

    tensor: str
    error: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed


def measure(case: Case, *, backend: str, backward: bool = True, **options: Any) -> list[Accuracy]:
    """Each output and gradient of a case against the rule."""
    oracle = run(
        case.function, converted(case.kwargs, torch.float64), backward=backward, backend="reference"
    ).all()
    with plain_torch():
        eager = run(case.function, case.kwargs, backward=backward).all()
    actual = run(case.function, case.kwargs, backward=backward, backend=backend, **options).all()
    return [
        Accuracy(name, error(actual[name], oracle[name]), allowed(eager[name], oracle[name]))
        for name in oracle
    ]
