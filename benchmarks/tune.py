"""Measure the candidate tiles of the Triton kernels on this GPU: `python -m benchmarks.tune [--seconds N]`.

Calls every op, forward and backward, at benchmark shapes. Each class of shapes that a call asks tiles for is
tried with each of its few candidates, and what is faster than the default by more than 2% is written where
calls find it (see `dit_kernels/ops/triton_tuning.py`). A class is measured at the first shape that has it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import cases_for
from benchmarks.shapes import QUICK, SHAPES
from benchmarks.timing import timed
from dit_kernels import backends, ops
from dit_kernels.ops import triton_tuning

Measure = Callable[[Callable[[], object]], float]
WORTH = 0.98  # of the default's time


def call_of(case: Any, shape: str, device: str) -> Callable[[], object]:
    """Forward and backward of a case."""
    kwargs = case.arguments(SHAPES[shape], torch.bfloat16, device, 0)
    leaves = [v for v in kwargs.values() if isinstance(v, Tensor) and v.is_floating_point()]
    leaves = [leaf.requires_grad_() for leaf in leaves if leaf.is_leaf]

    def call() -> None:
        results = getattr(ops, case.function)(**kwargs, backend="triton")
        results = results if isinstance(results, tuple) else (results,)
        torch.autograd.grad(
            results, leaves, [torch.ones_like(r) for r in results], allow_unused=True
        )

    return call


def tune_call(call: Callable[[], object], measure: Measure, done: set[tuple[str, str]]) -> list[dict[str, Any]]:  # fmt: skip
    """One row a class that the call asks for and that is not done: its default, its best, their times."""
    with triton_tuning.noted() as asked:
        call()
    rows = []
    for (kernel, name), (key, default) in asked.items():
        if (kernel, name) in done or kernel not in triton_tuning.CANDIDATES:
            continue
        done.add((kernel, name))
        times: dict[Any, float] = {}
        for tiles in dict.fromkeys([default, *triton_tuning.CANDIDATES[kernel](key, default)]):
            with triton_tuning.tried(kernel, name, tiles):
                try:
                    times[tiles] = measure(call)
                except Exception as error:  # does not fit this GPU: no candidate
                    if tiles == default:
                        raise
                    print(f"  {kernel} {name}: {tuple(tiles)}: {str(error).splitlines()[0][:100]}")
        best = min(times, key=lambda tiles: times[tiles])
        rows.append(dict(
            kernel=kernel, key=name, default=list(default), default_ms=1e3 * times[default],
            best=list(best), best_ms=1e3 * times[best], tried=len(times),
        ))  # fmt: skip
    return rows


def worth(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, list[Any]]]:
    """kernel -> class -> tiles, of those that beat the default."""
    tiles: dict[str, dict[str, list[Any]]] = {}
    for row in rows:
        if row["best_ms"] < WORTH * row["default_ms"]:
            tiles.setdefault(row["kernel"], {})[row["key"]] = row["best"]
    return tiles


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.tune", description=__doc__.splitlines()[0]
    )
    names = [op for op, found in backends.TABLE.items() if "triton" in found]
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {' '.join(names)}; default: all")
    parser.add_argument("--shape", action="append", choices=SHAPES, help=f"default: {' '.join(QUICK)}")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=600, help="begin nothing new after these")
    parser.add_argument("--out", type=Path, help="a folder for tuned.json, the log of all times")
    given = parser.parse_args(arguments)
    unknown = set(given.ops) - set(names)
    if unknown:
        parser.error(f"no op {unknown.pop()!r}; there are {' '.join(names)}")
    if not torch.cuda.is_available():
        print("tune: there is no GPU here, so there is nothing to measure", file=sys.stderr)
        return 1
    end = time.monotonic() + given.seconds
    path, version = triton_tuning.file(), triton_tuning.version()
    tiles = triton_tuning.load(path, version)
    done: set[tuple[str, str]] = set()
    rows: list[dict[str, Any]] = []
    shapes = given.shape or QUICK
    for shape, case in ((s, c) for s in shapes for c in cases_for(SHAPES[s], tuple(given.ops))):
        if time.monotonic() > end:
            print(f"stopped after {given.seconds:.0f} s, before {case.name} {shape}")
            break
        found = tune_call(
            call_of(case, shape, "cuda"), lambda call: timed([call], "cuda", seconds=0.05).median, done
        )  # fmt: skip
        for row in found:
            print(f"{case.name} {shape}: {row['kernel']} {row['key']}: {row['default']} {row['default_ms']:.4f} ms"
                  f" -> {row['best']} {row['best_ms']:.4f} ms of {row['tried']} tried", flush=True)  # fmt: skip
        rows += found
        for kernel, classes in worth(found).items():
            tiles.setdefault(kernel, {}).update(classes)
        triton_tuning.save(path, version, tiles)
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"version": version, "rows": rows}, indent=1)
        (given.out / "tuned.json").write_text(content + "\n")
    print(
        f"{len(rows)} classes measured, {sum(map(len, worth(rows).values()))} better than the default; in {path}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
