"""Run cases x shapes x implementations: accuracy first, then time; one JSON file a run.

    python -m benchmarks.bench [op or case ...] [--quick] [--shape NAME] [--sweep NAME] [--out DIR]
    python -m benchmarks.bench models [--help]
    python -m benchmarks.bench --compare A.json B.json

`dit-kernels bench` is the same. The file is written row by row and says what is being measured, so that a run
that crashes, hangs or is killed loses one measurement: `--resume` goes on with the next.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.accuracy import compared, compared_rows, reach
from benchmarks.baselines import Baseline, Outputs, baselines
from benchmarks.cases import CASES, Arguments, Case, cases_for
from benchmarks.guarded import attempted, lost
from benchmarks.record import (
    OURS,
    Parser,
    Row,
    add_run_options,
    closing,
    compare,
    no_run,
    opened,
    result_file,
    save,
    task_key,
    write_rows,
)
from benchmarks.shapes import CPU, CPU_QUICK, QUICK, SHAPES, SWEEPS, Shape, swept
from benchmarks.timing import on_capture_stream, sets_for, timed
from dit_kernels import backends, testing

DIRECTIONS = ("forward", "backward", "both")
# of a sweep's points on a CPU
CPU_TOKENS = 1024
# seconds by a baseline's preparation: with fewer left it is not begun; after so many on a GPU it is given up
NEEDED = (2, 15, 45)
PATIENCE = (60, 150, 300)
HEAVY = 0.05  # seconds of one call at the least: such points come after the others


@dataclass(frozen=True)
class Point:
    """A case at a shape. `tags` go into its rows: the shape's name, and the place in a sweep."""

    case: Case
    shape: Shape
    tags: Row = field(default_factory=dict)


def points(
    wanted: Sequence[str], shapes: Sequence[str], sweeps: Sequence[str], device: str
) -> list[Point]:
    found = [
        Point(case, SHAPES[name], {"shape": name})
        for name in shapes
        for case in cases_for(SHAPES[name], tuple(wanted))
    ]
    most = CPU_TOKENS if device == "cpu" else 1 << 30
    for sweep, x, shape in swept(tuple(sweeps), most):
        tags = {"shape": f"{sweep} {x:g}", "sweep": sweep, "x": x}
        for case in cases_for(shape, tuple(wanted)):
            if case.name in SWEEPS[sweep].cases:
                found.append(Point(case, shape, tags))
    return found


def run(
    device: str,
    wanted: Sequence[Point],
    dtype: torch.dtype,
    seconds: float = float("inf"),
    done: frozenset[tuple[str, ...]] = frozenset(),
) -> Iterator[Row]:
    """A row a point, implementation and direction; before those of a pair {"begun": what they are of}.

    After `seconds` nothing new is begun; then the last row is {"unfinished": how many are missing}.
    """
    end = time.monotonic() + seconds
    pairs = [
        (point, baseline)
        for point in wanted
        for baseline in baselines(device)
        if baseline.applies(point.case)
    ]
    heavy = {id(point): _heavy(point, dtype) for point in wanted}
    pairs.sort(key=lambda pair: (pair[1].preparation, heavy[id(pair[0])]))
    rows = [
        {
            "case": point.case.name, "op": point.case.op, **point.tags,
            "implementation": baseline.name, "dtype": str(dtype).removeprefix("torch."),
        }
        for point, baseline in pairs
    ]  # fmt: skip
    left = [of for of in zip(pairs, rows, strict=True) if task_key(of[1]) not in done]
    for i, ((point, baseline), row) in enumerate(left):
        if time.monotonic() + NEEDED[baseline.preparation] > end:
            yield {"unfinished": len(left) - i}
            return
        measured = functools.partial(_measured, point, baseline, dtype, device, row)
        yield from attempted(row, measured, device, PATIENCE[baseline.preparation])
        if lost(device):
            yield {"unfinished": len(left) - i - 1, "begun": {}}
            return


def _heavy(point: Point, dtype: torch.dtype) -> bool:
    return point.case.cost(point.shape, dtype)["backward"][0] / 800e12 > HEAVY


