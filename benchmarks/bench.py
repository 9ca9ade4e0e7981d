"""Run cases x shapes x implementations: accuracy first, then time; one JSON file a run.

    python -m benchmarks.bench [op or case ...] [--quick] [--shape NAME] [--out DIR]
    python -m benchmarks.bench --compare A.json B.json

`dit-kernels bench` is the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.baselines import Baseline, Outputs, baselines
from benchmarks.cases import Arguments, Case, cases_for
from benchmarks.shapes import CPU, QUICK, SHAPES, Shape
from benchmarks.timing import on_capture_stream, sets_for, timed
from dit_kernels import testing

Row = dict[str, Any]
OURS = ("triton", "cuda", "reference")


def run(
    device: str, wanted: Sequence[str], shapes: Sequence[str], dtype: torch.dtype
) -> Iterator[Row]:
    for shape_name in shapes:
        shape = SHAPES[shape_name]
        for case in cases_for(shape, tuple(wanted)):
            costs = case.cost(shape, dtype)
            for baseline in baselines(device):
                if not baseline.applies(case):
                    continue
                row = {
                    "case": case.name, "op": case.op, "shape": shape_name, "implementation": baseline.name,
                    "dtype": str(dtype).removeprefix("torch."),
                }  # fmt: skip
                try:
                    yield from _measured(case, shape, baseline, dtype, device, row, costs)
                except torch.OutOfMemoryError:
                    yield {**row, "absent": "out of memory"}
                except Exception as error:  # Triton's own are none of Python's narrower kinds
                    reason = (str(error).strip().splitlines() or ["no message"])[0]
                    yield {**row, "failed": f"{type(error).__name__}: {reason}"}
                finally:
                    if device == "cuda":
                        torch.cuda.empty_cache()


def _measured(
    case: Case, shape: Shape, baseline: Baseline, dtype: torch.dtype, device: str, row: Row,
    costs: dict[str, tuple[int, int]],
) -> Iterator[Row]:  # fmt: skip
    small = case.arguments(shape.small(), dtype, device, 0)
    reason = baseline.missing(case, small) or baseline.missing(
        case, case.arguments(shape, dtype, device, 0)
    )
    if reason:
        yield {**row, "absent": reason}
        return
    accuracy = _accuracy(case, small, baseline)
    wrong = [a for a in accuracy if not a.ok]
    if wrong and baseline.name in OURS:
        raise AssertionError(
            f"{wrong[0].tensor} is off by {wrong[0].error:.2e}, allowed {wrong[0].allowed:.2e}"
        )
    row = {**row, "accurate": not wrong}
    call = baseline.call(case, case.arguments(shape, dtype, device, 0))
    size = costs["forward"][1]
    inputs = [case.arguments(shape, dtype, device, seed) for seed in range(sets_for(size, device))]
    for direction in ("forward", "backward"):
        peak = _peak(call, inputs[0], direction) if device == "cuda" else None
        samples = timed(_calls(call, inputs, direction, device), device)
        flops, moved = costs[direction]
        middle = statistics.median(samples)
        quarters = statistics.quantiles(samples, n=4)
        yield {
            **row, "direction": direction, "ms": 1e3 * middle, "ms_quartiles": [1e3 * q for q in quarters],
            "flops": flops, "bytes": moved, "gbps": moved / middle / 1e9,
            "tflops": flops / middle / 1e12, "peak_bytes": peak,
        }  # fmt: skip


def _accuracy(case: Case, small: Arguments, baseline: Baseline) -> list[testing.Accuracy]:
    """The rule on the small form of the shape, forward and backward."""
    function = case.function
    oracle = testing.run(
        function, testing.converted(small, torch.float64), backend="reference"
    ).all()
    with testing.plain_torch():
        eager = testing.run(function, small).all()
    got = testing.run(baseline.call(case, small), small).all()
    return [
        testing.Accuracy(n, testing.error(got[n], oracle[n]), testing.allowed(eager[n], oracle[n]))
        for n in oracle
    ]


def _peak(call: Callable[..., Outputs], arguments: Arguments, direction: str) -> int:
    """Bytes that one call holds at most beyond its inputs; a backward's include its forward's."""
    peak = 0
    for _ in range(2):  # the first may compile and tune
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        (once,) = _calls(call, [arguments], direction, "cuda")
        once()
        peak = torch.cuda.max_memory_allocated() - held
        del once
    return peak


def _calls(
    call: Callable[..., Outputs], inputs: list[Arguments], direction: str, device: str
) -> list[Callable[[], object]]:
    if direction == "forward":

        def forward(arguments: Arguments) -> Callable[[], object]:
            def once() -> None:
                with torch.no_grad():
                    call(**arguments)

            return once

        return [forward(arguments) for arguments in inputs]

    def backward(arguments: Arguments) -> Callable[[], object]:
        leaves = {
            n: v.detach().requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v
            for n, v in arguments.items()
            if n not in ("cos", "sin")
        }
        fixed = {n: arguments[n] for n in ("cos", "sin") if n in arguments}
        wanted = [v for v in leaves.values() if isinstance(v, Tensor) and v.requires_grad]
        with on_capture_stream(device):
            outputs = call(**leaves, **fixed)
            outputs = tuple(
                o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if o is not None
            )
            grads = [torch.randn_like(o) for o in outputs]
        return lambda: torch.autograd.grad(outputs, wanted, grads, retain_graph=True)

    return [backward(arguments) for arguments in inputs]


def compare(old: Path, new: Path) -> list[str]:
    """What moved by more than the spread of both runs: a line each."""

    def rows(path: Path) -> dict[tuple[str, ...], Row]:
        keys = ("case", "shape", "implementation", "direction", "dtype")
        return {
            tuple(r[k] for k in keys): r for r in json.loads(path.read_text())["rows"] if "ms" in r
        }

    before, after = rows(old), rows(new)
    lines = []
    for key in before.keys() & after.keys():
        a, b = before[key], after[key]
        spread = max(r["ms_quartiles"][2] - r["ms_quartiles"][0] for r in (a, b))
        if abs(b["ms"] - a["ms"]) > spread:
            change = 100 * (b["ms"] / a["ms"] - 1)
            lines.append(f"{change:+6.1f}%  {a['ms']:.4f} -> {b['ms']:.4f} ms  {' '.join(key)}")
    return sorted(lines)


def describe(row: Row, ceilings: dict[str, float]) -> str:
    name = f"{row['case']:20} {row['shape']:14} {row['implementation']:12}"
    if "absent" in row:
        return f"{name} absent: {row['absent']}"
    if "failed" in row:
        return f"{name} FAILED: {row['failed']}"
    return f"{name} {row['direction']:8} {row['ms']:10.4f} ms  {share(row, ceilings)}"


def share(row: Row, ceilings: dict[str, float]) -> str:
    """Of the ceiling that binds: the larger of the two floors."""
    copy = row["bytes"] / (ceilings["copy_gbps"] * 1e9)
    product = row["flops"] / (ceilings["matmul_tflops"] * 1e12)
    percent = 100 * max(copy, product) / (row["ms"] / 1e3)
    rate = f"{row['tflops']:7.1f} TFLOP/s" if product > copy else f"{row['gbps']:7.0f} GB/s   "
    return f"{rate} {percent:5.1f}% of the ceiling"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("dit-kernels bench", description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", help="ops or cases; all by default")
    parser.add_argument("--quick", action="store_true", help="few shapes")
    parser.add_argument(
        "--shape", action="append", choices=SHAPES, help="this shape; may be repeated"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--out", type=Path, help="folder of the JSON; benchmarks/results/<device>")
    parser.add_argument("--name", default="ops", help="of the JSON file")
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar=("A", "B"), help="what moved from A to B"
    )
    given = parser.parse_args(arguments)
    if given.compare:
        missing = [path for path in given.compare if not path.is_file()]
        if missing:
            print(f"dit-kernels bench: no such file: {missing[0]}", file=sys.stderr)
            return 2
        print("\n".join(compare(*given.compare)) or "nothing moved by more than the runs' spread")
        return 0
    known = {c.name for s in SHAPES.values() for c in cases_for(s)} | {
        c.op for s in SHAPES.values() for c in cases_for(s)
    }
    unknown = [name for name in given.cases if name not in known]
    if unknown:
        names = ", ".join(sorted(known))
        print(f"dit-kernels bench: no case {unknown[0]!r}; there are {names}", file=sys.stderr)
        return 2
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = given.shape or (CPU if device == "cpu" else QUICK if given.quick else tuple(SHAPES))
    out = given.out or machine.ROOT / "benchmarks" / "results" / machine.folder(device)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{given.name}.json"
    result: dict[str, Any] = {
        "machine": machine.describe(device), "ceilings": machine.ceilings(device), "rows": []
    }  # fmt: skip
    print(json.dumps({**result["machine"], **result["ceilings"]}, indent=1))
    for row in run(device, given.cases, shapes, getattr(torch, given.dtype)):
        result["rows"].append(row)
        print(describe(row, result["ceilings"]), flush=True)
        path.write_text(json.dumps(result, indent=1))  # as it goes: a run may be cut off
    failed = sum("failed" in row for row in result["rows"])
    print(f"{len(result['rows'])} rows, {failed} failed: {path}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
