"""`make gpu`: all that only a GPU can tell, in stages, on a bare machine without a network.

    python3 -m benchmarks.gpu [build test bench-attention ...] [--seconds 570]

Needs torch, triton and pytest; nvcc, cmake, ninja and pybind11 for the build. Stages share the seconds in
proportion to their weights: what one leaves over the later ones get, and stages that are picked by name get
all. Each writes its results and its log as it goes and cannot stop the next. At most eight files are written,
to $OUT or to benchmarks/results/<device>; a summary comes last. Set COMMIT where the tree is a copy without
its history: results name the commit they are of.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks import machine
from dit_kernels import backends

ROOT = machine.ROOT
# `make peers` fills it; what is installed from it lies beside it, outside of the machine's own packages
WHEELS = ROOT / "peers"
SITE = WHEELS / "site"
# measures tiles of the Triton kernels; where DIT_KERNELS_TUNED says, for it and for the stages after it
TUNER = "benchmarks.tune"


@dataclass(frozen=True)
class Stage:
    """A command with its weight in the time.

    Args:
        command: {out}, {seconds} and {target} in it are filled in.
        missing: why it can't run here, or None.
        environment: what is set for it.
    """

    name: str
    command: tuple[str, ...]
    weight: int
    missing: Callable[[], str | None] = lambda: None
    environment: dict[str, str] = field(default_factory=dict)


def no_gpu() -> str | None:
    return None if torch.cuda.is_available() else "there is no GPU"


def no_build() -> str | None:
    if not list((ROOT / "csrc").glob("*.cu")):
        return "there are no CUDA sources in csrc"
    homes = (os.environ.get("CUDA_HOME"), "/usr/local/cuda")
    places = ("nvcc", *(f"{home}/bin/nvcc" for home in homes if home))
    return no_gpu() or (None if any(map(shutil.which, places)) else "there is no nvcc")


def no_wheels() -> str | None:
    return (
        None
        if list(WHEELS.glob("*.whl"))
        else f"no wheels in {WHEELS.name}/: `make peers` fills it"
    )


def no_sanitizer() -> str | None:
    if no_gpu():
        return no_gpu()
    return None if shutil.which("compute-sanitizer") else "compute-sanitizer is not on the PATH"


def no_tuner() -> str | None:
    return no_gpu() or (None if importlib.util.find_spec(TUNER) else f"there is no {TUNER}")


def target() -> str:
    """What the audit calls the machine code of this GPU."""
    if not torch.cuda.is_available():
        return "sm_90"
    from dit_kernels.ops.triton_launch import architecture

    return architecture(torch.device("cuda", 0))


def _bench(*arguments: str) -> tuple[str, ...]:
    return (
        sys.executable, "-m", "benchmarks.bench", *arguments, "--out", "{out}", "--seconds", "{seconds}",
    )  # fmt: skip


def _sanitizer(tool: str) -> Stage:
    """A few small cases under compute-sanitizer: out-of-bounds accesses, or races in shared memory."""
    return Stage(
        tool,
        # without an exit code of its own it ends well whatever it finds
        ("compute-sanitizer", "--tool", tool, "--error-exitcode", "86", *PYTEST,
         "tests/gpu/test_sanitizer.py"),
        35,
        no_sanitizer,
        # torch's cache of blocks would hide what is read past the end of a tensor
        {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )  # fmt: skip


PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-ra")
# most of the tests' time is Triton's compiler, one core a process
PARALLEL = ("-n", "8") if importlib.util.find_spec("xdist") else ()
# a build that skips the extension ends well too: what counts is that it can be imported
BUILD = (
    f"{sys.executable} setup.py build_ext --inplace && {sys.executable} -c 'import dit_kernels._C'"
)
SHAPES = ("--shape", "dit-xl-256", "--shape", "dit-xl-1024", "--shape", "wan-1.3b-480p")
OWN_STAGE = ("adaln", "attention3d", "qk_norm_rope")
REST = tuple(op for op in backends.TABLE if op not in OWN_STAGE)
STAGES = (
    Stage(
        "peers",
        (sys.executable, "-m", "benchmarks.peers", str(WHEELS), "--install", str(SITE)),
        10,
        no_wheels,
    ),
    Stage("build", ("sh", "-c", BUILD), 80, no_build),
    Stage("test", (*PYTEST, *PARALLEL, "tests/gpu"), 110, no_gpu),
    _sanitizer("memcheck"),
    _sanitizer("racecheck"),
    Stage("audit", (sys.executable, "-m", "benchmarks.audit", "--target", "{target}"), 25, no_gpu),
    Stage("tune", (sys.executable, "-m", TUNER, "--seconds", "{seconds}"), 30, no_tuner),
    Stage("bench-adaln", _bench("adaln", "--name", "adaln", *SHAPES), 60, no_gpu),
    Stage("bench-attention", _bench("attention3d", "--name", "attention", *SHAPES), 70, no_gpu),
    Stage("bench-qk", _bench("qk_norm_rope", "--name", "qk_norm_rope", *SHAPES), 20, no_gpu),
    Stage("bench-rest", _bench(*REST, "--name", "rest", *SHAPES), 40, no_gpu),
    Stage("sweeps", _bench("--sweep", "all", "--name", "sweeps"), 40, no_gpu),
    Stage("models", _bench("models"), 60, no_gpu),
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    began = time.monotonic()
    names = [stage.name for stage in STAGES]
    parser = argparse.ArgumentParser("make gpu", description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", help="of " + " ".join(names))
    parser.add_argument("--seconds", type=float, default=570, help="for all of them; 570")
    given = parser.parse_args(arguments)
    unknown = set(given.stages) - set(names)
    if unknown:
        parser.error(f"no stage {sorted(unknown)[0]!r}; there are {' '.join(names)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    default = ROOT / "benchmarks" / "results" / machine.folder(device)
    out = Path(os.environ.get("OUT") or default)
    out.mkdir(parents=True, exist_ok=True)
    log = out / "gpu.log"
    log.write_text("")
    reasons = {
        stage.name: stage.missing()
        for stage in STAGES
        if not given.stages or stage.name in given.stages
    }
    waiting = [stage for stage in STAGES if stage.name in reasons]
    summary = []
    while waiting:
        stage, *waiting = waiting
        reason = reasons[stage.name]
        if reason:
            line = f"skipped: {reason}"
        else:
            weights = sum(s.weight for s in waiting if not reasons[s.name])
            left = given.seconds - (time.monotonic() - began)
            line = _run(stage, out, log, left * stage.weight / (stage.weight + weights))
        summary.append(f"{stage.name:16} {line}")
        print(summary[-1], flush=True)
    text = "\n".join([f"{device}: results in {out}", *summary])
    with log.open("a") as file:
        file.write(f"\n{text}\n")
    print(f"\n{text}")
    return int(any("FAILED" in line for line in summary))


def _run(stage: Stage, out: Path, log: Path, limit: float) -> str:
    # the benchmarks stop by themselves before they are stopped, so that their last row is whole
    filled = {"out": str(out), "seconds": f"{max(1.0, 0.85 * limit - 5):.0f}", "target": target()}
    command = [word.format(**filled) for word in stage.command]
    paths = (str(ROOT), str(SITE) if SITE.is_dir() else "", os.environ.get("PYTHONPATH", ""))
    environment = {
        "DIT_KERNELS_TUNED": str(out / "tuned.json"), **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1", **stage.environment,
    }  # fmt: skip
    start = time.monotonic()
    with log.open("a") as file:
        file.write(f"\n$ {' '.join(command)}\n")
        file.flush()
        first = file.tell()
        # a session of its own, so that what it started ends with it
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            code: int | str = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            code = f"over its {limit:.0f} s"
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    seconds = time.monotonic() - start
    tail = log.read_bytes()[first:].decode(errors="replace").strip().splitlines()
    print("\n".join(f"    {line}" for line in tail[-25:]))
    return f"{'ok' if code == 0 else f'FAILED ({code})'} in {seconds:.0f} s"


if __name__ == "__main__":
    sys.exit(main())
