"""From committed results to pages: nothing in them is typed.

make report        docs/benchmarks.md, its plots and the README's lines on speed, from benchmarks/results/<device>/*.json

    python -m benchmarks.report [FOLDER]    the same tables and plots of the runs in a folder, into report.md there
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.bench import Row, binding, rounded
from benchmarks.bench_models import utilisation
from benchmarks.cases import CASES
from benchmarks.machine import ROOT
from benchmarks.peers import PEERS
from benchmarks.shapes import SHAPES, SWEEPS

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
IMAGES = PAGE.parent / "images"
README = ROOT / "README.md"
MARKS = ("<!-- speed: made by `make report` -->", "<!-- end of speed -->")
Run = dict[str, Any]
OURS = ("triton", "cuda", "reference")  # the reference is timed on a CPU only, where it serves

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
are medians over CUDA graph replays, over several sets of inputs that together are larger than the L2 cache;
`†` marks what could not be captured and is timed by events, gaps between launches included. In brackets: how
many times as long as ours. A result's ceilings are of its own run: a large copy (bytes read and written) and a
large bfloat16 matrix product on random data. "Of the ceiling" is the larger of the two floors, least bytes over
the copy's rate and FLOPs over the product's, over the time. "Saved" is what the forward keeps for the backward,
inputs included. Losses are shown. What takes long to prepare comes last: a run that is out of time has timed
ours against eager PyTorch everywhere, then against torch.compile, then against its max-autotune; it says how
much it left out.
"""


def read_runs(folder: Path = RESULTS) -> dict[str, list[Run]]:
    """device -> its runs."""
    found = {path.name: runs_in(path) for path in sorted(folder.glob("*/"))}
    return {device: runs for device, runs in found.items() if runs}


