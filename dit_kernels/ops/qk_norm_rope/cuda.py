"""qk_norm_rope by csrc/qk_norm_rope*.cu: which kernel takes a call, and how rows are dealt to blocks.

Heads whose channels are adjacent and start at multiples of 16 bytes go to the vector kernels, if pairs and
sections fall on whole vectors; every other head dim, stride or mix of dtypes to the general ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from dit_kernels.ops import cuda_extension, gradients
from dit_kernels.ops.qk_norm_rope import lists
from dit_kernels.ops.strides import adjacent

_NORMS = {"none": 0, "rms": 1, "layer": 2}
_MOST = 2**30


def supports(q: Tensor, k: Tensor | None, *args: Any) -> str | None:
    for x in (q, k):
        if x is not None and not 0 < x.numel() < _MOST:
            _, length, heads, dim = x.shape
            if not (0 < heads * dim < _MOST and length < _MOST):
                name = "q" if x is q else "k"
                return f"a sample of {name} has less than 2^30 tokens of 1 to 2^30 - 1 channels; got {list(x.shape)}"
    return cuda_extension.unsupported(q, k, *args[:6])


def forward(
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    norm: str,
    over: str,
    eps: float,
    act: str,
    layout: str,
    sections: int,
    rope_start: int,
    rounding: str,
    stats: bool,
) -> list[Tensor]:
    outputs = lists.empty_outputs(q, k)
    saved = lists.empty_statistics(q, k, norm, over) if stats else []
    tensors: _Tensors = (q, k, q_weight, q_bias, k_weight, k_bias, cos, sin)
    form = (norm, over, act, layout, sections, rope_start, rounding)
    kernels = cuda_extension.kernels()
    key = (form, eps, kernels.key(*tensors))
    found = _forward_plans.get(key)
    if found is None:
        found = _make_room(_forward_plans)[key] = _forward_plan(tensors, form, eps)
    if not found.as_given:
        tensors = _prepared(tensors)
    if found.blocks:
        kernels.qk_norm_rope_fwd(
            *cuda_extension.where(q), found.plan, *tensors, outputs[0],
            None if k is None else outputs[1], *lists.statistics(saved, k),
        )  # fmt: skip
    return outputs + saved


def backward(
    grads: list[Tensor | None],
    q: Tensor,
    k: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    saved: list[Tensor],
    norm: str,
    over: str,
    eps: float,
    act: str,
    layout: str,
    sections: int,
    rope_start: int,
    rounding: str,
    needs: list[bool],
) -> list[Tensor]:
    inputs = (q, k, q_weight, k_weight, q_bias, k_bias, cos, sin)
    results = gradients.empty(inputs, needs)
    dq, dk = lists.given(grads, results)
    if dq is None and dk is None:
        return [t.zero_() for t in results if t is not None]
    cos, sin = _angles(cos, sin)
    parameters = [adjacent(p) for p in (q_weight, q_bias, k_weight, k_bias)]
    form = (norm, over, act, layout, sections, rope_start, rounding)
    arguments = (dq, dk, q, k, *parameters, cos, sin, *lists.statistics(saved, k))
    kernels, where = cuda_extension.kernels(), cuda_extension.where(q)
    plan = _planned((q, k), (dq, dk), parameters, cos, sin, eps, form)

    if any(result is not None for result in results[:6]):
        of_q, of_k = plan.q_blocks, plan.k_blocks
        sums = {
            i: gradients.partial_sums(results[i], blocks)
            for i, blocks in ((2, of_q), (4, of_q), (3, of_k), (5, of_k))
        }
        dq_in = results[0] if dq is not None else None
        dk_in = results[1] if dk is not None else None
        kernels.qk_norm_rope_bwd(*where, plan.plan, *arguments, dq_in, dk_in, *sums.values())
        for i, rows in sums.items():
            if rows is not None:
                kernels.add_rows(*where, rows, results[i], 1, *rows.shape)

    dcos, dsin = results[6:]
    table = dsin if dcos is None else dcos
    if table is not None and table.numel():
        samples, heads = (table.shape[0], table.shape[2]) if table.dim() == 4 else (1, 1)
        kernels.qk_norm_rope_bwd_angles(*where, plan.plan, *arguments, samples, heads, dcos, dsin)
    return [t for t in results if t is not None]


def _angles(cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The tables, of one dtype and the same strides; none where nothing turns."""
    if cos is None or sin is None or cos.numel() == 0:
        return None, None
    if cos.dtype != sin.dtype:
        cos, sin = cos.float(), sin.float()
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    return cos, sin


_Tensors = tuple[Tensor | None, ...]


class _Plan(NamedTuple):
    plan: Any
    q_blocks: int
    k_blocks: int


_plans: dict[Any, _Plan] = {}


def _planned(
    xs: tuple[Tensor, Tensor | None],
    grads: tuple[Tensor | None, Tensor | None],
    parameters: Sequence[Tensor | None],
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    form: tuple[Any, ...],
) -> _Plan:
    key = (form, eps, cuda_extension.kernels().key(*xs, *grads, *parameters, cos, sin))
    found = _plans.get(key)
    if found is None:
        found = _make_room(_plans)[key] = _plan(xs, grads, parameters, cos, sin, eps, *form)
    return found


class _ForwardPlan(NamedTuple):
    plan: Any
    blocks: int
    as_given: bool  # no tensor has to be copied first


_forward_plans: dict[Any, _ForwardPlan] = {}
_Plans = TypeVar("_Plans", bound=dict[Any, Any])


def _make_room(plans: _Plans) -> _Plans:
    if len(plans) >= 4096:
        plans.clear()
    return plans


