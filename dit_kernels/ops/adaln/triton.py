"""adaLN in Triton: one forward kernel and one backward kernel for the whole family.

    residual_out = residual + act(gate) * branch_norm(branch)
    y            = norm(residual_out) * (1 + scale) + shift

Each program owns a chunk of tokens that share their modulation rows, which it keeps in registers while
it walks over them. A row is held as a few power-of-two PARTS (1152 = 1024 + 128), so that a
C that is no power of two does not compute on padding. Bytes moved, with X = one token tensor:

    adaln 2X, gated_adaln 4X        each input read once, each output written once
    backward of gated_adaln 6X      reads dy, dresidual_out, residual_out, branch; writes dresidual, dbranch

The backward recomputes from residual_out (or x) and the saved mean and rstd. The gradients of modulation
rows, tables and weights are summed over the chunk in registers, one float32 row a program; a second small
kernel adds those rows in fixed order. Nothing is added atomically: the result is deterministic.
With row_index the backward visits the tokens in the order of a stable sort of the index, cut so that a
chunk reads one row: a segmented sum by the same two stages.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import triton
from torch import Tensor

from dit_kernels.ops import gradients, triton_launch, triton_tuning
from dit_kernels.ops.adaln import lists
from dit_kernels.ops.adaln.tiling import Config, configure, split_row
from dit_kernels.ops.adaln.tokens import arrange, chunk_tokens, cut_backward, segments, vector
from dit_kernels.ops.adaln.triton_backward import adaln_bwd_kernel, adaln_bwd_sums_kernel
from dit_kernels.ops.adaln.triton_forward import adaln_fwd_kernel
from dit_kernels.ops.strides import adjacent


def _candidates(key: triton_tuning.Key, default: Config) -> list[Config]:
    """The row over half or twice as many warps."""
    warps = (default.num_warps, max(1, default.num_warps // 2), min(16, 2 * default.num_warps))
    channels = cast(int, key[0])
    found = [default._replace(parts=split_row(channels, w), num_warps=w) for w in warps]
    return list(dict.fromkeys(found))


triton_tuning.CANDIDATES |= {"adaln.forward": _candidates, "adaln.backward": _candidates}


def supports(*args: Any) -> str | None:
    if args[1].shape[-1] == 0:
        return "x has no channels"
    if args[1].shape[-1] > 16384:
        return f"a row has at most 16384 channels; got {args[1].shape[-1]}"
    return triton_launch.unsupported(args[:14])


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

    tensors = (
        residual, x, gate, adjacent(gate_table), adjacent(branch_weight), shift, scale,
        adjacent(shift_table), adjacent(scale_table), shift2, scale2, adjacent(weight), adjacent(bias),
        None if row_index is None else row_index.contiguous(),
    )  # fmt: skip
    statics = (norm, gate_act, branch_norm, eps, rounding)
    plan = _plans(tensors, *statics, stats)
    triton_launch.run(adaln_fwd_kernel, plan, *tensors, *made)
    return results


def _plan(
    tensors: Sequence[Tensor | None],
    norm: str,
    gate_act: str,
    branch_norm: str,
    eps: float,
    rounding: str,
    stats: bool,
) -> triton_launch.Plan:
    """Of the forward kernel."""
    residual, x, gate, _, _, shift, scale, _, _, shift2, scale2, _, _, row_index = tensors
    x = cast(Tensor, x)
    channels = x.shape[2]
    tokens, forms = arrange((residual, x), (gate, shift, scale, shift2, scale2), row_index)
    kind = "norm" if residual is None else "gated"
    config = triton_tuning.choose("adaln.forward", (channels, kind), configure(channels, kind))
    resident = max(1, config.resident // config.num_warps) * triton_launch.multiprocessors(x)
    chunk = chunk_tokens(tokens.samples * tokens.length, tokens.segment, resident, 16)
    chunks = -(-tokens.segment // chunk)
    per_sample = tokens.length // tokens.segment * chunks
    residual_strides, x_strides = tokens.strides(residual), tokens.strides(x)
    strides = [residual_strides, x_strides] if residual is not None else [x_strides]
    vec, unit = vector(strides + [m[1:4] for m in forms if m.form != "none"])
    eager = rounding == "eager"
    numbers = (
        tokens.length, per_sample, tokens.segment, chunks, chunk, eps,
        *_in_vectors(residual_strides, vec), *_in_vectors(x_strides, vec),
        *(s for m in forms for s in (*_in_vectors(m[1:4], vec), m.length)),
        channels, config.parts, vec, unit,
        norm, gate_act == "tanh", branch_norm == "rms", eager, *(m.form for m in forms),
        config.num_stages,
    )  # fmt: skip
    options = {"num_warps": config.num_warps, "enable_fp_fusion": not eager}
    return triton_launch.Plan((tokens.samples * per_sample,), numbers, options, {})


_plans = triton_launch.Plans(_plan)


def _in_vectors(strides: Sequence[int], vec: int) -> tuple[int, int, int]:
    """Row strides counted in vectors: the kernel multiplies, and so knows what divides them."""
    outer, inner, channel = strides
    return (outer // vec, inner // vec, channel)


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
    results = zip(inputs, gradients.empty(inputs.values(), needs), strict=True)
    result = {name: t for name, t in results if t is not None}
    two = shift2 is not None or scale2 is not None
    dout, dy, dy2, stream, branch_rstd, mean, rstd = lists.given(
        grads, saved, residual, x, two, norm, branch_norm
    )
    if stream is None:
        norm = "none"
    if x.numel() == 0 or (dout is None and stream is None):
        return [t.zero_() for t in result.values()]

    channels = x.shape[2]
    modulations = dict(gate=gate, shift=shift, scale=scale, shift2=shift2, scale2=scale2)
    gated, branch_rms = residual is not None, branch_norm == "rms"
    branch = x if gated and (branch_rms or result.keys() & {"gate", "gate_table"}) else None
    tokens, forms = arrange(
        (dout, dy, dy2, stream, branch), list(modulations.values()), row_index, 2
    )
    form = dict(zip(modulations, forms, strict=True))
    sums = len(result.keys() & {"branch_weight", "weight", "bias"})
    for name, m in form.items():
        sums += f"{name}_table" in result or (name in result and m.form != "token")
    config = configure(channels, "backward", sums)
    config = triton_tuning.choose("adaln.backward", (channels, sums), config)
    resident = max(1, config.resident // config.num_warps) * triton_launch.multiprocessors(x)
    cut = cut_backward(tokens, modulations.values(), row_index, resident)
    by_row = cut.rows > 0
    order = row = begin = end = first = None
    if row_index is not None and by_row:
        order, row, begin, end, first = segments(row_index, cut.rows, cut.chunk)
        form = {
            name: m._replace(form="group") if m.form == "index" else m for name, m in form.items()
        }

    dresidual, dbranch = (
        (result.get("residual"), result.get("x")) if gated else (result.get("x"), None)
    )

    # where each column sum goes, and the second stages: (programs a group, groups) -> gradients
    alive = dict(gate=gated, shift=dy is not None, scale=dy is not None, shift2=dy2 is not None, scale2=dy2 is not None)  # fmt: skip
    direct: dict[str, Tensor] = {}
    destination: dict[str, Tensor] = {}
    summed: list[str] = []
    stages: dict[tuple[int, int], list[tuple[str, Tensor]]] = {}
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
            per_group = 0 if by_row else m.length // tokens.segment * cut.chunks
            summed.append(name)
            stages.setdefault((per_group, out.numel() // channels), []).append((name, out))
        if table is not None:
            if name not in summed:
                summed.append(name)
            stages.setdefault((cut.programs, 1), []).append((name, table))
    for name in ("branch_weight", "weight", "bias"):
        if name in result:
            if name != "branch_weight" and norm == "none":
                result[name].zero_()
            else:
                summed.append(name)
                stages.setdefault((cut.programs, 1), []).append((name, result[name]))
    if summed:
        workspace = x.new_empty((len(summed), cut.programs, channels), dtype=torch.float32)
        destination.update(zip(summed, workspace.unbind(), strict=True))

    strides = {
        name: tokens.strides(t)
        for name, t in (("dout", dout), ("dy", dy), ("dy2", dy2), ("x", stream), ("branch", branch))
    }
    present = [s for s, t in zip(strides.values(), (dout, dy, dy2, stream, branch), strict=True) if t is not None]  # fmt: skip
    vec, unit = vector(
        present + [form[m][1:4] for m in ("gate", "scale", "scale2") if form[m].form != "none"]
    )
    eager = rounding == "eager"
    scaled = "scale" in direct or "scale" in destination or "scale2" in direct or "scale2" in destination  # fmt: skip
    triton_launch.launch(
        adaln_bwd_kernel, (cut.programs,),
        dout, dy, dy2, stream, branch,
        gate, adjacent(gate_table), adjacent(branch_weight), scale, adjacent(scale_table), scale2,
        adjacent(weight), adjacent(bias) if scaled else None, branch_rstd, mean, rstd, order, row, begin, end,
        dresidual, dbranch, *(direct.get(name) for name in form),
        *(destination.get(name) for name in (*form, "branch_weight", "weight", "bias")),
        x.shape[1] if by_row else tokens.length, tokens.length // tokens.segment * cut.chunks,
        tokens.segment, cut.chunks, cut.chunk,
        *(s for three in strides.values() for s in _in_vectors(three, vec)),
        *(s for m in ("gate", "scale", "scale2") for s in (*_in_vectors(form[m][1:4], vec), form[m].length)),
        channels, config.parts, vec, unit,
        norm, gate_act == "tanh", branch_rms, eager,
        form["gate"].form, form["scale"].form, form["scale2"].form, by_row,
        config.num_stages,
        num_warps=config.num_warps, enable_fp_fusion=not eager,
    )  # fmt: skip
    for (per_group, groups), pairs in stages.items():
        # a batch of samples has enough groups to fill a GPU; whatever their length, one kernel serves
        block_p, block_c = (4, 256) if per_group and groups >= 64 else (64, 32)
        triton_launch.launch(
            adaln_bwd_sums_kernel, (groups, triton.cdiv(channels, block_c), len(pairs)),
            tuple(destination[name] for name, _ in pairs), tuple(out for _, out in pairs),
            first if per_group == 0 else None, per_group, channels, block_p, block_c,
        )  # fmt: skip
    return list(result.values())
