"""`make gpu`: all that only a GPU can tell, in stages, on a bare machine without a network.

    python3 -m benchmarks.gpu [test memcheck bench-adaln ...]

Needs torch, triton and pytest. Each stage has its own time limit, writes its log as it goes and cannot stop the
next. Results go to $OUT, or to benchmarks/results/<device>; a summary is printed last.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import machine

ROOT = machine.ROOT


@dataclass(frozen=True)
class Stage:
    """A command with its limit in seconds. `missing` is why it can't run here, or None."""

    name: str
    command: tuple[str, ...]
    limit: int
    missing: Callable[[], str | None] = lambda: None


def no_gpu() -> str | None:
    return None if torch.cuda.is_available() else "there is no GPU"


def no_sanitizer() -> str | None:
    if no_gpu():
        return no_gpu()
    return None if shutil.which("compute-sanitizer") else "compute-sanitizer is not on the PATH"


def _bench(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "benchmarks.bench", *arguments)


PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
SHAPES = ("--shape", "dit-xl-256", "--shape", "dit-xl-1024", "--shape", "wan-1.3b-480p")
STAGES = (
    Stage("test", (*PYTEST, "tests/gpu"), 150, no_gpu),
    Stage(
        "memcheck",
        ("compute-sanitizer", "--tool", "memcheck", *PYTEST, "tests/gpu", "-k", "memcheck"),
        60,
        no_sanitizer,
    ),
    Stage("bench-adaln", _bench("adaln", "--name", "adaln", *SHAPES), 110, no_gpu),
    Stage("bench-attention", _bench("attention3d", "--name", "attention", *SHAPES), 110, no_gpu),
    Stage("bench-qk", _bench("qk_norm_rope", "--name", "qk_norm_rope", *SHAPES), 40, no_gpu),
    Stage(
        "bench-rest",
        _bench(
            "patch_embed", "unpatchify", "final_layer", "feed_forward", "--name", "rest", *SHAPES
        ),
        110,
        no_gpu,
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("make gpu", description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", help="of " + " ".join(s.name for s in STAGES))
    given = parser.parse_args(arguments)
    unknown = set(given.stages) - {stage.name for stage in STAGES}
    if unknown:
        parser.error(f"no stage {unknown.pop()!r}; there are {' '.join(s.name for s in STAGES)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    default = ROOT / "benchmarks" / "results" / machine.folder(device)
    out = Path(os.environ.get("OUT") or default)
    out.mkdir(parents=True, exist_ok=True)
    log = out / "gpu.log"
    log.write_text("")
    summary = []
    for stage in STAGES:
        if given.stages and stage.name not in given.stages:
            continue
        reason = stage.missing()
        line = f"skipped: {reason}" if reason else _run(stage, out, log)
        summary.append(f"{stage.name:16} {line}")
        print(summary[-1], flush=True)
    print(f"\n{device}: results in {out}")
    print("\n".join(summary))
    return int(any("FAILED" in line for line in summary))


def _run(stage: Stage, out: Path, log: Path) -> str:
    command = stage.command
    if "benchmarks.bench" in command:
        command = (*command, "--out", str(out))
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    start = time.monotonic()
    with log.open("a") as file:
        file.write(f"\n$ {' '.join(command)}\n")
        file.flush()
        first = file.tell()
        try:
            code: int | str = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT,
                timeout=stage.limit, check=False,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            code = f"over its {stage.limit} s"
    seconds = time.monotonic() - start
    tail = log.read_text()[first:].strip().splitlines()
    print("\n".join(f"    {line}" for line in tail[-40:]))
    return f"{'ok' if code == 0 else f'FAILED ({code})'} in {seconds:.0f} s"


if __name__ == "__main__":
    sys.exit(main())