def _prepared(tensors: _Tensors) -> _Tensors:
    """q, k, then weights, biases and angles as the kernels read them."""
    q, k, *parameters, cos, sin = tensors
    return (q, k, *(adjacent(p) for p in parameters), *_angles(cos, sin))


def _forward_plan(tensors: _Tensors, form: tuple[Any, ...], eps: float) -> _ForwardPlan:
    ready = _prepared(tensors)
    q, k, *parameters, cos, sin = ready
    made = _plan((q, k), (None, None), parameters, cos, sin, eps, *form)
    as_given = all(a is b for a, b in zip(tensors, ready, strict=True))
    return _ForwardPlan(made.plan, made.q_blocks + made.k_blocks, as_given)


def _plan(
    xs: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    parameters: Sequence[Tensor | None],
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
    norm: str,
    over: str,
    act: str,
    layout: str,
    sections: int,
    rope_start: int,
    rounding: str,
) -> _Plan:
    """What a launch is but for its addresses. Backward where there are gradients: it works on those sides."""
    q = next(x for x in xs if x is not None)
    hidden, half, backward = over == "hidden", layout == "half", any(g is not None for g in grads)
    dim = q.shape[3]
    turning = 0 if cos is None else cos.shape[-1] // sections
    if cos is None:
        sections, half = 1, False
    live = [
        x if x is not None and x.numel() and (g is not None or not backward) else None
        for x, g in zip(xs, grads, strict=True)
    ]
    lanes, threads = 0, 0
    most_heads = max((x.shape[2] for x in live if x is not None), default=0)
    if _vector_rows(live, grads, parameters, cos, sin, dim // sections, turning, half):
        lanes, threads = _lanes(
            dim * (most_heads if hidden else 1), q.element_size(), hidden, backward
        )
    if not lanes:
        pairs = sections * -(-(dim // sections) // 2) * (most_heads if hidden else 1)
        threads = min(128, 32 * -(-pairs // 32)) or 32
    groups = threads // lanes if lanes and not hidden else 1
    slots = max(1, 512 // threads) * cuda_extension.multiprocessors(q)
    code = cuda_extension.dtype_code
    numbers, blocks = [], []
    for i, (x, g) in enumerate(zip(live, grads, strict=True)):
        if x is None:
            numbers.append([0] * 18)
            blocks.append(0)
            continue
        rows = x.shape[0] * x.shape[1] * (1 if hidden else x.shape[2])
        steps = max(1, min(128 if backward else 16, -(-rows // (groups * slots))))
        chunk = steps * groups
        blocks.append(-(-rows // chunk))
        numbers.append([
            *x.shape[:3], blocks[-1], chunk, *_strides(x), code(x), *_strides(g), code(g),
            code(parameters[2 * i]), code(parameters[2 * i + 1]), code(x),
        ])  # fmt: skip
    plan = cuda_extension.kernels().QkNormRope(
        [_NORMS[norm], hidden, act == "relu", rounding == "eager", half], eps,
        [dim, sections, turning, lanes, threads], _angle_numbers(cos, rope_start), numbers,
    )  # fmt: skip
    return _Plan(plan, blocks[0], blocks[1])


def _strides(x: Tensor | None) -> tuple[int, ...]:
    if x is None:
        return (0, 0, 0, 0)
    outer = zip(x.shape[:3], x.stride()[:3], strict=True)
    return (*(s if n > 1 else 0 for n, s in outer), x.stride(3) if x.shape[3] > 1 else 1)


def _angle_numbers(cos: Tensor | None, start: int) -> list[int]:
    """Strides of sample, token, head and angle; dtype, first token and length."""
    if cos is None:
        return [0] * 7
    code = cuda_extension.dtype_code(cos)
    cos = cos[None, :, None] if cos.dim() == 2 else cos
    sample, token, head = (
        s if n > 1 else 0 for n, s in zip(cos.shape[:3], cos.stride()[:3], strict=True)
    )
    return [sample, token, head, cos.stride(3), code, start, cos.shape[1]]


def _vector_rows(
    xs: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    parameters: Sequence[Tensor | None],
    cos: Tensor | None,
    sin: Tensor | None,
    wide: int,
    turning: int,
    half: bool,
) -> bool:
    """Whether all rows can be read 16 bytes at a time, and pairs and sections of `wide` channels fall on vectors."""
    found = [t for t in (*xs, *grads) if t is not None]
    if not found or any(t.dtype != found[0].dtype for t in found):
        return False
    size = found[0].element_size()
    width = 16 // size
    if wide % (2 * width if half else width) or turning % (width if half else width // 2):
        return False
    for t in (*found, *(a for a in (cos, sin) if a is not None)):
        size = t.element_size()
        if t.stride(-1) != 1 and t.shape[-1] > 1:
            return False
        outer = zip(t.shape[:-1], t.stride()[:-1], strict=True)
        if t.data_ptr() % 16 or any(n > 1 and s * size % 16 for n, s in outer):
            return False
    return all(p is None or p.data_ptr() % 16 == 0 for p in parameters)


def _lanes(channels: int, size: int, hidden: bool, backward: bool) -> tuple[int, int]:
    """(threads of a row, of a block), as csrc/qk_norm_rope.cu has vectors and threads; (0, 0): too long."""
    narrow = backward and size == 2
    most = 384 if narrow else 512
    each = 4 if hidden and not narrow else 2
    lanes = -(-channels * size // (16 * each))
    if hidden:
        threads = 32 * -(-lanes // 32)
        return (threads, threads) if threads <= most else (0, 0)
    lanes = 1 << (lanes - 1).bit_length()
    return (lanes, 128 if backward else 256) if lanes <= 32 else (0, 0)
