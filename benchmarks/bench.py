"""Run cases x shapes x implementations: accuracy first, then time; one JSON file a run.

    python -m benchmarks.bench [op or case ...] [--quick] [--shape NAME] [--sweep NAME] [--out DIR]
    python -m benchmarks.bench models [--help]
    python -m benchmarks.bench --compare A.json B.json

`dit-kernels bench` is the same. The file is written row by row and says what is being measured, so that a run
that crashes, hangs or is killed loses one measurement: `--resume` goes on with the next.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import functools
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.accuracy import compared, compared_rows, reach
from benchmarks.baselines import Baseline, Outputs, baselines
from benchmarks.cases import CASES, Arguments, Case, cases_for
from benchmarks.shapes import CPU, CPU_QUICK, QUICK, SHAPES, SWEEPS, Shape, swept
from benchmarks.timing import on_capture_stream, sets_for, timed
from dit_kernels import backends, testing

Row = dict[str, Any]
OURS = ("triton", "cuda", "reference", "ours")
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


def attempted(
    row: Row, measured: Callable[[], Iterator[Row]], device: str, patience: float
) -> Iterator[Row]:
    """The measured rows, or one that says why there are none."""
    yield {"begun": row}
    try:
        with ended_after(patience, device):
            yield from measured()
    except torch.OutOfMemoryError:
        yield {**row, "absent": "out of memory"}
    except Exception as error:  # Triton's own are none of Python's narrower kinds
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        yield {**row, "failed": f"{type(error).__name__}: {reason}"}
    finally:
        with contextlib.suppress(RuntimeError):
            if device == "cuda":
                torch.cuda.empty_cache()


@contextlib.contextmanager
def ended_after(seconds: float, device: str) -> Iterator[None]:
    """Inside, a kernel that never ends ends the process, which nothing else can; it says where it was."""
    if device == "cuda":
        faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def lost(device: str) -> bool:
    """Whether a kernel's error has ended the GPU's context: every later call would fail with it."""
    try:
        if device == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


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


def compare(old: Path, new: Path) -> list[str]:
    """What moved by more than the spread of both runs, largest change first; other machines are named."""
    runs = [json.loads(path.read_text()) for path in (old, new)]
    before, after = ({row_key(r): r for r in run["rows"] if "ms" in r} for run in runs)
    both = before.keys() & after.keys()
    lines = []
    for key in both:
        a, b = before[key], after[key]
        # another batch may fill the machine now: then a sample's time counts
        sizes = [row.get("batch", 1) for row in (a, b)]
        other = sizes[0] != sizes[1]
        per = sizes if other else [1, 1]
        was, now = (row["ms"] / n for row, n in zip((a, b), per, strict=True))
        quartiles = [[q / n for q in r["ms_quartiles"]] for r, n in zip((a, b), per, strict=True)]
        if abs(now - was) > max(q[2] - q[0] for q in quartiles):
            change = 100 * (now / was - 1)
            unit = f"ms a sample, batch {sizes[0]} -> {sizes[1]}," if other else "ms"
            line = f"{change:+6.1f}%  {was:.4f} -> {now:.4f} {unit}  {' '.join(key)}"
            lines.append((-abs(change), line))
    if both and not lines:
        lines.append(
            (0.0, f"none of {len(both)} measured in both moved by more than the runs' spread")
        )
    reasons = {
        task_key(row): row.get("failed") or row["absent"]
        for row in runs[1]["rows"]
        if "ms" not in row
    }
    gone = {key for key in before.keys() - both if task_key(before[key]) in reasons}
    lines += [(1.0, f"   gone  {' '.join(k)}: {reasons[task_key(before[k])]}") for k in gone]
    alone = [(old, len(before.keys() - both - gone)), (new, len(after.keys() - both))]
    lines += [(2.0, f"not compared: {n} measured in {path} only") for path, n in alone if n]
    head = []
    for name in ("device", "torch", "triton", "driver"):
        a, b = (run.get("machine", {}).get(name) for run in runs)
        if a != b:
            head.append(f"{name}: {a} -> {b}")
    return head + [line for _, line in sorted(lines)]


def _no_run(path: Path) -> str | None:
    if not path.is_file():
        return "is no file"
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        return f"is not JSON: {error}"
    if not isinstance(content, dict) or not {"machine", "rows"} <= content.keys():
        return "is not of a benchmark: it has no rows, or no machine"
    return None


def task_key(row: Row) -> tuple[str, ...]:
    """What is measured at a time; rows of ops and of models."""
    keys = ("case", "model", "mode", "measure", "shape", "implementation", "dtype")
    return tuple(str(row[key]) for key in keys if key in row)


def row_key(row: Row) -> tuple[str, ...]:
    """What one number is of."""
    return (*task_key(row), *([row["direction"]] if "direction" in row else []))


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
            if reason := _no_run(path):
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


class Parser(argparse.ArgumentParser):
    """One that says what is wrong in a line, as the other commands do."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if float(text) >= 0:
            return float(text)
    raise argparse.ArgumentTypeError(f"must be a number of at least 0; got {text!r}")


