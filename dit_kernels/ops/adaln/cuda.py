"""adaLN by csrc/adaln*.cu: which kernel takes a call, how it is cut into blocks, and where sums go.

Rows that start at multiples of 16 bytes go to the vector kernels, one row a block at a time; whatever else
there is (an odd C, strided channels, a branch wider than the residual) to the general ones. Gradients
of modulation rows, tables and weights are float32 sums of each block, added up by a second kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from dit_kernels.ops import cuda_extension, gradients
from dit_kernels.ops.adaln import lists
from dit_kernels.ops.adaln.tokens import (
    Cut,
    Modulation,
    Tokens,
    arrange,
    chunk_tokens,
    cut_backward,
    segments,
)
from dit_kernels.ops.strides import adjacent

# 16-byte vectors of a row in a thread that there are kernels for, the dtype's bytes and the most threads
Kernels = dict[int, tuple[tuple[int, ...], int]]
_FORWARD: Kernels = {2: ((3, 5), 512), 4: ((3, 5), 512)}
_BACKWARD: Kernels = {2: ((2, 3), 384), 4: ((3,), 512)}
_BACKWARD_EXTRA: Kernels = {2: ((2,), 384), 4: ((3,), 512)}
# warps that a multiprocessor holds at the registers these kernels take
_RESIDENT_FORWARD, _RESIDENT_BACKWARD = 16, 12
_NORMS = {"none": 0, "rms": 1, "layer": 2}
_FORMS = ("gate", "shift", "scale", "shift2", "scale2")
_SUMS = (*_FORMS, "branch_weight", "weight", "bias")
_READ = ("gate_table", "branch_weight", "scale_table", "weight", "bias")
_ARGUMENTS = (
    "residual", "x", "gate", "gate_table", "branch_weight", "shift", "scale", "shift_table", "scale_table",
    "shift2", "scale2", "weight", "bias", "row_index",
)  # fmt: skip


def supports(*args: Any) -> str | None:
    _, length, channels = args[1].shape
    if channels == 0:
        return "x has no channels"
    if length >= 2**31 or channels >= 2**31:
        shape = list(args[1].shape)
        return (
            f"a sample has less than 2^31 tokens and a token less than 2^31 channels; got {shape}"
        )
    return cuda_extension.unsupported(*args[:14])


def forward(
    residual: Tensor | None,
    x: Tensor,
    gate: Tensor | None,
    gate_table: Tensor | None,
    branch_weight: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    shift_table: Tensor | None,
    scale_table: Tensor | None,
    shift2: Tensor | None,
    scale2: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    row_index: Tensor | None,
    norm: str,
    gate_act: str,
    branch_norm: str,
    eps: float,
    rounding: str,
    stats: bool,
) -> list[Tensor]:
    two = shift2 is not None or scale2 is not None
    made = lists.made(residual, x, two, norm, branch_norm, stats)
    results = [t for t in made if t is not None]
    if x.numel() == 0:
        return results

    tensors: tuple[Tensor | None, ...] = (
        residual, x, gate, shift, scale, shift2, scale2,
        gate_table if gate_table is None else adjacent(gate_table),
        branch_weight if branch_weight is None else adjacent(branch_weight),
        shift_table if shift_table is None else adjacent(shift_table),
        scale_table if scale_table is None else adjacent(scale_table),
        weight if weight is None else adjacent(weight),
        bias if bias is None else adjacent(bias),
        row_index if row_index is None else row_index.contiguous(),
    )  # fmt: skip
    kernels = cuda_extension.kernels()
    key = (norm, gate_act, branch_norm, rounding, eps, kernels.key(*tensors))
    plan = _plans.get(key)
    if plan is None:
        if len(_plans) >= 4096:
            _plans.clear()
        form = (_NORMS[norm], gate_act == "tanh", branch_norm == "rms", rounding == "eager")
        plan = _plans[key] = _forward_plan(tensors, form, eps)
    kernels.adaln_forward(*cuda_extension.where(x), plan, *tensors, *made)
    return results


_plans: dict[Any, Any] = {}


def _forward_plan(tensors: Sequence[Tensor | None], form: tuple[Any, ...], eps: float) -> Any:
    residual, _, gate, shift, scale, shift2, scale2, *vectors, row_index = tensors
    x = cast(Tensor, tensors[1])
    like = x if residual is None else residual
    rows = (gate, shift, scale, shift2, scale2)
    tokens, forms = arrange((residual, x), rows, row_index)
    vector_rows = _vector_rows(like, (like,), x, rows, vectors)
    row = _row(x.shape[2], like.element_size(), _FORWARD if vector_rows else None)
    row = _fit(row, 2 if residual is None else 4, x)
    resident = max(1, 32 * _RESIDENT_FORWARD // row[1]) * cuda_extension.multiprocessors(x)
    total = tokens.samples * tokens.length
    return cuda_extension.kernels().AdalnForward(
        (tokens.samples, tokens.length, x.shape[2], *row), form, eps,
        chunk_tokens(total, total, resident, 16),
        [_tokens(tokens, t) for t in (residual, x)],
        [_rows(m, t) for m, t in zip(forms, rows, strict=True)],
        [cuda_extension.dtype_code(v) for v in vectors],
    )  # fmt: skip


def _tokens(tokens: Tokens, tensor: Tensor | None) -> tuple[int, ...]:
    return (*tokens.strides(tensor), cuda_extension.dtype_code(tensor))


def _rows(m: Modulation, tensor: Tensor | None) -> tuple[int, ...]:
    """Strides of sample (or of the indexed row), group and channel, tokens a group, indexed, dtype."""
    return (*m[1:5], m.form == "index", cuda_extension.dtype_code(tensor))


def _vector_rows(
    like: Tensor,
    tokens: Sequence[Tensor | None],
    branch: Tensor | None,
    modulations: Sequence[Tensor | None],
    vectors: Sequence[Tensor | None],
) -> bool:
    """Whether every row can be read 16 bytes at a time; a 16-bit branch of a float32 row in 8 bytes."""
    dtype, size = like.dtype, like.element_size()
    for t in (*tokens, branch):
        if t is None:
            continue
        if t.dtype != dtype and (t is not branch or size == 2):
            return False
        if not _aligned(t, 16 * t.element_size() // size):
            return False
    return all(t is None or _aligned(t, 16) for t in (*modulations, *vectors))


def _aligned(t: Tensor, vector: int) -> bool:
    size = t.element_size()
    outer = sum(
        1 for n, s in zip(t.shape[:-1], t.stride()[:-1], strict=True) if n > 1 and s * size % vector
    )
    return (
        not outer
        and (t.stride(-1) == 1 or t.shape[-1] == 1)
        and t.shape[-1] * size % vector == 0
        and t.data_ptr() % vector == 0
    )  # fmt: skip


@functools.cache
def _fitting(
    channels: int, size: int, counts: tuple[int, ...], most: int
) -> tuple[int, int] | None:
    """(vectors a thread, threads) with the fewest idle lanes, then the fewest warps."""
    vectors = channels * size // 16
    fitting = []
    for count in counts:
        threads = 32 * -(-vectors // (32 * count))
        if threads <= most:
            fitting.append((threads * count - vectors, threads, count))
    if not fitting:
        return None
    _, threads, count = min(fitting)
    return count, threads


def _row(channels: int, size: int, kernels: Kernels | None) -> tuple[int, int]:
    """(vectors a thread, threads) of a row; no vectors: the general kernel."""
    found = None if kernels is None else _fitting(channels, size, *kernels[size])
    return found or (0, min(256, 32 * -(-channels // 32)))


def _fit(row: tuple[int, int], rows: int, x: Tensor) -> tuple[int, int]:
    """The general kernel where as many rows do not fit shared memory."""
    return row if _fits(row, rows, x) else _row(x.shape[2], x.element_size(), None)


def _fits(row: tuple[int, int], rows: int, x: Tensor) -> bool:
    # the first KiB is where rows are summed
    return 1024 + 16 * row[0] * row[1] * rows <= cuda_extension.shared_memory(x)


def backward(
    grads: Sequence[Tensor | None],
    residual: Tensor | None,
    x: Tensor,
    gate: Tensor | None,
    gate_table: Tensor | None,
    branch_weight: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    shift_table: Tensor | None,
    scale_table: Tensor | None,
    shift2: Tensor | None,
    scale2: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    row_index: Tensor | None,
    saved: Sequence[Tensor],
    norm: str,
    gate_act: str,
    branch_norm: str,
    eps: float,
    rounding: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    inputs = (
        residual, x, gate, gate_table, branch_weight, shift, scale, shift_table, scale_table, shift2,
        scale2, weight, bias, row_index,
    )  # fmt: skip
    results = gradients.empty(inputs, needs)
    two = shift2 is not None or scale2 is not None
    dout, dy, dy2, stream, branch_rstd, mean, rstd = lists.given(
        grads, saved, residual, x, two, norm, branch_norm
    )
    if stream is None:
        norm = "none"
    if x.numel() == 0 or (dout is None and stream is None):
        return [t.zero_() for t in results if t is not None]

    kernels, where = cuda_extension.kernels(), cuda_extension.where(x)
    layouts = kernels.key(*inputs, dout, dy, dy2, stream)
    key = (norm, gate_act, branch_norm, eps, rounding, *needs, layouts)
    plan = _backward_plans.get(key)
    if plan is None:
        if len(_backward_plans) >= 4096:
            _backward_plans.clear()
        plan = _backward_plan(
            inputs, dout, dy, dy2, stream, norm, gate_act, branch_norm, eps, rounding, needs
        )
        _backward_plans[key] = plan

    for i in plan.zeros:
        cast(Tensor, results[i]).zero_()
    order = begin = end = first = workspace = None
    cut = plan.cut
    if cut.rows and row_index is not None:
        order, _, begin, end, first = segments(row_index, cut.rows, cut.chunk)
        row_index = row_index.contiguous()
    if plan.sums:
        workspace = x.new_empty((plan.sums, cut.programs, x.shape[2]), dtype=torch.float32)
    kernels.adaln_backward(
        *where, plan.plan, dout, dy, dy2, stream, x if plan.reads_branch else None, gate, scale, scale2,
        *[None if i is None else adjacent(inputs[i]) for i in plan.reads], row_index, branch_rstd, mean,
        rstd, order, begin, end, *[None if i is None else results[i] for i in plan.targets], workspace,
    )  # fmt: skip
    if plan.totals:
        kernels.adaln_backward_sums(
            *where, plan.stages, workspace, first, [results[i] for i in plan.totals]
        )
    return [t for t in results if t is not None]


class _BackwardPlan(NamedTuple):
    """What a backward is but for its tensors; these by their place among the op's arguments."""

    plan: Any
    zeros: list[int]  # whose gradient is asked for, and is zero
    reads_branch: bool
    reads: list[int | None]  # gate_table, branch_weight, scale_table, weight, bias
    targets: list[int | None]  # the kernel's results: d(residual), d(branch), rows a token, sums
    sums: int  # rows of the workspace
    stages: Any  # the second stage
    totals: list[int]  # and what it gives
    cut: Cut


