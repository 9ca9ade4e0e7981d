"""Whole models: forward, training step and generation, by eager PyTorch, torch.compile and our kernels.

    dit-kernels bench models [MODEL ...] [--mode forward] [--seconds 60] [--out DIR]

One model, two sets of kernels: `eager` and `compile` run its plain formulas with torch's own attention,
`ours` the fused ops. torch.compile compiles the transformer's block, which all layers share: what people do
who don't want to wait for minutes. A generation ends at latents, without the decoder to pixels.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.guarded import attempted, lost
from benchmarks.models import MODELS, Inputs, Model, flops
from benchmarks.record import (
    Parser,
    Row,
    add_run_options,
    closing,
    opened,
    result_file,
    task_key,
    write_rows,
)
from benchmarks.timing import timed
from dit_kernels import backends, testing

MODES = ("forward", "train", "generate")
GUIDANCE = 4.0
# seconds: with fewer left nothing is begun, or compiled; after so many on a GPU it is given up
NEEDED = {False: 5, True: 20}
PATIENCE = 300


@dataclass(frozen=True)
class Implementation:
    """How a model is run: with which kernels, and whether compiled and replayed from a CUDA graph."""

    name: str
    ours: bool = False
    compiled: bool = False
    graph: bool = False
    attention: str | None = None  # torch's kernel, by default torch's choice


IMPLEMENTATIONS = (
    Implementation("eager"),
    Implementation("ours", ours=True),
    Implementation("compile", compiled=True),
    Implementation("ours-compile-graph", ours=True, compiled=True, graph=True),
    Implementation("compile-cudnn", compiled=True, attention="CUDNN_ATTENTION"),
)


@contextlib.contextmanager
def kernels(implementation: Implementation) -> Iterator[None]:
    """Inside, the ops are ours, or the plain formulas with torch's attention."""
    if implementation.ours:
        yield
        return
    reference = backends.load("attention3d", "reference")
    own = reference.eager

    def attention(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> list[Tensor]:
        text_lens, kv_lens, cu_seqlens, _, window_size, _, _, _, causal_time, _, scale, *_ = args
        masked = any(lens is not None for lens in (text_lens, kv_lens, cu_seqlens))
        if masked or window_size or causal_time:
            return own(q, k, v, *args)
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return [F.scaled_dot_product_attention(*heads_first, scale=scale).transpose(1, 2)]

    chosen = contextlib.nullcontext()
    if implementation.attention:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        chosen = sdpa_kernel(getattr(SDPBackend, implementation.attention))
    reference.eager = attention
    try:
        with testing.plain_torch(), chosen:
            yield
    finally:
        reference.eager = own


def prepared(
    model: Model, mode: str, implementation: Implementation, device: str, *, small: bool = False
) -> nn.Module:
    """The model in the dtype of its mode, nothing in it zero, compiled where the implementation is."""
    torch.manual_seed(0)
    with torch.device(device):
        net = model.make(depth=2) if small else model.make()
    for parameter in net.parameters():
        # a branch behind a gate of zero would be cheaper than it is in a trained model, and untested
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    net = net.train() if mode == "train" else net.eval().requires_grad_(False).to(torch.bfloat16)
    if implementation.compiled:
        torch._dynamo.reset()
        for part in getattr(net, "blocks", [net]):
            part.compile(fullgraph=True, dynamic=False)
    return net


def call(
    model: Model, mode: str, net: nn.Module, inputs: Inputs, implementation: Implementation
) -> Callable[[], object]:
    """What is timed."""

    def forward() -> Tensor:
        with torch.no_grad(), kernels(implementation):
            return net(**inputs)

    if mode == "forward":
        return forward
    device = inputs["x"].device.type
    if mode == "train":
        options = {"fused": True, "capturable": True} if device == "cuda" else {}
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, **options)
        target = torch.randn_like(inputs["x"])

        def step() -> Tensor:
            optimizer.zero_grad()
            with kernels(implementation):
                loss = (_velocity(net, inputs) - target).square().mean()
                loss.backward()
            optimizer.step()
            return loss.detach()

        return step

    double = {
        name: torch.cat((value, without))
        for (name, value), without in zip(
            inputs.items(), model.unconditional(inputs).values(), strict=True
        )
    }
    times = torch.linspace(1000, 1000 / model.steps, model.steps, device=device)

    def generate() -> Tensor:
        x = inputs["x"]
        with torch.no_grad(), kernels(implementation):
            for t in times:
                here = {**double, "x": torch.cat((x, x)), "t": t.expand(2 * len(x))}
                guided, free = net(**here)[:, : x.shape[1]].chunk(2)
                x = x - (free + GUIDANCE * (guided - free)) / model.steps
        return x

    return generate


