"""adaLN by csrc/adaln*.cu: which kernel takes a call, how it is cut into blocks, and where sums go.

Rows that start at multiples of 16 bytes go to the vector kernels, one row a block at a time; whatever else
there is (an odd C, strided channels, a branch wider than the residual) to the general ones. Gradients
of modulation rows, tables and weights are float32 sums of each block, added up by a second kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from dit_kernels.ops import cuda_extension
from dit_kernels.ops.adaln.tokens import (
    Modulation,
    Tokens,
    arrange,
    chunk_tokens,
    segments,
)

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


def supports(*args: Any) -> str | None:
    x = args[1]
    if x.shape[-1] == 0:
        return "x has no channels"
    if max(x.shape[-1], x.shape[1]) >= 2**31:
        return f"a sample has less than 2^31 tokens and a token less than 2^31 channels; got {list(x.shape)}"
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
    like = x if residual is None else residual
    out = y = y2 = branch_rstd = mean = rstd = None
    if residual is not None:
        out = like.new_empty(x.shape)
    if norm != "none":
        y = like.new_empty(x.shape)
        if shift2 is not None or scale2 is not None:
            y2 = like.new_empty(x.shape)
    if stats:
        if branch_norm == "rms":
            branch_rstd = x.new_empty(x.shape[:2], dtype=torch.float32)
        if norm == "layer":
            mean = x.new_empty(x.shape[:2], dtype=torch.float32)
        if norm != "none":
            rstd = x.new_empty(x.shape[:2], dtype=torch.float32)
    results = [t for t in (out, y, y2, branch_rstd, mean, rstd) if t is not None]
    if x.numel() == 0:
        return results

    gate_table, branch_weight, shift_table, scale_table, weight, bias = (
        _vector(v) for v in (gate_table, branch_weight, shift_table, scale_table, weight, bias)
    )
    tensors = (
        residual, x, gate, shift, scale, shift2, scale2, gate_table, branch_weight, shift_table,
        scale_table, weight, bias, None if row_index is None else row_index.contiguous(),
    )  # fmt: skip
    form = (_NORMS[norm], gate_act == "tanh", branch_norm == "rms", rounding == "eager")
    key = (
        *(t if t is None else (t.shape, t.stride(), t.dtype, t.data_ptr() & 15) for t in tensors),
        form, eps, x.get_device(),
    )  # fmt: skip
    plan = _plans.get(key)
    if plan is None:
        if len(_plans) >= 4096:
            _plans.clear()
        plan = _plans[key] = _forward_plan(tensors, form, eps)
    cuda_extension.kernels().adaln_forward(
        *cuda_extension.where(x), plan, *tensors, out, y, y2, branch_rstd, mean, rstd
    )
    return results


_plans: dict[Any, Any] = {}


def _vector(v: Tensor | None) -> Tensor | None:
    """A weight or table is [C]: nothing next to the tokens."""
    return v if v is None or v.stride(0) == 1 else v.contiguous()


def _forward_plan(tensors: Sequence[Tensor | None], form: tuple[Any, ...], eps: float) -> Any:
    residual, _, gate, shift, scale, shift2, scale2, *vectors, row_index = tensors
    x = cast(Tensor, tensors[1])
    like = x if residual is None else residual
    rows = (gate, shift, scale, shift2, scale2)
    tokens, forms = arrange((residual, x), rows, row_index)
    vector_rows = _vector_rows(like, (like,), x, rows, vectors)
    row = _row(x.shape[2], like.element_size(), _FORWARD if vector_rows else None)
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
    inputs = dict(
        residual=residual, x=x, gate=gate, gate_table=gate_table, branch_weight=branch_weight, shift=shift,
        scale=scale, shift_table=shift_table, scale_table=scale_table, shift2=shift2, scale2=scale2,
        weight=weight, bias=bias, row_index=row_index,
    )  # fmt: skip
    wanted = {
        name: t
        for (name, t), need in zip(inputs.items(), needs, strict=True)
        if need and t is not None
    }
    given, kept = iter(grads), iter(saved)
    gated, normed, branch_rms = residual is not None, norm != "none", branch_norm == "rms"
    dout = next(given) if gated else None
    dy = next(given) if normed else None
    dy2 = next(given) if shift2 is not None or scale2 is not None else None
    stream = (next(kept) if gated else x) if normed else None  # what was normalised
    branch_rstd = next(kept) if branch_rms else None
    mean = next(kept) if norm == "layer" else None
    rstd = next(kept) if normed else None
    if dy is None and dy2 is None:
        norm, stream, mean, rstd = "none", None, None, None
    if x.numel() == 0 or (dout is None and norm == "none"):
        return [torch.zeros_like(t, memory_format=torch.contiguous_format) for t in wanted.values()]

    samples, length, channels = x.shape
    like = x if residual is None else residual
    modulations = dict(gate=gate, shift=shift, scale=scale, shift2=shift2, scale2=scale2)
    reads_branch = gated and (branch_rms or bool(wanted.keys() & {"gate", "gate_table"}))
    branch = (
        x if reads_branch and wanted.keys() & {"x", "gate", "gate_table", "branch_weight"} else None
    )
    tokens, forms = arrange(
        (dout, dy, dy2, stream, branch), list(modulations.values()), row_index, 2
    )
    form = dict(zip(modulations, forms, strict=True))
    scaled = wanted.keys() & {"scale", "scale_table", "scale2"}
    read = [
        _vector(v)
        for v in (gate_table, branch_weight, scale_table, weight, bias if scaled else None)
    ]
    if norm == "none":
        read[3] = read[4] = None
    rows = (gate, scale, scale2)
    extra = dy2 is not None or branch_rms or any(v is not None for v in read[3:])
    extra = extra or bool(wanted.keys() & {"weight", "bias"})
    vector_rows = _vector_rows(like, (dout, dy, dy2, stream), branch, rows, read)
    row = _row(
        channels,
        like.element_size(),
        None if not vector_rows else _BACKWARD_EXTRA if extra else _BACKWARD,
    )
    if row[0] and extra:
        held = sum(t is not None for t in (dout, dy, dy2, stream, branch))
        bytes_of_sums = 4 // like.element_size() * 5
        if 16 * row[0] * row[1] * (2 * held + bytes_of_sums) > cuda_extension.shared_memory(x):
            row = _row(channels, like.element_size(), None)

    resident = max(1, 32 * _RESIDENT_BACKWARD // row[1]) * cuda_extension.multiprocessors(x)
    by_row = row_index is not None and any(m.form == "index" for m in forms)
    chunk = chunk_tokens(
        samples * length, samples * length if by_row else tokens.segment, resident, 128
    )
    chunks = -(-tokens.segment // chunk)
    blocks = tokens.samples * (tokens.length // tokens.segment) * chunks
    order = begin = end = first = None
    if row_index is not None and by_row:
        n_rows = next(m.shape[0] for m in modulations.values() if m is not None)
        order, _, begin, end, first = segments(row_index, n_rows, chunk)
        blocks = begin.shape[0]
        row_index = row_index.contiguous()

    result = {
        name: torch.empty_like(t, memory_format=torch.contiguous_format)
        for name, t in wanted.items()
    }
    dresidual, dbranch = (
        (result.get("residual"), result.get("x")) if gated else (result.get("x"), None)
    )

    # where each column sum goes: straight to the gradient where one block has the whole of it
    alive = dict(gate=gated, shift=dy is not None, scale=dy is not None, shift2=dy2 is not None, scale2=dy2 is not None)  # fmt: skip
    direct: dict[str, Tensor] = {}
    destination: dict[str, Tensor] = {}
    summed: list[str] = []
    stages: list[tuple[str, Tensor, int, int]] = []  # sum, gradient, groups, blocks a group
    for name, m in form.items():
        table = result.get(f"{name}_table")
        out = result.get(name)
        if not alive[name]:
            for t in (out, table):
                if t is not None:
                    t.zero_()
            continue
        if out is not None and m.form == "token":
            direct[name] = out
        elif out is not None:
            per_group = 0 if by_row else m.length // tokens.segment * chunks
            if per_group == 1 and table is None and row[0]:
                destination[name] = out
            else:
                summed.append(name)
                stages.append((name, out, out.numel() // channels, per_group))
        if table is not None:
            if name not in summed:
                summed.append(name)
            stages.append((name, table, 1, blocks))
    for name in ("branch_weight", "weight", "bias"):
        if name in result:
            if name != "branch_weight" and norm == "none":
                result[name].zero_()
            else:
                summed.append(name)
                stages.append((name, result[name], 1, blocks))
    workspace = None
    if summed:
        workspace = x.new_empty((len(summed), blocks, channels), dtype=torch.float32)
        destination.update(zip(summed, workspace.unbind(), strict=True))

    code = cuda_extension.dtype_code
    kernels, where = cuda_extension.kernels(), cuda_extension.where(x)
    results = (dresidual, dbranch, *(direct.get(n) for n in _FORMS), *(destination.get(n) for n in _SUMS))  # fmt: skip
    kernels.adaln_backward(
        *where,
        kernels.AdalnBackward(
            (tokens.samples, tokens.length, channels, *row),
            (_NORMS[norm], gate_act == "tanh", branch_rms, rounding == "eager"), eps,
            tokens.segment, chunk, blocks,
            [_tokens(tokens, t) for t in (dout, dy, dy2, stream, branch)],
            [_rows(form[n], t) for n, t in zip(("gate", "scale", "scale2"), rows, strict=True)],
            [code(v) for v in read], [code(t) for t in results],
        ),
        dout, dy, dy2, stream, branch, *rows, *read, row_index, branch_rstd, mean, rstd, order, begin, end,
        *results,
    )  # fmt: skip
    if stages:
        kernels.adaln_backward_sums(
            *where, workspace, first, channels, blocks,
            [(summed.index(name), groups, per_group) for name, _, groups, per_group in stages],
            [out for _, out, _, _ in stages],
        )  # fmt: skip
    return list(result.values())
