"""From committed results to pages: nothing in them is typed.

make report        docs/benchmarks.md, its plots, the README's lines on speed, and what the package knows of the
                   GPUs (measured.json, tuned/), from benchmarks/results/<device>/*.json

    python -m benchmarks.report [FOLDER]    the same tables and plots of the runs in a folder, into report.md there
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import fastest, machine, targets
from benchmarks.bench import binding, rounded
from benchmarks.bench_models import utilisation
from benchmarks.cases import CASES
from benchmarks.machine import ROOT
from benchmarks.peers import PEERS
from benchmarks.plots import draw, pictures
from benchmarks.record import Row
from benchmarks.runs import (
    FOLDER,
    OURS,
    Run,
    by_importance,
    grouped,
    of_models,
    on_gpus,
    ours_and_best,
    read_runs,
    runs_in,
)
from benchmarks.shapes import SHAPES, SWEEPS
from dit_kernels import measured

PAGE = ROOT / "docs" / "benchmarks.md"
IMAGES = PAGE.parent / "images"
README = ROOT / "README.md"
MARKS = ("<!-- speed: made by `make report` -->", "<!-- end of speed -->")

INTRODUCTION = """# Benchmarks

Made by `make report` from the files in [benchmarks/results](../benchmarks/results); no figure is typed.

```sh
make gpu                                   # on a machine with a GPU: tests, audit, all benchmarks, in ten minutes
make gpu STAGES="test compile bench-adaln"  # some stages, which then share the ten minutes
make gpu STAGES=models                     # ten minutes don't hold all: whole models and sweeps fill some alone
make peers                                 # wheels of outside kernels for a machine without a network
dit-kernels bench gated_adaln --shape dit-xl-1024 --out DIR
dit-kernels bench --sweep tokens attention
dit-kernels bench models DiT-XL/2 --mode train  # on a GPU; small ones on a CPU
dit-kernels bench --out DIR --resume       # goes on where a run was cut off
dit-kernels bench --compare A.json B.json  # what moved by more than the runs' spread
python -m benchmarks.report DIR            # tables and plots of the runs in a folder
pytest benchmarks                          # the same cases under pytest-benchmark
```