def _velocity(net: nn.Module, inputs: Inputs) -> Tensor:
    """As a training loop calls a model whose weights are float32; without a learned variance."""
    x = inputs["x"]
    with torch.autocast(x.device.type, torch.bfloat16):
        return net(**inputs)[:, : x.shape[1]].float()


def accuracy(
    model: Model, mode: str, implementation: Implementation, device: str
) -> list[testing.Accuracy]:
    """The accuracy rule on two blocks and few tokens; in training also of the gradient of the input."""
    net = prepared(model, mode, implementation, device, small=True)
    plain = prepared(model, mode, IMPLEMENTATIONS[0], device, small=True)
    exact = copy.deepcopy(plain).double()
    dtype = torch.float32 if mode == "train" else torch.bfloat16
    inputs = model.inputs(2, device, dtype, small=True)

    def outputs(net: nn.Module, how: Implementation, *, oracle: bool = False) -> list[Tensor]:
        given = {
            name: value.double() if oracle and value.is_floating_point() else value
            for name, value in inputs.items()
        }
        if mode != "train":
            with torch.no_grad(), kernels(how):
                return [net(**given)]
        given["x"] = given["x"].clone().requires_grad_()
        # labels are dropped at random in training, in the same places in each run
        torch.manual_seed(0)
        with kernels(how):
            out = net(**given)[:, : given["x"].shape[1]] if oracle else _velocity(net, given)
            return [out.detach(), *torch.autograd.grad(out.square().mean(), given["x"])]

    reference = Implementation("reference", ours=True)
    with backends.use_backend("reference"):
        oracle = outputs(exact, reference, oracle=True)
    eager, got = outputs(plain, IMPLEMENTATIONS[0]), outputs(net, implementation)
    return [
        testing.Accuracy(name, testing.error(a, o), testing.allowed(e, o, torch.bfloat16))
        for name, a, e, o in zip(("output", "dx"), got, eager, oracle, strict=False)
    ]


def filling_batch(seconds: Callable[[int], float], first: int = 1, most: int = 4096) -> int:
    """The batch from which doubling gains less than 3%, or the last that memory allows.

    Raises:
        torch.OutOfMemoryError: not even the first fits.
    """
    best, rate = 0, 0.0
    batch = first
    while batch <= most:
        try:
            new = batch / seconds(batch)
        except torch.OutOfMemoryError:
            if not best:
                raise
            break
        if new < 1.03 * rate:
            break
        best, rate = batch, new
        batch *= 2
    return best


@dataclass(frozen=True)
class Task:
    """One row to be: a model in a mode, at batch 1 or at the batch that fills the machine."""

    model: Model
    mode: str
    measure: str
    implementation: Implementation


def tasks(device: str, names: Sequence[str], modes: Sequence[str]) -> list[Task]:
    """What tells most comes first: a run may be cut off."""
    order = (
        ("forward", "latency"), ("train", "throughput"), ("generate", "latency"),
        ("forward", "throughput"), ("generate", "throughput"), ("train", "latency"),
    )  # fmt: skip
    found = []
    for mode, measure in order:
        for model in MODELS[device]:
            if mode not in modes or (names and model.name not in names):
                continue
            for implementation in IMPLEMENTATIONS:
                if model.name == "U-Net" and implementation.ours:
                    continue
                found.append(Task(model, mode, measure, implementation))
    return found


def run(
    wanted: Sequence[Task],
    device: str,
    seconds: float = float("inf"),
    done: frozenset[tuple[str, ...]] = frozenset(),
) -> Iterator[Row]:
    """As `bench.run`."""
    end = time.monotonic() + seconds
    accurate: dict[tuple[str, bool, str], bool | None] = {}
    left = [task for task in wanted if task_key(_row(task)) not in done]
    for i, task in enumerate(left):
        if time.monotonic() + NEEDED[task.implementation.compiled] > end:
            yield {"unfinished": len(left) - i}
            return
        if reason := _missing(task, device):
            yield {**_row(task), "absent": reason}
            continue
        rows = functools.partial(_checked_and_measured, task, device, accurate)
        yield from attempted(_row(task), rows, device, PATIENCE)
        if lost(device):
            yield {"unfinished": len(left) - i - 1, "begun": {}}
            return


def _missing(task: Task, device: str) -> str | None:
    if device == "cpu" and task.implementation.attention:
        return "needs a GPU"
    if device == "cpu" and task.model.name == "U-Net" and task.implementation.compiled:
        return "a whole U-Net compiles for minutes on a CPU"
    return task.model.missing()


def _row(task: Task) -> Row:
    return {
        "model": task.model.name, "mode": task.mode, "measure": task.measure,
        "implementation": task.implementation.name,
        "dtype": "bfloat16 autocast" if task.mode == "train" else "bfloat16",
    }  # fmt: skip