def add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path,
        help="folder of the JSON; the repository's benchmarks/results/<gpu>, on a CPU runs/bench here",
    )  # fmt: skip
    parser.add_argument(
        "--seconds", type=_seconds, default=float("inf"), help="begin nothing new after so many"
    )
    parser.add_argument(
        "--resume", action="store_true", help="keep what the file has; measure what is missing"
    )


def opened(path: Path, device: str, *, resume: bool) -> tuple[Row, frozenset[tuple[str, ...]]]:
    """A result to be filled, with what in it need not be measured again."""
    print(f"results go to {path}", flush=True)
    described = machine.describe(device)
    if resume and path.is_file():
        result = json.loads(path.read_text())
        if result["machine"]["device"] == described["device"]:
            if cut_off := result.pop("begun", None):
                reason = "the process ended meanwhile: it crashed, hung or was killed"
                result["rows"].append({**cut_off, "failed": reason})
            result.pop("unfinished", None)
            commits = result["machine"]["commit"].split(", ")
            if described["commit"] not in commits:
                result["machine"]["commit"] = ", ".join([*commits, described["commit"]])
            return result, frozenset(task_key(row) for row in result["rows"])
    result = {"machine": described, "ceilings": machine.ceilings(device), "rows": []}
    print(json.dumps({**described, **result["ceilings"]}, indent=1), flush=True)
    return result, frozenset()


def default_shapes(device: str, quick: bool) -> tuple[str, ...]:
    if device == "cpu":
        return CPU_QUICK if quick else CPU
    return QUICK if quick else tuple(name for name in SHAPES if name not in CPU)


def result_file(folder: Path | None, name: str, device: str, *, resume: bool) -> Path:
    """Where the run is written, its folder made.

    Raises:
        OSError: there is none to be made.
        ValueError: what is to be resumed is no run.
    """
    folder = folder or machine.results(device)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    if resume and path.exists() and (reason := _no_run(path)):
        raise ValueError(f"{path} {reason}, so it can't be resumed")
    return path


def write_rows(
    path: Path, result: Row, rows: Iterator[Row], line: Callable[[Row, dict[str, float]], str]
) -> int:
    """Write and print the rows as they come; 1 where one of ours failed, 130 where it was interrupted."""
    try:
        for row in rows:
            if "unfinished" in row:
                result |= row
                lost = "begun" in row
                why = "the GPU's context is lost; --resume goes on" if lost else "out of time"
                print(f"{why}: {row['unfinished']} not begun", flush=True)
            elif "begun" in row:
                result |= row
            else:
                result["rows"].append(row)
                print(line(row, result["ceilings"]), flush=True)
            save(path, result)  # as it goes: a run may be cut off
    except KeyboardInterrupt:
        print("interrupted; --resume goes on", flush=True)
        return 130
    if result.get("begun"):
        del result["begun"]
        save(path, result)
    return int(any(row["implementation"].startswith(OURS) for row in _failed(result)))


def _failed(result: Row) -> list[Row]:
    return [row for row in result["rows"] if "failed" in row]


def closing(result: Row, path: Path) -> None:
    """The same tables as in the report, then how to have its plots, and how many rows there are."""
    from benchmarks import report

    device = "\n".join(report.heading(result["machine"]))
    print(
        f"\n{device}\n{report.section(result)}\nTables and plots: python -m benchmarks.report {path.parent}"
    )
    failed = _failed(result)
    ours = sum(row["implementation"].startswith(OURS) for row in failed)
    left = f", {result['unfinished']} not begun" if result.get("unfinished") else ""
    print(f"{len(result['rows'])} rows, {len(failed)} failed, {ours} of them ours{left}: {path}")


def save(path: Path, result: Row) -> None:
    """Whole or not at all, also when the run is killed meanwhile; a line a row."""
    head = {name: value for name, value in result.items() if name != "rows"}
    rows = ",\n".join(map(json.dumps, result["rows"]))
    part = path.with_suffix(".part")
    part.write_text(f'{json.dumps(head)[:-1]}, "rows": [\n{rows}\n]}}\n')
    part.replace(path)


def _host_cost(wanted: Collection[str]) -> dict[str, float]:
    """Microseconds of Python a call of each of these cases costs, launch excluded; no GPU is needed."""
    if importlib.util.find_spec("triton") is None:
        return {}
    from benchmarks import host_cost

    return dict(host_cost.costs(wanted))


if __name__ == "__main__":
    sys.exit(main())