Before a kernel is timed, its outputs and gradients are held against the float64 oracle by the one accuracy
rule, at the shape itself; of attention over long sequences some rows of queries are, with all the gradients
that come from them. One of ours that is off is listed as failed and not timed, another's is marked `*`. Times
are medians over CUDA graph replays, over several sets of inputs that together are larger than the L2 cache; `†`
marks what could not be captured and is timed by events, gaps between launches included. In brackets: how many
times as long as ours. A result's ceilings are of its own run: a large copy (bytes read and written) and a large
bfloat16 matrix product on random data. "Of the ceiling" is the larger of the two floors, least bytes over the
copy's rate and FLOPs over the product's, over the time. "Target" is what that is to be, where the work is large
enough to say. "Saved" is what the forward keeps for the backward, inputs included. Losses are shown. What takes
long to prepare comes last: a run that is out of time has timed ours against eager PyTorch everywhere, then
against torch.compile, then against its max-autotune; it says how much it left out.
"""


def page(runs: dict[str, list[Run]]) -> str:
    parts = [INTRODUCTION]
    if not on_gpus(runs):
        parts.append("**Not measured on a GPU yet.**\n")
    for device, found in runs.items():
        parts += _of_device(device, found)
    parts.append(_contents(runs))
    return "\n".join(parts)


def _of_device(device: str, runs: list[Run]) -> Iterator[str]:
    yield from heading(runs[0]["machine"])
    for title, name in pictures(device, runs):
        yield f"![{title}](images/{name}.png)\n"
    chosen = fastest.table(runs)
    if chosen:
        yield "### Which backend `auto` takes\n"
        yield "The fastest for a class of calls, and how many times as long the other one takes.\n"
        yield "\n".join(_table(["case", "shape", *fastest.DIRECTIONS], chosen))
    for run in runs:
        yield section(run)


def heading(found_on: dict[str, Any]) -> Iterator[str]:
    yield f"## {found_on['device']}\n"
    if machine.short(found_on["device"]) == "cpu":
        yield "A CPU run shows that the suite works, and nothing about the kernels.\n"


def section(run: Run) -> str:
    """The tables of one run."""
    found_on, ceilings = run["machine"], run["ceilings"]
    head = ", ".join(
        f"{name} {found_on[name]}"
        for name in ("driver", "cuda", "torch", "triton", "commit", "date")
        if name in found_on
    )
    rows = run["rows"]
    what = "models" if of_models(run) else ", ".join(sorted({row["op"] for row in rows}))
    if any("sweep" in row for row in rows):
        what = f"sweeps over {', '.join(dict.fromkeys(r['sweep'] for r in rows if 'sweep' in r))}"
    lines = [
        f"### {what}\n",
        f"{head}. Copy {rounded(ceilings['copy_gbps'])} GB/s, matrix product {rounded(ceilings['matmul_tflops'])} TFLOP/s,"
        f" a launch that does nothing {ceilings['launch_us']:.1f} µs, {ceilings['graph_launch_us']:.1f} µs in a graph.\n",
    ]
    if of_models(run):
        lines += _models_table(run)
    else:
        for case in dict.fromkeys(row["case"] for row in rows):
            lines += _case_table(case, [r for r in rows if r["case"] == case], ceilings)
    if "host_us" in run:
        lines += ["Microseconds of Python in a call with the Triton backend, all but the launch:\n"]
        lines += _table(["call", "µs"], [[n, f"{us:.1f}"] for n, us in run["host_us"].items()])
    if "unfinished" in run:
        lines.append(f"Out of time with {run['unfinished']} measurements not begun.\n")
    if cut_off := run.get("begun"):
        lines.append(f"Cut off in {cut_off['implementation']} in {_what(cut_off)}.\n")
    absent: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in rows:
        if "absent" in row:
            absent[row["implementation"], row["absent"]].append(_what(row))
    failed = [f"{r['implementation']} in {_what(r)}: {r['failed']}" for r in rows if "failed" in r]
    asked = collections.Counter(row["implementation"] for row in rows)
    entries = []
    for (name, reason), of in absent.items():
        where = ", ".join(dict.fromkeys(of))
        if len(of) > 3 and len(of) == asked[name]:
            where = f"all {len(of)} times it was asked for"
        entries.append(f"{name}: {reason} ({where})")
    short: list[str] = []
    if not of_models(run):
        aims, short = _targets(rows, ceilings)
        if aims:
            lines.append(f"{aims - len(short)} of {aims} targets reached.\n")
    for title, found in (("Targets missed", short), ("Absent", entries), ("Failed", failed)):
        if found:
            lines += [f"{title}:\n", *(f"- {entry}" for entry in found), ""]
    return "\n".join(lines)


def _what(row: Row) -> str:
    return f"{row['case']} {row['shape']}" if "case" in row else f"{row['model']} {row['mode']}"


def _case_table(case: str, rows: list[Row], ceilings: dict[str, float]) -> list[str]:
    """A line a shape and direction: ours, then the others with how many times as long they take."""
    measured = [row for row in rows if "ms" in row]
    names = sorted({row["implementation"] for row in measured}, key=by_importance)
    if not names:
        return []
    heads = [
        "shape", "direction", "rate", "of the ceiling", "target", "against the best other", "peak, MiB"
    ]  # fmt: skip
    body = []
    for (shape, direction), cells in grouped(measured, "shape", "direction").items():
        ours, best = ours_and_best(cells)
        ratio = f"{best['ms'] / ours['ms']:.2f}x" if ours and best else "-"
        own = ["not measured", "not measured", "-", ratio, "-"]
        if ours:
            rate, percent = binding(ours, ceilings)
            wanted = targets.target(ours)
            aim = f"{wanted.ceiling:.0f}%" if wanted else "-"
            own = [rate, f"{percent:.1f}%", aim, ratio, _mebi(ours["peak_bytes"])]
        times = [_cell(cells.get(name), ours) for name in names]
        body.append([shape, direction, *own, *times])
    text = [f"**{case}**\n", *_table([*heads, *(f"{name}, ms" for name in names)], body)]
    for title, key, direction in (
        ("Most memory of a forward and backward beyond the inputs", "peak_bytes", "both"),
        ("Saved for the backward", "saved_bytes", "backward"),
    ):
        found = _by_implementation([r for r in measured if r["direction"] == direction], key)
        if found:
            text.append(f"{title}, MiB. {'; '.join(found)}.\n")
    return text


def _targets(rows: list[Row], ceilings: dict[str, float]) -> tuple[int, list[str]]:
    """How many rows of ours have a target, and a line for each that misses it."""
    aims, short = 0, []
    timed = [row for row in rows if "ms" in row]
    for (case, shape, direction), cells in grouped(timed, "case", "shape", "direction").items():
        ours, _ = ours_and_best(cells)
        if ours and targets.target(ours):
            aims += 1
            if words := targets.missed(cells, ours, ceilings):
                what = f"{ours['implementation']} in {case} {shape} {direction}"
                short.append(f"{what}: {'; '.join(words)}")
    return aims, short


def _by_implementation(rows: list[Row], key: str) -> list[str]:
    found = []
    for (shape,), cells in grouped([row for row in rows if row[key] is not None], "shape").items():
        sizes = (f"{name} {_mebi(cells[name][key])}" for name in sorted(cells, key=by_importance))
        found.append(f"{shape}: {', '.join(sizes)}")
    return found


def _cell(row: Row | None, ours: Row | None) -> str:
    if row is None:
        return "-"
    marks = ("" if row["accurate"] else "*") + ("†" if row["timed_by"] == "events" else "")
    beside = f" ({row['ms'] / ours['ms']:.2f}x)" if ours and row is not ours else ""
    return f"{row['ms']:.4f}{marks}{beside}"


def _mebi(size: int | None) -> str:
    return "-" if size is None else rounded(size / 2**20)


def _models_table(run: Run) -> list[str]:
    heads = ["model", "what", "implementation", "batch", "ms", "a second", "against eager",
             "FLOP utilisation", "peak, GiB"]  # fmt: skip
    body = []
    measured = [row for row in run["rows"] if "ms" in row]
    for (model, mode, measure), cells in grouped(measured, "model", "mode", "measure").items():
        for name, row in cells.items():
            ratio = "-"
            if "eager" in cells:
                ratio = f"{row['per_second'] / cells['eager']['per_second']:.2f}x"
            marks = "*" if row["accurate"] is False else ""
            if name.endswith("-graph") and row["timed_by"] == "events":
                marks += "†"
            peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.1f}"
            body.append([
                model, f"{mode}, {measure}", name, str(row["batch"]), f"{row['ms']:.2f}{marks}",
                f"{row['per_second']:.2f}", ratio, f"{utilisation(row, run['ceilings']):.1f}%", peak,
            ])  # fmt: skip
    note = (
        "Latency at batch 1; throughput at the batch that fills the machine, from which doubling it gains less"
        " than 3% or does not fit. Only `ours-compile-graph` is replayed from a CUDA graph. Utilisation is of the"
        " FLOPs of the model's matrix products against the ceiling. A generation is of latents. The U-Net is diffusers', as wide as makes its FLOPs those of the DiT"
        " for images beside it.\n"
    )
    return [note, *_table(heads, body)]


def _table(heads: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """Columns of numbers are aligned to the right."""
    columns = zip(*body, strict=True) if body else ((),) * len(heads)
    numbers = [
        any(cell[:1].isdigit() for cell in cells)
        and all(cell[:1].isdigit() or cell in ("-", "not measured") for cell in cells)
        for cells in columns
    ]
    rule = "|" + "|".join("---:" if number else "---" for number in numbers) + "|"
    return [f"| {' | '.join(heads)} |", rule, *(f"| {' | '.join(line)} |" for line in body), ""]


def _contents(runs: dict[str, list[Run]]) -> str:
    """What there is to measure: cases, shapes, sweeps and outside kernels."""
    seen = {
        row["case"]
        for found in on_gpus(runs).values()
        for run in found
        for row in run["rows"]
        if row["implementation"] in OURS and "ms" in row
    } if on_gpus(runs) else set()  # fmt: skip
    lines = ["## What is measured\n"]
    body = []
    for case in CASES:
        outside = [peer.package for peer in PEERS if case.name in peer.adapters]
        state = "measured" if case.name in seen else "not measured"
        body.append([f"`{case.name}`", f"`ops.{case.function}`", ", ".join(outside) or "-", state])
    lines += _table(["case", "function", "outside kernels", "on a GPU"], body)
    lines.append(
        "Every case also has eager PyTorch and torch.compile (default and max-autotune); attention torch's own"
        " kernels by name (cuDNN, flash, FlexAttention with the same window, packed).\n"
    )
    heads = ["target for", "direction", "work", "of the ceiling", "times as long as ours"]
    lines += _table(heads, [
        [", ".join(t.cases), t.direction, t.when, f"{t.ceiling:.0f}%",
         ", ".join(f"{name} {lead:g}" for name, lead in t.lead.items())]
        for t in targets.TARGETS
    ])  # fmt: skip
    heads = ["shape", "batch", "grid", "text tokens", "channels", "heads x head dim", "window"]
    lines += _table(heads, [
        [name, str(s.batch), " x ".join(map(str, s.grid)), str(s.text), str(s.channels),
         f"{s.heads} x {s.head_dim}", " x ".join(map(str, s.window)) if s.window else "-"]
        for name, s in SHAPES.items()
    ])  # fmt: skip
    heads = ["sweep", "over", "from", "to", "cases"]
    lines += _table(heads, [
        [name, sweep.axis, f"{min(sweep.points):g}", f"{max(sweep.points):g}", ", ".join(sweep.cases)]
        for name, sweep in SWEEPS.items()
    ])  # fmt: skip
    return "\n".join(lines)


def tuned() -> dict[Path, str]:
    """Where the package has a GPU's tiles -> what the tuner wrote among the committed results."""
    from dit_kernels.ops import triton_tuning  # a run without Triton has a report too

    found = {}
    for path in sorted(FOLDER.glob("*/tuned.json")):
        text = path.read_text()
        found[triton_tuning.shipped(json.loads(text)["version"]["gpu"])] = text
    return found