def _checked_and_measured(
    task: Task, device: str, accurate: dict[tuple[str, bool, str], bool | None]
) -> Iterator[Row]:
    name = (task.model.name, task.mode == "train", task.implementation.name)
    if name not in accurate:
        accurate[name] = _is_accurate(task, device)
    yield {**_row(task), **_measured(task, device, accurate[name])}


def _is_accurate(task: Task, device: str) -> bool | None:
    """None where there is nothing to compare with.

    Raises:
        AssertionError: ours is not.
    """
    if task.model.name == "U-Net":  # no op of ours in it, and no oracle
        return None
    # a generation is its forwards; the rest of it is the same for all
    mode = "train" if task.mode == "train" else "forward"
    wrong = [a for a in accuracy(task.model, mode, task.implementation, device) if not a.ok]
    if wrong and task.implementation.ours:
        raise AssertionError(
            f"{wrong[0].tensor} is off by {wrong[0].error:.2e}, allowed {wrong[0].allowed:.2e}"
        )
    return not wrong


def _measured(task: Task, device: str, accurate: bool | None) -> Row:
    model, mode, implementation = task.model, task.mode, task.implementation
    batch = 1
    if task.measure == "throughput":
        batch = _filling_batch(model, mode, implementation, device)
    net = prepared(model, mode, implementation, device)
    dtype = torch.float32 if mode == "train" else torch.bfloat16
    while True:
        try:
            once = call(model, mode, net, model.inputs(batch, device, dtype), implementation)
            once()
            break
        except torch.OutOfMemoryError:  # compiled, it may need more than the search found
            if batch == 1:
                raise
            batch //= 2
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    least = 3 if mode == "generate" else 7
    timing = timed([once], device, graph=implementation.graph, seconds=2.0, least=least)
    total = flops(model, mode) * batch
    return {
        "accurate": accurate, "batch": batch, **timing.columns, "per_second": batch / timing.median,
        "flops": total, "tflops": total / timing.median / 1e12,
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
    }  # fmt: skip


def _filling_batch(model: Model, mode: str, implementation: Implementation, device: str) -> int:
    """Searched without compiling, which would take a compilation a batch; a generation is its forwards."""
    if device == "cpu":
        return 4  # a CPU is full at once
    plain = Implementation(implementation.name, ours=implementation.ours)
    mode = "forward" if mode == "generate" else mode
    net = prepared(model, mode, plain, device)
    dtype = torch.float32 if mode == "train" else torch.bfloat16

    def seconds(batch: int) -> float:
        once = call(model, mode, net, model.inputs(batch, device, dtype), plain)
        return timed([once], device, graph=False, seconds=0.0, least=2).median

    return filling_batch(seconds, first=8 if len(model.size) == 3 else 1)


def describe(row: Row, ceilings: dict[str, float]) -> str:
    name = f"{row['model']:12} {row['mode']:8} {row['measure']:10} {row['implementation']:18}"
    if "absent" in row:
        return f"{name} absent: {row['absent']}"
    if "failed" in row:
        return f"{name} FAILED: {row['failed']}"
    marks = "  INACCURATE" if row["accurate"] is False else ""
    return (
        f"{name} batch {row['batch']:4} {row['ms']:10.2f} ms {row['per_second']:9.1f} a second"
        f"  {utilisation(row, ceilings):5.1f}% of the matrix product's rate{marks}"
    )


def utilisation(row: Row, ceilings: dict[str, float]) -> float:
    """Model FLOP utilisation in percent, against the ceiling measured in the same run."""
    return 100 * row["tflops"] / ceilings["matmul_tflops"]


def main(arguments: Sequence[str] | None = None) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = [model.name for model in MODELS[device]]
    parser = Parser(
        "dit-kernels bench models", description="Time whole models: forward, training, generation."
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help="of " + ", ".join(names))
    parser.add_argument("--mode", action="append", choices=MODES, help="all by default")
    add_run_options(parser)
    parser.add_argument("--name", default="models", help="of the JSON file")
    given = parser.parse_args(arguments)
    unknown = [name for name in given.models if name not in names]
    if unknown:
        given_on = "GPU" if device == "cuda" else "CPU"
        print(
            f"dit-kernels bench models: no model {unknown[0]!r} on a {given_on}; there are {', '.join(names)}",
            file=sys.stderr,
        )
        return 2
    end = time.monotonic() + given.seconds
    wanted = tasks(device, given.models, given.mode or MODES)
    try:
        path = result_file(given.out, given.name, device, resume=given.resume)
    except (OSError, ValueError) as error:
        print(f"dit-kernels bench models: {error}", file=sys.stderr)
        return 2
    result, done = opened(path, device, resume=given.resume)
    rows = run(wanted, device, end - time.monotonic(), done)
    code = write_rows(path, result, rows, describe)
    closing(result, path)
    return code


if __name__ == "__main__":
    sys.exit(main())