def runs_in(folder: Path) -> list[Run]:
    """Of the JSON files, the runs: the tuned tiles lie there too.

    Raises:
        ValueError: one is not JSON.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        if isinstance(content, dict) and {"machine", "rows"} <= content.keys():
            found.append(content)
    return found


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
    for run in runs:
        yield section(run)


def heading(found_on: dict[str, Any]) -> Iterator[str]:
    yield f"## {found_on['device']}\n"
    if machine.short(found_on["device"]) == "cpu":
        yield "A CPU run shows that the suite works, and nothing about the kernels.\n"


def on_gpus(runs: dict[str, list[Run]]) -> dict[str, list[Run]]:
    return {device: found for device, found in runs.items() if device != "cpu"}


def section(run: Run) -> str:
    """The tables of one run."""
    found_on, ceilings = run["machine"], run["ceilings"]
    head = ", ".join(
        f"{name} {found_on[name]}"
        for name in ("driver", "cuda", "torch", "triton", "commit", "date")
        if name in found_on
    )
    rows = run["rows"]
    what = "models" if _models(run) else ", ".join(sorted({row["op"] for row in rows}))
    if any("sweep" in row for row in rows):
        what = f"sweeps over {', '.join(dict.fromkeys(r['sweep'] for r in rows if 'sweep' in r))}"
    lines = [
        f"### {what}\n",
        f"{head}. Copy {rounded(ceilings['copy_gbps'])} GB/s, matrix product {rounded(ceilings['matmul_tflops'])} TFLOP/s,"
        f" a launch that does nothing {ceilings['launch_us']:.1f} µs, {ceilings['graph_launch_us']:.1f} µs in a graph.\n",
    ]
    if _models(run):
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
    for title, found in (("Absent", entries), ("Failed", failed)):
        if found:
            lines += [f"{title}:\n", *(f"- {entry}" for entry in found), ""]
    return "\n".join(lines)


def _what(row: Row) -> str:
    return f"{row['case']} {row['shape']}" if "case" in row else f"{row['model']} {row['mode']}"


def _case_table(case: str, rows: list[Row], ceilings: dict[str, float]) -> list[str]:
    """A line a shape and direction: ours, then the others with how many times as long they take."""
    measured = [row for row in rows if "ms" in row]
    names = sorted({row["implementation"] for row in measured}, key=_order)
    if not names:
        return []
    heads = ["shape", "direction", "rate", "of the ceiling", "against the best other", "peak, MiB"]
    body = []
    for (shape, direction), cells in _grouped(measured, "shape", "direction").items():
        ours, best = _ours_and_best(cells)
        ratio = f"{best['ms'] / ours['ms']:.2f}x" if ours and best else "-"
        own = ["not measured", "not measured", ratio, "-"]
        if ours:
            rate, percent = binding(ours, ceilings)
            own = [rate, f"{percent:.1f}%", ratio, _mebi(ours["peak_bytes"])]
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


def _by_implementation(rows: list[Row], key: str) -> list[str]:
    found = []
    for (shape,), cells in _grouped([row for row in rows if row[key] is not None], "shape").items():
        sizes = (f"{name} {_mebi(cells[name][key])}" for name in sorted(cells, key=_order))
        found.append(f"{shape}: {', '.join(sizes)}")
    return found


def _grouped(rows: list[Row], *keys: str) -> dict[tuple[str, ...], dict[str, Row]]:
    found: dict[tuple[str, ...], dict[str, Row]] = defaultdict(dict)
    for row in sorted(rows, key=lambda row: row.get("x", 0)):
        found[tuple(row[key] for key in keys)][row["implementation"]] = row
    return dict(found)


def _ours_and_best(cells: dict[str, Row]) -> tuple[Row | None, Row | None]:
    """The faster of our kernels, and the fastest other implementation that computes the same."""
    ours = min((cells[n] for n in OURS if n in cells), key=lambda r: r["ms"], default=None)
    others = (row for n, row in cells.items() if n not in OURS and row["accurate"])
    return ours, min(others, key=lambda r: r["ms"], default=None)


def _cell(row: Row | None, ours: Row | None) -> str:
    if row is None:
        return "-"
    marks = ("" if row["accurate"] else "*") + ("†" if row["timed_by"] == "events" else "")
    beside = f" ({row['ms'] / ours['ms']:.2f}x)" if ours and row is not ours else ""
    return f"{row['ms']:.4f}{marks}{beside}"


def _mebi(size: int | None) -> str:
    return "-" if size is None else rounded(size / 2**20)


def _models(run: Run) -> bool:
    return any("model" in row for row in run["rows"])


def _models_table(run: Run) -> list[str]:
    heads = ["model", "what", "implementation", "batch", "ms", "a second", "against eager",
             "FLOP utilisation", "peak, GiB"]  # fmt: skip
    body = []
    measured = [row for row in run["rows"] if "ms" in row]
    for (model, mode, measure), cells in _grouped(measured, "model", "mode", "measure").items():
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


def _order(name: str) -> tuple[int, str]:
    first = (*OURS, "eager", "compile", "compile-max")
    return (first.index(name) if name in first else len(first), name)


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


def pictures(device: str, runs: list[Run]) -> Iterator[tuple[str, str]]:
    """(title, name) of the plots that these runs give."""
    for title, name, rows, _ in _plots(device, runs):
        if rows:
            yield title, name


def _plots(
    device: str, runs: list[Run]
) -> Iterator[tuple[str, str, list[Any], Callable[[Any, list[Any]], None]]]:
    """(title, file name, what is drawn, how)"""
    of_ops = [run for run in runs if not _models(run)]
    rows = [(row, run["ceilings"]) for run in of_ops for row in run["rows"] if "ms" in row]
    ours = [(row, ceilings) for row, ceilings in rows if row["implementation"] in OURS]
    shaped = [row for row, _ in rows if "sweep" not in row]
    yield (
        "How many times as long the others take", f"speedup-{device}", _speedups(shaped), _draw_summary,
    )  # fmt: skip
    yield "Roofline", f"roofline-{device}", ours, _draw_roofline
    for op in dict.fromkeys(row["op"] for row in shaped):
        of_op = [b for b in _speedups(shaped) if b["op"] == op and b["direction"] != "both"]
        yield f"{op}, by shape", f"speedup-{device}-{op}", of_op, _draw_bars
    for sweep in SWEEPS:
        swept = [pair for pair in rows if pair[0].get("sweep") == sweep]
        yield (
            f"Scaling with {SWEEPS[sweep].axis}",
            f"scaling-{device}-{sweep}",
            swept,
            _draw_scaling,
        )
    whole = [row for run in runs if _models(run) for row in run["rows"] if "ms" in row]
    yield "Whole models", f"models-{device}", whole, _draw_models


def draw(device: str, runs: list[Run], folder: Path = IMAGES) -> list[str]:
    """Write the plots, PNG and SVG, the same bytes again from the same results; their names."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "dit-kernels"
    import matplotlib.pyplot as plt

    drawn = []
    folder.mkdir(parents=True, exist_ok=True)
    for title, name, rows, how in _plots(device, runs):
        if not rows:
            continue
        figure = plt.figure(figsize=(8, 5), layout="constrained")
        figure.suptitle(f"{title}: {runs[0]['machine']['device']}", fontsize=11)
        how(figure, rows)
        figure.savefig(folder / f"{name}.png", dpi=110, metadata={"Software": None})
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
        plt.close(figure)
        drawn.append(name)
    return drawn


