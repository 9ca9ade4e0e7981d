"""Which of our backends is the fastest for a class of calls: what `auto` looks up, and the table that shows it."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterator

from benchmarks.record import Row
from benchmarks.runs import Run, grouped
from dit_kernels import backends
from dit_kernels.measured import CallClass, Fastest

# what is asked of a call -> the timed direction that answers it
DIRECTIONS = {"inference": "forward", "training": "both"}


def fastest(runs: dict[str, list[Run]]) -> dict[str, list[Fastest]]:
    """GPU -> the fastest backends of each class that was timed, forward and backward, with all that serve its op."""
    found = {}
    for of_device in runs.values():
        times: dict[CallClass, dict[str, dict[str, list[float]]]] = {}
        for kind, cells in _compared(of_device):
            call = CallClass(**next(iter(cells.values()))["class"])
            of_class = times.setdefault(call, {name: defaultdict(list) for name in DIRECTIONS})
            for name, row in cells.items():
                of_class[kind][name].append(math.log(row["ms"]))
        classes = [
            Fastest(call, **{kind: _least(of_class[kind]) for kind in DIRECTIONS})
            for call, of_class in sorted(times.items())
            if all(of_class.values())
        ]
        if classes:
            found[of_device[0]["machine"]["device"]] = classes
    return found


def table(runs: list[Run]) -> list[list[str]]:
    """A line a case and shape: the backend that `auto` takes, and how many times as long the best other one takes."""
    chosen = {found.call: found for of_gpu in fastest({"": runs}).values() for found in of_gpu}
    lines: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for kind, cells in _compared(runs):
        some = next(iter(cells.values()))
        if found := chosen.get(CallClass(**some["class"])):
            name = getattr(found, kind)
            other = min(row["ms"] for backend, row in cells.items() if backend != name)
            ratio = f"{other / cells[name]['ms']:.2f}x"
            lines[some["case"], some["shape"]][kind] = f"{name} ({ratio})"
    return [
        [case, shape, *(line.get(kind, "-") for kind in DIRECTIONS)]
        for (case, shape), line in lines.items()
    ]


def _compared(runs: list[Run]) -> Iterator[tuple[str, dict[str, Row]]]:
    """(what is asked, backend -> its row), where all backends of an op were timed."""
    rows = [row for run in runs for row in run["rows"] if "ms" in row and "class" in row]
    for kind, direction in DIRECTIONS.items():
        of_kind = [row for row in rows if row["direction"] == direction]
        for (op, *_), cells in grouped(of_kind, "op", "case", "shape", "dtype").items():
            if len(backends.TABLE[op]) > 1 and set(cells) == set(backends.TABLE[op]):
                yield kind, cells


def _least(times: dict[str, list[float]]) -> str:
    """By the geometric mean, where several shapes are of one class."""
    return min(times, key=lambda name: statistics.fmean(times[name]))