def _measured(
    point: Point, baseline: Baseline, dtype: torch.dtype, device: str, row: Row
) -> Iterator[Row]:
    case, shape = point.case, point.shape
    costs = case.cost(shape, dtype)
    costs["both"] = tuple(sum(pair) for pair in zip(*costs.values(), strict=True))
    arguments = case.arguments(shape, dtype, device, 0)
    if reason := baseline.missing(case, arguments):
        yield {**row, "absent": reason}
        return
    differentiable = baseline.has_backward(case)
    call, found, whole = prepared(case, shape, dtype, device, baseline, arguments)
    wrong = [a for a in found if not a.ok]
    if wrong and baseline.name in OURS:
        raise AssertionError(
            f"{wrong[0].tensor} is off by {wrong[0].error:.2e}, allowed {wrong[0].allowed:.2e}"
        )
    row = {**row, "accurate": not wrong, "compared": whole}
    if baseline.name in backends.TABLE[case.op]:
        row["class"] = case.call_class(shape, dtype)._asdict()
    size = costs["forward"][1]
    seeds = range(1, sets_for(size, device))
    inputs = [arguments, *(case.arguments(shape, dtype, device, seed) for seed in seeds)]
    saved = _saved_bytes(call, arguments) if differentiable else None
    for direction in DIRECTIONS if differentiable else ("forward",):
        peak = _peak(call, arguments, direction) if device == "cuda" else None
        timing = timed(calls(call, inputs, direction, device), device)
        flops, moved = costs[direction]
        yield {
            **row, "direction": direction, **timing.columns, "flops": flops, "bytes": moved,
            "gbps": moved / timing.median / 1e9, "tflops": flops / timing.median / 1e12,
            "peak_bytes": peak, "saved_bytes": None if direction == "forward" else saved,
        }  # fmt: skip


def prepared(
    case: Case,
    shape: Shape,
    dtype: torch.dtype,
    device: str,
    baseline: Baseline,
    arguments: Arguments,
) -> tuple[Callable[..., Outputs], list[testing.Accuracy], str]:
    """What is timed, how accurate it is, and of what: "all", "rows" or "small form"."""
    whole = reach(case, shape, device)
    call = baseline.call(case, arguments)
    try:
        if whole == "rows":
            found = compared_rows(arguments, call, backward=baseline.has_backward(case))
            return call, found, whole
        if whole == "all":
            return call, compared(case, arguments, baseline, call), whole
    except torch.OutOfMemoryError:  # the oracle's, on a small card
        torch.cuda.empty_cache()
    small = case.arguments(shape.small(), dtype, device, 0)
    found = compared(case, small, baseline, baseline.call(case, small))
    return baseline.call(case, arguments), found, "small form"


def _peak(call: Callable[..., Outputs], arguments: Arguments, direction: str) -> int:
    """Bytes that one call holds at most beyond its inputs; a backward's include its forward's."""
    peak = 0
    for _ in range(2):  # the first may compile and tune
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        (once,) = calls(call, [arguments], direction, "cuda")
        once()
        peak = torch.cuda.max_memory_allocated() - held
        del once
    return peak


def _saved_bytes(call: Callable[..., Outputs], arguments: Arguments) -> int:
    """What the forward keeps alive for the backward, inputs included, each memory counted once."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    leaves = _leaves(arguments)
    call(**leaves)  # what is compiled, is compiled without the hooks
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call(**leaves)
    return sum(kept.values())


def _leaves(arguments: Arguments) -> Arguments:
    """The same values, with a gradient for each floating tensor but the rotation's tables."""
    return {
        name: value.detach().requires_grad_()
        if isinstance(value, Tensor) and value.is_floating_point() and name not in ("cos", "sin")
        else value
        for name, value in arguments.items()
    }


def calls(
    call: Callable[..., Outputs], inputs: list[Arguments], direction: str, device: str
) -> list[Callable[[], object]]:
    """What is timed, for each set of inputs."""
    if direction == "forward":

        def forward(arguments: Arguments) -> Callable[[], object]:
            def once() -> Outputs:
                with torch.no_grad():
                    return call(**arguments)

            return once

        return [forward(arguments) for arguments in inputs]

    def backward(arguments: Arguments) -> Callable[[], object]:
        leaves = _leaves(arguments)
        wanted = [v for v in leaves.values() if isinstance(v, Tensor) and v.requires_grad]

        def outputs() -> tuple[Tensor, ...]:
            found = call(**leaves)
            found = found if isinstance(found, tuple) else (found,)
            return tuple(out for out in found if out is not None)

        with on_capture_stream(device):
            made = outputs()
            grads = [torch.randn_like(out) for out in made]
        if direction == "backward":
            return lambda: torch.autograd.grad(made, wanted, grads, retain_graph=True)
        return lambda: torch.autograd.grad(outputs(), wanted, grads)

    return [backward(arguments) for arguments in inputs]


