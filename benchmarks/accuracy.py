"""The accuracy rule on what is about to be timed, at its own shape, forward and backward.

Where float64 can be had of all of it, everything is compared. Attention's N x N scores of a video fit no card:
there the cotangent is zero but for some query rows, so that the gradients of k and v, too, come from these rows
alone, and the oracle costs rows x N. What is too large otherwise is compared in its small form.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines import Baseline
from benchmarks.cases import Arguments, Case
from benchmarks.shapes import Shape
from dit_kernels import backends, ops, testing

# the most that the oracle takes on whole: scores of attention, else bytes that the op moves in bfloat16
SCORES = {"cuda": 1 << 30, "cpu": 1 << 24}
BYTES = {"cuda": 1 << 31, "cpu": 1 << 28}
ROWS = 64


def reach(case: Case, shape: Shape, device: str) -> str:
    """What is compared: "all", "rows" of attention, or the "small form" of the shape."""
    if case.op == "attention3d":
        scores = shape.batch * shape.heads * shape.tokens**2
        return "all" if scores <= SCORES[device] else "rows"
    moved = case.cost(shape, torch.bfloat16)["forward"][1]
    return "all" if moved <= BYTES[device] else "small form"


def compared(
    case: Case, arguments: Arguments, baseline: Baseline, call: Callable[..., Any]
) -> list[testing.Accuracy]:
    """Every output and, where there is a backward, every gradient, whole."""
    op = getattr(ops, case.function)
    # no gradient of the rotation's tables is timed, so none is compared
    tables = {name: arguments[name] for name in ("cos", "sin") if name in arguments}
    others = {name: value for name, value in arguments.items() if name not in tables}

    def outputs(
        call: Callable[..., Any], dtype: torch.dtype | None = None, **options: Any
    ) -> dict[str, Tensor]:
        given, fixed = (testing.converted(x, dtype) if dtype else x for x in (others, tables))
        run = functools.partial(call, **fixed, **options)
        return testing.run(run, given, backward=baseline.has_backward(case)).all()

    oracle = outputs(op, torch.float64, backend="reference")
    with testing.plain_torch():
        eager = outputs(op)
    got = outputs(call)
    return [_held(name, got[name], oracle[name], eager[name]) for name in oracle]


def compared_rows(
    arguments: Arguments, call: Callable[..., Any], *, backward: bool
) -> list[testing.Accuracy]:
    """Attention: some rows of the output and of dq, which is zero in the others, and all of dk and dv."""
    known = {"q", "k", "v", "grid", "window_size", "text_tokens", "cu_seqlens", "max_seqlen"}
    if unknown := set(arguments) - known:
        raise ValueError(f"rows of attention: no oracle for {', '.join(sorted(unknown))}")
    reference = backends.load("attention3d", "reference")
    q, k, v = (arguments[name].detach() for name in "qkv")
    rows = some_rows(q.shape[1]).to(q.device)
    seen = reference._visibility(
        q, k, None, None, arguments.get("cu_seqlens"), arguments.get("grid") or (),
        arguments.get("window_size") or (), (1, 1, 1), arguments.get("text_tokens", 0), False, False,
    )(rows)  # fmt: skip
    generator = torch.Generator(q.device).manual_seed(1)
    shape = (q.shape[0], len(rows), *q.shape[2:])
    cotangent = torch.randn(shape, generator=generator, device=q.device).to(q.dtype)

    def formula(dtype: torch.dtype) -> dict[str, Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_(backward) for x in (q[:, rows], k, v)]
        scores = reference._scores(*leaves[:2], seen, q.shape[3] ** -0.5, dtype)
        out = reference._out(scores, leaves[2], dtype)
        if not backward:
            return {"out0": out}
        dq, dk, dv = torch.autograd.grad(out, leaves, cotangent.to(dtype))
        whole = torch.zeros(q.shape, dtype=dtype, device=q.device)
        return {"out0": out.detach(), "dq": whole.index_copy_(1, rows, dq), "dk": dk, "dv": dv}

    def actual() -> dict[str, Tensor]:
        leaves = {n: arguments[n].detach().requires_grad_(backward) for n in "qkv"}
        with torch.set_grad_enabled(backward):
            out = call(**{**arguments, **leaves})
        if not backward:
            return {"out0": out[:, rows]}
        whole = torch.zeros_like(out).index_copy_(1, rows, cotangent)
        grads = torch.autograd.grad(out, list(leaves.values()), whole)
        return {"out0": out[:, rows].detach(), **dict(zip(("dq", "dk", "dv"), grads, strict=True))}

    got, oracle, eager = actual(), formula(torch.float64), formula(q.dtype)
    return [_held(name, got[name], oracle[name], eager[name]) for name in oracle]


def some_rows(tokens: int) -> Tensor:
    """Both ends, where tiles are cut, and others between."""
    generator = torch.Generator().manual_seed(2)
    ends = [*range(min(8, tokens)), *range(max(0, tokens - 8), tokens)]
    between = torch.randint(max(1, tokens), (ROWS - 16,), generator=generator)
    return torch.cat((torch.tensor(ends), between)).unique()


def _held(name: str, got: Tensor, oracle: Tensor, eager: Tensor) -> testing.Accuracy:
    return testing.Accuracy(name, testing.error(got, oracle), testing.allowed(eager, oracle))