_backward_plans: dict[Any, _BackwardPlan] = {}


def _backward_plan(
    inputs: Sequence[Tensor | None],
    dout: Tensor | None,
    dy: Tensor | None,
    dy2: Tensor | None,
    stream: Tensor | None,
    norm: str,
    gate_act: str,
    branch_norm: str,
    eps: float,
    rounding: str,
    needs: Sequence[bool],
) -> _BackwardPlan:
    at = {name: i for i, name in enumerate(_ARGUMENTS)}
    named = dict(zip(_ARGUMENTS, inputs, strict=True))
    wanted = {
        name for (name, t), need in zip(named.items(), needs, strict=True) if need and t is not None
    }
    residual, x, row_index = named["residual"], cast(Tensor, named["x"]), named["row_index"]
    channels = x.shape[2]
    like = x if residual is None else residual
    gated, branch_rms = residual is not None, branch_norm == "rms"
    reads_branch = gated and (
        bool(wanted & {"gate", "gate_table", "branch_weight"}) or (branch_rms and "x" in wanted)
    )
    branch = x if reads_branch else None
    modulations = {name: named[name] for name in _FORMS}
    tokens, forms = arrange(
        (dout, dy, dy2, stream, branch), list(modulations.values()), row_index, 2
    )
    form = dict(zip(_FORMS, forms, strict=True))
    normed = norm != "none"
    use = (True, True, True, normed, normed and bool(wanted & {"scale", "scale_table", "scale2"}))
    read = [adjacent(named[name]) if used else None for name, used in zip(_READ, use, strict=True)]
    rows = [named[name] for name in ("gate", "scale", "scale2")]
    extra = dy2 is not None or branch_rms or any(v is not None for v in read[3:])
    extra = extra or bool(wanted & {"weight", "bias"})
    size = like.element_size()
    # d(branch) has the branch's dtype, also where the branch itself is not read
    writable = x.dtype == like.dtype or size == 4 or "x" not in wanted
    vector_rows = writable and _vector_rows(like, (dout, dy, dy2, stream), branch, rows, read)
    row = _row(channels, size, None if not vector_rows else _BACKWARD_EXTRA if extra else _BACKWARD)
    held = sum(t is not None for t in (dout, dy, dy2, stream, branch))
    sums = 5 * (4 // size) if extra else 0
    ring = 2 if _fits(row, 2 * held + sums, x) else 1
    row = _fit(row, ring * held + sums, x)

    resident = max(1, 32 * _RESIDENT_BACKWARD // row[1]) * cuda_extension.multiprocessors(x)
    cut = cut_backward(tokens, modulations.values(), row_index, resident)

    # where each column sum goes: straight to the gradient where one block has the whole of it
    alive = {"gate": gated, "shift": dy is not None, "scale": dy is not None}
    alive |= {"shift2": dy2 is not None, "scale2": dy2 is not None}
    alive |= {"branch_weight": True, "weight": normed, "bias": normed}
    direct: dict[str, int] = {}
    destination: dict[str, int] = {}
    zeros: list[int] = []
    summed: list[str] = []
    stages: list[tuple[int, int, int]] = []
    totals: list[int] = []

    def second_stage(name: str, gradient: str, groups: int, per_group: int) -> None:
        if name not in summed:
            summed.append(name)
        stages.append((summed.index(name), groups, per_group))
        totals.append(at[gradient])

    for name in _SUMS:
        table = f"{name}_table"
        if not alive[name]:
            zeros += [at[t] for t in (name, table) if t in wanted]
            continue
        if name not in form:
            if name in wanted:
                second_stage(name, name, 1, cut.programs)
            continue
        m = form[name]
        if name in wanted and m.form == "token":
            direct[name] = at[name]
        elif name in wanted:
            per_group = 0 if cut.rows else m.length // tokens.segment * cut.chunks
            if per_group == 1 and table not in wanted and row[0]:
                destination[name] = at[name]
            else:
                groups = cast(Tensor, named[name]).numel() // channels
                second_stage(name, name, groups, per_group)
        if table in wanted:
            second_stage(name, table, 1, cut.programs)
    dx = "residual" if gated else "x"
    targets: list[int | None] = [
        at[dx] if dx in wanted else None,
        at["x"] if gated and "x" in wanted else None,
        *(direct.get(n) for n in _FORMS),
        *(destination.get(n) for n in _SUMS),
    ]
    code = cuda_extension.dtype_code
    codes = [0 if i is None else code(inputs[i]) for i in targets]
    plan = cuda_extension.kernels().AdalnBackward(
        (tokens.samples, tokens.length, channels, *row),
        (_NORMS[norm], gate_act == "tanh", branch_rms, rounding == "eager"), eps,
        tokens.segment, cut.chunk, ring, cut.programs,
        [_tokens(tokens, t) for t in (dout, dy, dy2, stream, branch)],
        [_rows(form[n], t) for n, t in zip(("gate", "scale", "scale2"), rows, strict=True)],
        [code(v) for v in read], codes,
        [summed.index(name) if name in summed else -1 for name in _SUMS],
    )  # fmt: skip
    return _BackwardPlan(
        plan, zeros, reads_branch,
        [None if v is None else at[name] for name, v in zip(_READ, read, strict=True)], targets,
        len(summed), cuda_extension.kernels().AdalnSums(channels, cut.programs, stages), totals, cut,
    )  # fmt: skip
