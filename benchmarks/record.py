"""The JSON file of a run: written row by row, gone on with, closed, and compared with another."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from benchmarks import machine

Row = dict[str, Any]
OURS = ("triton", "cuda", "reference", "ours")


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


def result_file(folder: Path | None, name: str, device: str, *, resume: bool) -> Path:
    """Where the run is written, its folder made.

    Raises:
        OSError: there is none to be made.
        ValueError: what is to be resumed is no run.
    """
    folder = folder or machine.results(device)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    if resume and path.exists() and (reason := no_run(path)):
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
    return int(any(row["implementation"].startswith(OURS) for row in failed_rows(result)))


def closing(result: Row, path: Path) -> None:
    """The same tables as in the report, then how to have its plots, and how many rows there are."""
    from benchmarks import report

    device = "\n".join(report.heading(result["machine"]))
    print(
        f"\n{device}\n{report.section(result)}\nTables and plots: python -m benchmarks.report {path.parent}"
    )
    failed = failed_rows(result)
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


def task_key(row: Row) -> tuple[str, ...]:
    """What is measured at a time; rows of ops and of models."""
    keys = ("case", "model", "mode", "measure", "shape", "implementation", "dtype")
    return tuple(str(row[key]) for key in keys if key in row)


def row_key(row: Row) -> tuple[str, ...]:
    """What one number is of."""
    return (*task_key(row), *([row["direction"]] if "direction" in row else []))


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


def no_run(path: Path) -> str | None:
    if not path.is_file():
        return "is no file"
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        return f"is not JSON: {error}"
    if not isinstance(content, dict) or not {"machine", "rows"} <= content.keys():
        return "is not of a benchmark: it has no rows, or no machine"
    return None


def failed_rows(result: Row) -> list[Row]:
    return [row for row in result["rows"] if "failed" in row]
