"""Plots of the benchmarks' results, PNG and SVG, the same bytes again from the same results."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.bench import binding, rounded
from benchmarks.record import Row
from benchmarks.runs import OURS, Run, by_importance, grouped, of_models, ours_and_best
from benchmarks.shapes import SWEEPS


def pictures(device: str, runs: list[Run]) -> Iterator[tuple[str, str]]:
    """(title, name) of the plots that these runs give."""
    for title, name, rows, _ in _plots(device, runs):
        if rows:
            yield title, name


def _plots(
    device: str, runs: list[Run]
) -> Iterator[tuple[str, str, list[Any], Callable[[Any, list[Any]], None]]]:
    """(title, file name, what is drawn, how)"""
    of_ops = [run for run in runs if not of_models(run)]
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
    whole = [row for run in runs if of_models(run) for row in run["rows"] if "ms" in row]
    yield "Whole models", f"models-{device}", whole, _draw_models


def draw(device: str, runs: list[Run], folder: Path) -> list[str]:
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
    for (op, case, shape, direction), cells in grouped(
        rows, "op", "case", "shape", "direction"
    ).items():
        ours, best = ours_and_best(cells)
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
    names = sorted({row["implementation"] for row, _ in pairs}, key=by_importance)
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
    groups = grouped(rows, "model", "mode", "measure")
    groups = {key: cells for key, cells in groups.items() if "eager" in cells}
    names = sorted({name for cells in groups.values() for name in cells}, key=by_importance)
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
