"""Compile what the benchmarks will call, on all cores at once, so that their time goes into measuring.

    python -m benchmarks.warm [op or case ...] [--shape NAME] [--jobs N] [--seconds S]

Each process calls its share of our kernels and of torch.compile's, forward and backward, untimed. The compilers
keep what they make on disk, where the benchmarks find it. What torch.compile chose between by measuring is
thrown away: the GPU was shared.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import bench, guarded
from benchmarks.baselines import Baseline, baselines
from benchmarks.shapes import SHAPES


def pairs(wanted: Sequence[bench.Point], device: str) -> list[tuple[bench.Point, Baseline]]:
    """What compiles; no max-autotune, which measures."""
    found = [
        (point, baseline)
        for point in wanted
        for baseline in baselines(device)
        if baseline.applies(point.case)
        and (baseline.preparation == 1 or baseline.name in ("triton", "cuda"))
    ]
    return sorted(found, key=lambda pair: pair[1].preparation)


def compile_pair(point: bench.Point, baseline: Baseline, device: str) -> str:
    """As `bench` calls it: without a gradient, and with one."""
    arguments = point.case.arguments(point.shape, torch.bfloat16, device, 0)
    if reason := baseline.missing(point.case, arguments):
        return f"absent: {reason}"
    call = baseline.call(point.case, arguments)
    directions = ("both", "forward") if baseline.has_backward(point.case) else ("forward",)
    for direction in directions:
        (once,) = bench.calls(call, [arguments], direction, device)
        once()
    return "compiled"


def job(wanted: Sequence[tuple[bench.Point, Baseline]], device: str) -> None:
    for point, baseline in wanted:
        start = time.monotonic()
        try:
            with guarded.ended_after(120, device):
                state = compile_pair(point, baseline, device)
        except Exception as error:  # the benchmark itself reports it
            state = f"{type(error).__name__}: {error}".splitlines()[0]
        took = time.monotonic() - start
        what = f"{point.case.name} {point.tags['shape']} {baseline.name}"
        print(f"{took:6.1f} s  {what}: {state}", flush=True)
        if guarded.lost(device):
            return


def ended(jobs: Sequence[subprocess.Popen[bytes]], end: float) -> str:
    """Wait for them, until then at most; what they have compiled stays on disk."""
    failed, cut_off = 0, 0
    try:
        for process in jobs:
            try:
                failed += process.wait(timeout=max(0.0, end - time.monotonic())) != 0
            except subprocess.TimeoutExpired:
                cut_off += 1
    finally:
        for process in jobs:
            process.kill()
            process.wait()
    return f"{len(jobs)} processes, {failed} failed, {cut_off} ended by the time"


def forget_choices() -> int:
    """Delete which tiles torch.compile found fastest; how many."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    found = list(Path(cache_dir()).rglob("*.best_config"))
    for path in found:
        path.unlink(missing_ok=True)
    return len(found)


def main(arguments: Sequence[str] | None = None) -> int:
    given_arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        "python -m benchmarks.warm", description=__doc__.splitlines()[0]
    )
    parser.add_argument("cases", nargs="*", help="ops or cases; all by default")
    parser.add_argument("--shape", action="append", choices=SHAPES, help="may be repeated")
    parser.add_argument("--jobs", type=int, default=min(12, os.cpu_count() or 1), help="processes")
    parser.add_argument("--job", type=int, help="be this one of them")
    parser.add_argument("--seconds", type=float, default=600, help="for all; 600")
    given = parser.parse_args(given_arguments)
    end = time.monotonic() + given.seconds
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = given.shape or bench.default_shapes(device, quick=True)
    wanted = pairs(bench.points(given.cases, shapes, [], device), device)
    if given.job is not None:
        job(wanted[given.job :: given.jobs], device)
        return 0
    command = [sys.executable, "-m", "benchmarks.warm", *given_arguments, "--jobs", str(given.jobs)]
    # each would start as many compilers as there are cores
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
    jobs = [
        subprocess.Popen([*command, "--job", str(index)], env=environment)
        for index in range(min(given.jobs, len(wanted)))
    ]
    try:
        state = ended(jobs, end)
    finally:
        forgotten = forget_choices()
    print(f"{len(wanted)} to compile: {state}; {forgotten} choices forgotten")
    return 0


if __name__ == "__main__":
    sys.exit(main())
