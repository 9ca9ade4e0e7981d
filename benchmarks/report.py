"""From committed results to pages: nothing in them is typed.

make report        docs/benchmarks.md and its plots, from benchmarks/results/<device>/*.json
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.bench import Row, share
from benchmarks.machine import ROOT

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
Run = dict[str, Any]
OURS = ("triton", "cuda")  # the reference is the oracle, not a competitor

INTRODUCTION = """# Benchmarks

Made by `make report` from the files in [benchmarks/results](../benchmarks/results); measured by `make gpu`.
Every row's kernel was first held against the float64 oracle. Times are medians with a cold L2 cache, over CUDA
graph replays where the call can be captured. "Of the ceiling" is the floor (least bytes over the copy bandwidth,
or FLOPs over the matrix product's rate, both measured in the same run) over the time.
"""


def read_runs(folder: Path = RESULTS) -> dict[str, list[Run]]:
    """device -> its runs."""
    runs: dict[str, list[Run]] = defaultdict(list)
    for path in sorted(folder.glob("*/*.json")):
        found = json.loads(path.read_text())
        if "rows" in found:
            runs[path.parent.name].append(found)
    return dict(runs)


def page(runs: dict[str, list[Run]]) -> str:
    parts = [INTRODUCTION]
    if not any(device != "cpu" for device in runs):
        parts.append("**Not measured on a GPU yet.**\n")
    for device, found in runs.items():
        for run in found:
            parts.append(_section(device, run))
    return "\n".join(parts)


def _section(device: str, run: Run) -> str:
    machine, ceilings = run["machine"], run["ceilings"]
    head = ", ".join(
        f"{name} {machine[name]}"
        for name in ("driver", "cuda", "torch", "triton", "commit", "date")
        if name in machine
    )
    measured = [row for row in run["rows"] if "ms" in row]
    names = sorted({row["implementation"] for row in measured}, key=_order)
    lines = [
        f"## {machine['device']}: {', '.join(sorted({row['op'] for row in run['rows']}))}\n",
        f"{head}. Copy {ceilings['copy_gbps']:.0f} GB/s, matrix product {ceilings['matmul_tflops']:.1f} TFLOP/s,"
        f" empty launch {ceilings['launch_us']:.1f} µs.\n",
    ]
    if device == "cpu":
        lines.append("A CPU run shows that the suite works, and nothing about the kernels.\n")
    lines += [
        "| case | shape | direction | "
        + " | ".join(f"{name}, ms" for name in names)
        + " | ours, of the ceiling | against the best other |",
        "|---|---|---|" + "---:|" * (len(names) + 2),
    ]
    table: dict[tuple[str, str, str], dict[str, Row]] = defaultdict(dict)
    for row in measured:
        table[row["case"], row["shape"], row["direction"]][row["implementation"]] = row
    for key, cells in table.items():
        ours = min((cells[n] for n in OURS if n in cells), key=lambda r: r["ms"], default=None)
        others = [row for name, row in cells.items() if name not in OURS]
        best = min(others, key=lambda r: r["ms"], default=None)
        times = (f"{cells[name]['ms']:.4f}" if name in cells else "-" for name in names)
        part = (
            share(ours, ceilings).split("  ")[-1].split("%")[0].split()[-1] + "%"
            if ours
            else "not measured"
        )
        ratio = f"{best['ms'] / ours['ms']:.2f}x" if ours and best else "-"
        lines.append(f"| {' | '.join(key)} | {' | '.join(times)} | {part} | {ratio} |")
    absent = sorted({f"{r['implementation']}: {r['absent']}" for r in run["rows"] if "absent" in r})
    failed = [
        f"{r['implementation']} in {r['case']} {r['shape']}: {r['failed']}"
        for r in run["rows"]
        if "failed" in r
    ]
    for title, entries in (("Absent", absent), ("Failed", failed)):
        if entries:
            lines += ["", f"{title}:", "", *(f"- {entry}" for entry in entries)]
    return "\n".join(lines) + "\n"


def _order(name: str) -> tuple[int, str]:
    return (OURS.index(name) if name in OURS else len(OURS), name)


def roofline(runs: list[Run], path: Path) -> None:
    """Achieved FLOP/s over intensity, log-log, a point a kernel of ours, under this machine's two ceilings."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    copy = runs[0]["ceilings"]["copy_gbps"] * 1e9
    product = runs[0]["ceilings"]["matmul_tflops"] * 1e12
    reach = [2.0**i for i in range(-4, 15)]
    axes.loglog(reach, [min(product, copy * i) / 1e12 for i in reach], color="black", linewidth=1)
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for run in runs:
        for row in run["rows"]:
            if "ms" in row and row["implementation"] in OURS:
                # a kernel without matrix products counts one operation a byte: its height is its bandwidth
                work = row["flops"] or row["bytes"]
                points[row["op"]].append((work / row["bytes"], work / row["ms"] / 1e9))
    for op, found in sorted(points.items()):
        axes.scatter(*zip(*found, strict=True), s=18, label=op)
    axes.set_xlabel("operations per byte")
    axes.set_ylabel("10^12 operations per second")
    axes.set_title(runs[0]["machine"]["device"])
    axes.legend(fontsize=8)
    figure.tight_layout()
    for suffix in (".png", ".svg"):
        figure.savefig(path.with_suffix(suffix), dpi=120)
    plt.close(figure)


def main() -> int:
    runs = read_runs()
    PAGE.parent.mkdir(exist_ok=True)
    text = page(runs)
    for device, found in runs.items():
        if device != "cpu":
            image = PAGE.parent / "images" / f"roofline-{device}"
            roofline(found, image)
            text += f"\n![Roofline, {device}](images/{image.name}.png)\n"
    PAGE.write_text(text)
    print(f"{sum(map(len, runs.values()))} runs -> {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