def _speedups(rows: list[Row]) -> list[Row]:
    """For each case, shape and direction: how many times as long as ours eager, compile and the best other take."""
    found = []
    for (op, case, shape, direction), cells in _grouped(
        rows, "op", "case", "shape", "direction"
    ).items():
        ours, best = _ours_and_best(cells)
        if not ours or not best:
            continue
        bar = {"op": op, "case": case, "shape": shape, "direction": direction}
        others = {"eager": cells.get("eager"), "compile": cells.get("compile"), "best other": best}
        bar["ratios"] = {n: row["ms"] / ours["ms"] for n, row in others.items() if row}
        found.append(bar)
    return found


COLOURS = {"eager": "#9db4c8", "compile": "#4f7cac", "best other": "#c0504d"}


def _draw_bars(figure: Any, bars: list[Row]) -> None:
    """A panel a direction, three bars a case and shape, from the line at 1 where both take as long."""
    from matplotlib.ticker import LogLocator, NullLocator

    names = list(COLOURS)
    cases = {bar["case"]: None for bar in bars}
    bars = sorted(bars, key=lambda bar: list(cases).index(bar["case"]))
    rows = {
        label: i for i, label in enumerate(dict.fromkeys(map(_bar_label, bars)))
    }  # of both panels
    directions = [d for d in ("forward", "backward") if any(bar["direction"] == d for bar in bars)]
    panels = figure.subplots(1, len(directions), sharex=True, sharey=True, squeeze=False)[0]
    figure.set_size_inches(8.5, 1.5 + 0.36 * len(rows))
    for panel, direction in zip(panels, directions, strict=True):
        for bar in (bar for bar in bars if bar["direction"] == direction):
            for j, name in enumerate(names):
                if name in bar["ratios"]:
                    place = rows[_bar_label(bar)] + 0.27 * (j - 1)
                    width = bar["ratios"][name] - 1
                    panel.barh(place, width, 0.25, left=1, color=COLOURS[name])
        panel.set_title(direction, fontsize=9)
        panel.axvline(1, color="black", linewidth=1)
        panel.grid(axis="x", color="0.9")
        panel.set_axisbelow(True)
    axes = panels[0]
    axes.set_yticks(range(len(rows)), list(rows), fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xscale("log")
    ratios = [ratio for bar in bars for ratio in (1, *bar["ratios"].values())]
    narrow = max(ratios) / min(ratios) < 10
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if narrow else (1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    handles = [axes.barh(0, 0, left=1, color=colour) for colour in COLOURS.values()]
    # no supxlabel: the legend would cover it
    figure.legend(
        handles, names, loc="outside lower center", ncols=3, fontsize=8, title_fontsize=9,
        title="times as long as ours; left of the line ours is slower",
    )  # fmt: skip


def _bar_label(bar: Row) -> str:
    return f"{bar['case']} {bar['shape']}".strip()


def _draw_summary(figure: Any, bars: list[Row]) -> None:
    """A bar a case and direction: the geometric mean over the shapes."""
    means = []
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for bar in bars:
        groups[bar["case"], bar["direction"]].append(bar)
    for (case, direction), group in groups.items():
        if direction == "both":
            continue
        ratios = {
            name: math.exp(
                statistics.fmean(math.log(b["ratios"][name]) for b in group if name in b["ratios"])
            )
            for name in COLOURS
            if any(name in b["ratios"] for b in group)
        }
        means.append({"case": case, "shape": "", "direction": direction, "ratios": ratios})
    _draw_bars(figure, means)


def _draw_roofline(figure: Any, pairs: list[tuple[Row, dict[str, float]]]) -> None:
    """Achieved rate over intensity, log-log, a point a kernel of ours, under the machine's two ceilings."""
    axes = figure.subplots()
    copy = statistics.median(ceilings["copy_gbps"] for _, ceilings in pairs)
    product = statistics.median(ceilings["matmul_tflops"] for _, ceilings in pairs)
    points = roofline_points([row for row, _ in pairs])
    reach = [intensity for found in points.values() for intensity, _ in found]
    ridge = 1e3 * product / copy
    roof = (min([*reach, 1]) / 2, ridge, max([*reach, ridge]) * 4)
    axes.loglog(roof, [min(product, copy * x / 1e3) for x in roof], color="black", linewidth=1)
    middle = math.sqrt(roof[0] * ridge)
    for end, name in (
        ((middle, copy * middle / 1e3), f"copy, {rounded(copy)} GB/s"),
        ((roof[2], product), f"matrix product, {rounded(product)} TFLOP/s"),
    ):
        axes.annotate(name, end, (-4, 5), textcoords="offset points", ha="right", fontsize=8)
    axes.margins(y=0.08)
    colours = {op: f"C{i}" for i, op in enumerate(sorted({op for op, _ in points}))}
    for (op, direction), found in points.items():
        face = colours[op] if direction == "forward" else "none"
        axes.scatter(*zip(*found, strict=True), s=18, edgecolors=colours[op], facecolors=face)
    axes.set_xlabel(
        "operations per byte (without matrix products: about one, the ops side by side)"
    )
    axes.set_ylabel("10^12 operations per second")
    handles = [axes.scatter([], [], s=18, color=colour) for colour in colours.values()]
    handles.append(axes.scatter([], [], s=18, edgecolors="black", facecolors="none"))
    figure.legend(
        handles, [*colours, "backward"], loc="outside lower center", ncols=4, fontsize=8
    )  # fmt: skip


def roofline_points(rows: list[Row]) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """(op, direction) -> (operations per byte, 10^12 operations per second).

    A kernel without matrix products counts about one operation a byte, a little more or less by its op so that
    the ops don't hide one another: how far it is below the roof is its bandwidth.
    """
    plain = sorted({row["op"] for row in rows if not row["flops"]})
    counts = {op: 2 ** (i / 2 - (len(plain) - 1) / 4) for i, op in enumerate(plain)}
    points: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        if row["direction"] != "both":
            work = row["flops"] or counts[row["op"]] * row["bytes"]
            points[row["op"], row["direction"]].append(
                (work / row["bytes"], work / row["ms"] / 1e9)
            )
    return dict(points)


def _draw_scaling(figure: Any, pairs: list[tuple[Row, dict[str, float]]]) -> None:
    """Share of the ceiling over the size that is varied: a panel a case, a line an implementation."""
    import matplotlib

    cases = list(dict.fromkeys(row["case"] for row, _ in pairs))
    figure.set_size_inches(8, 3.2 * ((len(cases) + 1) // 2))
    panels = figure.subplots((len(cases) + 1) // 2, min(2, len(cases)), squeeze=False).flat
    names = sorted({row["implementation"] for row, _ in pairs}, key=_order)
    labelled: dict[str, Any] = {}
    colours = list(
        map(tuple, matplotlib.colormaps["tab20"].colors)
    )  # dark ones first, then light ones
    colours = colours[::2] + colours[1::2]
    for case, panel in zip(cases, panels, strict=False):
        for i, name in enumerate(names):
            for direction, style in (("forward", "-"), ("backward", "--")):
                line = sorted(
                    (row["x"], binding(row, ceilings)[1])
                    for row, ceilings in pairs
                    if (row["case"], row["implementation"], row["direction"])
                    == (case, name, direction)
                )
                if line:
                    label = name if style == "-" else None
                    colour = colours[i % len(colours)]
                    panel.plot(
                        *zip(*line, strict=True), style, marker=".", color=colour, label=label
                    )
        panel.set_title(f"{case} (backward dashed)", fontsize=9)
        panel.set_xscale("log", base=2)
        panel.set_ylim(bottom=0)
        panel.set_xlabel(SWEEPS[pairs[0][0]["sweep"]].axis, fontsize=8)
        panel.set_ylabel("% of the ceiling", fontsize=8)
        labelled |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    for panel in panels:
        panel.set_visible(False)
    shown = [name for name in names if name in labelled]
    handles = [labelled[name] for name in shown]
    figure.legend(handles, shown, loc="outside lower center", ncols=5, fontsize=8)


def _draw_models(figure: Any, rows: list[Row]) -> None:
    """Samples a second, relative to eager."""
    groups = _grouped(rows, "model", "mode", "measure")
    groups = {key: cells for key, cells in groups.items() if "eager" in cells}
    names = sorted({name for cells in groups.values() for name in cells}, key=_order)
    axes = figure.subplots()
    figure.set_size_inches(8, 1.5 + 0.6 * len(groups))
    height = 0.8 / max(1, len(names))
    for j, name in enumerate(names):
        found = [
            (i, cells[name]["per_second"] / cells["eager"]["per_second"])
            for i, cells in enumerate(groups.values())
            if name in cells
        ]
        axes.barh(
            [i + height * j for i, _ in found], [ratio for _, ratio in found], height, label=name
        )
    axes.set_yticks([i + 0.4 - height / 2 for i in range(len(groups))])
    axes.set_yticklabels([" ".join(key) for key in groups], fontsize=8)
    axes.set_ylim(len(groups) - height / 2, -0.2 - height / 2)  # also where a group has few bars
    axes.axvline(1, color="black", linewidth=1)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.set_xlabel("samples a second, relative to eager")
    figure.legend(loc="outside lower center", ncols=5, fontsize=8)


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
        draw(device, found)
    PAGE.write_text(page(runs))
    README.write_text(with_readme_lines(README.read_text(), readme_lines(runs)))
    print(f"{sum(map(len, runs.values()))} runs -> {PAGE.relative_to(ROOT)}, {README.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