def readme_lines(runs: dict[str, list[Run]]) -> str:
    """What the README says of speed: a picture of the committed results, or that there are none."""
    pictured = [
        f"![{title} on {found[0]['machine']['device']}](docs/images/{name}.png)"
        for device, found in on_gpus(runs).items()
        for title, name in list(pictures(device, found))[:1]
    ]
    if not pictured:
        return (
            "**No speed has been measured on a GPU yet**, so this page claims none; `make gpu` measures it, and"
            " [docs/benchmarks.md](docs/benchmarks.md) is made from the results."
        )
    more = "All results, losses included, are in [docs/benchmarks.md](docs/benchmarks.md)."
    return "\n\n".join([*pictured, more])


def with_readme_lines(readme: str, lines: str) -> str:
    """The README with these lines between its two marks."""
    begin, end = (readme.index(mark) for mark in MARKS)
    return f"{readme[: begin + len(MARKS[0])]}\n{lines}\n{readme[end:]}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.report", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "folder", type=Path, nargs="?", help="of runs; by default the committed ones"
    )
    given = parser.parse_args(arguments)
    if given.folder:
        try:
            found = runs_in(given.folder)
        except ValueError as error:
            print(f"report: {error}", file=sys.stderr)
            return 2
        if not found:
            print(f"report: no run in {given.folder}", file=sys.stderr)
            return 2
        device = machine.short(found[0]["machine"]["device"])
        draw(device, found, given.folder / "images")
        path = given.folder / "report.md"
        path.write_text("\n".join(_of_device(device, found)))
        print(f"{len(found)} runs -> {path}")
        return 0
    runs = read_runs()
    PAGE.parent.mkdir(exist_ok=True)
    for device, found in runs.items():
        draw(device, found, IMAGES)
    for path, tiles in tuned().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(tiles)
    measured.FILE.write_text(measured.text(fastest.fastest(on_gpus(runs))))
    PAGE.write_text(page(runs))
    README.write_text(with_readme_lines(README.read_text(), readme_lines(runs)))
    written = ", ".join(str(path.relative_to(ROOT)) for path in (PAGE, README, measured.FILE))
    print(f"{sum(map(len, runs.values()))} runs -> {written}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
