"""The committed results of the benchmarks: runs, their rows, and which rows belong side by side."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT
from benchmarks.record import Row

FOLDER = ROOT / "benchmarks" / "results"
Run = dict[str, Any]
OURS = ("triton", "cuda", "reference")  # the reference is timed on a CPU only, where it serves


def read_runs(folder: Path = FOLDER) -> dict[str, list[Run]]:
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


def on_gpus(runs: dict[str, list[Run]]) -> dict[str, list[Run]]:
    return {device: found for device, found in runs.items() if device != "cpu"}


def of_models(run: Run) -> bool:
    return any("model" in row for row in run["rows"])


def grouped(rows: list[Row], *keys: str) -> dict[tuple[str, ...], dict[str, Row]]:
    found: dict[tuple[str, ...], dict[str, Row]] = defaultdict(dict)
    for row in sorted(rows, key=lambda row: row.get("x", 0)):
        found[tuple(row[key] for key in keys)][row["implementation"]] = row
    return dict(found)


def ours_and_best(cells: dict[str, Row]) -> tuple[Row | None, Row | None]:
    """The faster of our kernels, and the fastest other implementation that computes the same."""
    ours = min((cells[n] for n in OURS if n in cells), key=lambda r: r["ms"], default=None)
    others = (row for n, row in cells.items() if n not in OURS and row["accurate"])
    return ours, min(others, key=lambda r: r["ms"], default=None)


def by_importance(name: str) -> tuple[int, str]:
    first = (*OURS, "eager", "compile", "compile-max")
    return (first.index(name) if name in first else len(first), name)