def describe(row: Row, ceilings: dict[str, float]) -> str:
    name = f"{row['case']:20} {row['shape']:14} {row['implementation']:12}"
    if "absent" in row:
        return f"{name} absent: {row['absent']}"
    if "failed" in row:
        return f"{name} FAILED: {row['failed']}"
    marks = "" if row["accurate"] else "  INACCURATE"
    if row["timed_by"] == "events":
        marks += "  (no graph)"
    rate, percent = binding(row, ceilings)
    return f"{name} {row['direction']:8} {row['ms']:10.4f} ms {rate:>14} {percent:5.1f}% of the ceiling{marks}"


def binding(row: Row, ceilings: dict[str, float]) -> tuple[str, float]:
    """The rate that binds (the larger of the two floors), and its percent of the ceiling."""
    copy = row["bytes"] / (ceilings["copy_gbps"] * 1e9)
    product = row["flops"] / (ceilings["matmul_tflops"] * 1e12)
    percent = 100 * max(copy, product) / (row["ms"] / 1e3)
    rate, unit = (row["tflops"], "TFLOP/s") if product > copy else (row["gbps"], "GB/s")
    return f"{rounded(rate)} {unit}", percent


def rounded(number: float) -> str:
    """Three digits, and all before the point."""
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] == "models":
        from benchmarks import bench_models

        return bench_models.main(arguments[1:])
    parser = Parser(
        "dit-kernels bench",
        description="Time every op against eager PyTorch, torch.compile and the best outside kernels.",
        epilog="`dit-kernels bench models` times whole models; see `dit-kernels bench models --help`.",
    )
    parser.add_argument("cases", nargs="*", help="ops or cases; all by default")
    parser.add_argument("--quick", action="store_true", help="few shapes")
    parser.add_argument(
        "--shape", action="append", metavar="NAME", choices=SHAPES,
        help="this shape, may be repeated: " + ", ".join(SHAPES),
    )  # fmt: skip
    parser.add_argument(
        "--sweep", action="append", metavar="NAME", choices=(*SWEEPS, "all"), default=[],
        help="vary one size, may be repeated: " + ", ".join(SWEEPS) + ", all; no --shape then means none",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"), help="bfloat16"
    )
    add_run_options(parser)
    parser.add_argument("--name", help="of the JSON file; ops, or sweeps")
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar=("A", "B"), help="what moved from A to B"
    )
    given = parser.parse_args(arguments)
    if given.compare:
        for path in given.compare:
            if reason := no_run(path):
                print(f"dit-kernels bench: {path} {reason}", file=sys.stderr)
                return 2
        print("\n".join(compare(*given.compare)) or "neither has measured anything")
        return 0
    known = {case.name for case in CASES} | {case.op for case in CASES}
    unknown = [name for name in given.cases if name not in known]
    if "models" in unknown:
        print(
            "dit-kernels bench: whole models: `dit-kernels bench models`, then options",
            file=sys.stderr,
        )
        return 2
    if unknown:
        names = ", ".join(sorted(known))
        print(f"dit-kernels bench: no case {unknown[0]!r}; there are {names}", file=sys.stderr)
        return 2
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sweeps = tuple(SWEEPS) if "all" in given.sweep else given.sweep
    shapes = given.shape or (() if sweeps else default_shapes(device, given.quick))
    wanted = points(given.cases, shapes, sweeps, device)
    if not wanted:
        print("dit-kernels bench: none of these cases has one of these shapes", file=sys.stderr)
        return 2
    end = time.monotonic() + given.seconds
    name = given.name or ("sweeps" if sweeps else "ops")
    try:
        path = result_file(given.out, name, device, resume=given.resume)
    except (OSError, ValueError) as error:
        print(f"dit-kernels bench: {error}", file=sys.stderr)
        return 2
    result, done = opened(path, device, resume=given.resume)
    rows = run(device, wanted, getattr(torch, given.dtype), end - time.monotonic(), done)
    code = write_rows(path, result, rows, describe)
    if device == "cpu" and not sweeps and code != 130 and time.monotonic() < end:
        result["host_us"] = _host_cost({point.case.name for point in wanted})
        save(path, result)
    closing(result, path)
    return code


def default_shapes(device: str, quick: bool) -> tuple[str, ...]:
    if device == "cpu":
        return CPU_QUICK if quick else CPU
    return QUICK if quick else tuple(name for name in SHAPES if name not in CPU)


def _host_cost(wanted: Collection[str]) -> dict[str, float]:
    """Microseconds of Python a call of each of these cases costs, launch excluded; no GPU is needed."""
    if importlib.util.find_spec("triton") is None:
        return {}
    from benchmarks import host_cost

    return dict(host_cost.costs(wanted))


if __name__ == "__main__":
    sys.exit(main())
