"""`make gpu`: all that only a GPU can tell, in stages, on a bare machine without a network.

    python3 -m benchmarks.gpu [build test bench-attention ...] [--seconds 570]

Needs torch, triton, numpy and pytest; nvcc, cmake, ninja and pybind11 for the build. Stages share the seconds in
proportion to their weights: what one leaves over the later ones get, and stages that are picked by name get
all. Each writes its results and its log as it goes and cannot stop the next. One that is over its time gets a
Ctrl-C, so that pytest says what failed, and is then killed with all that it started. A benchmark that a kernel
crashed or hung is begun again behind that kernel. At most eight files are written, to $OUT or to
benchmarks/results/<device>; a summary comes last. Set COMMIT where the tree is a copy without its history:
results name the commit they are of.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
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
# of a stage's time: what is begun until then mostly ends in time
SHARE = 0.85
GRACE = 10  # seconds at most for what is interrupted to say where it was


@dataclass(frozen=True)
class Stage:
    """A command with its weight in the time.

    Args:
        command: {out}, {seconds} and {target} in it are filled in.
        missing: why it can't run here, or None.
        environment: what is set for it.
        result: the file of a benchmark, which says whether a measurement ended the process.
    """

    name: str
    command: tuple[str, ...]
    weight: int
    missing: Callable[[], str | None] = lambda: None
    environment: dict[str, str] = field(default_factory=dict)
    result: str = ""


def listens() -> None:
    """A Ctrl-C reaches the process, also where a shell that started us in the background has it ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def no_gpu() -> str | None:
    return None if torch.cuda.is_available() else "there is no GPU"


def no_build() -> str | None:
    if not list((ROOT / "csrc").glob("*.cu")):
        return "there are no CUDA sources in csrc"
    return no_gpu() or (None if shutil.which("nvcc", path=search_path()) else "there is no nvcc")


def search_path() -> str:
    """PATH, then where CUDA's tools lie when nobody has put them there."""
    homes = (os.environ.get("CUDA_HOME"), "/usr/local/cuda")
    places = (
        f"{home}/{folder}" for home in homes if home for folder in ("bin", "compute-sanitizer")
    )
    return os.pathsep.join((os.environ.get("PATH", ""), *places))


def no_wheels() -> str | None:
    return (
        None
        if list(WHEELS.glob("*.whl"))
        else f"no wheels in {WHEELS.name}/: `make peers` fills it"
    )


def no_sanitizer() -> str | None:
    if no_gpu():
        return no_gpu()
    there = shutil.which("compute-sanitizer", path=search_path())
    return None if there else "there is no compute-sanitizer, on PATH or beside nvcc"


def no_tuner() -> str | None:
    return no_gpu() or (None if importlib.util.find_spec(TUNER) else f"there is no {TUNER}")


def arch() -> str:
    """The same for nvcc: wgmma and TMA are in sm_90a only."""
    if not torch.cuda.is_available():
        return "90a"
    major, minor = torch.cuda.get_device_capability(0)
    return f"{major}{minor}" + ("a" if major == 9 else "")


def target() -> str:
    """What the audit calls the machine code of this GPU."""
    if not torch.cuda.is_available():
        return "sm_90"
    from dit_kernels.ops.triton_launch import architecture

    return architecture(torch.device("cuda", 0))


def _bench(name: str, weight: int, *arguments: str) -> Stage:
    command = (sys.executable, "-m", "benchmarks.bench", *arguments, "--out", "{out}")
    result = arguments[arguments.index("--name") + 1] if "--name" in arguments else name
    options = ("--seconds", "{seconds}")
    return Stage(name, (*command, *options), weight, no_gpu, result=f"{result}.json")


def _sanitizer(tool: str) -> Stage:
    """A few small cases under compute-sanitizer: out-of-bounds accesses, or races in shared memory."""
    # torch asks CUDA what can fail (whose pointer is this?) and goes on
    quiet = ("--report-api-errors", "no") if tool == "memcheck" else ()
    return Stage(
        tool,
        # without an exit code of its own it ends well whatever it finds
        ("compute-sanitizer", "--tool", tool, "--error-exitcode", "86", *quiet, *PYTEST,
         "tests/gpu/test_sanitizer.py"),
        35,
        no_sanitizer,
        # torch's cache of blocks would hide what is read past the end of a tensor
        {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )  # fmt: skip


def _audit() -> tuple[str, ...]:
    """The machine code of this GPU, by Triton and by nvcc; the CUDA table needs the build."""
    python = f"{sys.executable} -m benchmarks"
    return ("sh", "-c", f"{python}.audit --target {{target}}; code=$?; "
            f"{python}.audit_cuda --archs {{arch}} && exit $code")  # fmt: skip


# names as they are begun: the last one is what hung
PYTEST = (sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", "-ra")
# beside other processes it would time these
CLOCK = "tests/gpu/test_timing.py"
# most of the other tests' time is Triton's compiler, one core a process
WORKERS = str(min(12, os.cpu_count() or 1))
PARALLEL = ("-n", WORKERS) if importlib.util.find_spec("xdist") else ()
# a build that skips the extension ends well too: what counts is that it can be imported
BUILD = (
    f"{sys.executable} setup.py build_ext --inplace && {sys.executable} -c"
    " 'import dit_kernels._C as built; print(built.__file__)'"
)
SHAPES = ("--shape", "dit-xl-256", "--shape", "dit-xl-1024", "--shape", "wan-1.3b-480p")
OWN_STAGE = ("adaln", "attention3d")
REST = tuple(op for op in backends.TABLE if op not in OWN_STAGE)
STAGES = (
    Stage(
        "peers",
        (sys.executable, "-m", "benchmarks.peers", str(WHEELS), "--install", str(SITE)),
        10,
        no_wheels,
    ),
    Stage("build", ("sh", "-c", BUILD), 100, no_build),
    Stage("clock", (*PYTEST, CLOCK), 15, no_gpu),
    Stage(
        "test",
        (*PYTEST, *PARALLEL, "tests/gpu", f"--ignore={CLOCK}"),
        100,
        no_gpu,
        {"OMP_NUM_THREADS": "1"},
    ),
    Stage(
        "matrix",
        (*PYTEST, *PARALLEL, "tests/kernels"),
        100,
        no_gpu,
        # torch's own products are deterministic with it only, which some tests ask for
        {"OMP_NUM_THREADS": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"},
    ),
    _sanitizer("memcheck"),
    _sanitizer("racecheck"),
    Stage("audit", _audit(), 30, no_gpu),
    Stage("tune", (sys.executable, "-m", TUNER, "--seconds", "{seconds}"), 30, no_tuner),
    Stage(
        "compile",
        (sys.executable, "-m", "benchmarks.warm", *SHAPES, "--seconds", "{seconds}"),
        50,
        no_gpu,
    ),
    _bench("bench-adaln", 50, "adaln", "--name", "adaln", *SHAPES),
    _bench("bench-attention", 50, "attention3d", "--name", "attention", *SHAPES),
    _bench("bench-rest", 50, *REST, "--name", "rest", *SHAPES),
    _bench("sweeps", 35, "--sweep", "all", "--name", "sweeps"),
    _bench("models", 50, "models"),
)


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
    committed = machine.results(device)
    out = Path(os.environ.get("OUT") or committed)
    out.mkdir(parents=True, exist_ok=True)
    tiles = committed / "tuned.json"
    if tiles.is_file() and not (out / "tuned.json").exists():
        shutil.copy(tiles, out)  # until the stage that tunes has better ones
    log = out / "gpu.log"
    if not given.stages:  # what is run of some stages only, adds to what the others wrote
        log.write_text("")
    log.touch()
    reasons = {
        stage.name: stage.missing()
        for stage in STAGES
        if not given.stages or stage.name in given.stages
    }
    waiting = [stage for stage in STAGES if stage.name in reasons]
    summary, failed = [], False
    while waiting:
        stage, *waiting = waiting
        reason = reasons[stage.name]
        if reason:
            line = f"skipped: {reason}"
        else:
            weights = sum(s.weight for s in waiting if not reasons[s.name])
            left = given.seconds - (time.monotonic() - began)
            share = left * stage.weight / (stage.weight + weights)
            line = _run(stage, out, log, share) if share > 1 else "skipped: no time is left"
        failed |= line.startswith("FAILED")
        summary.append(f"{stage.name:16} {line}")
        print(summary[-1], flush=True)
    text = "\n".join([f"{device}: results in {out}", *summary])
    with log.open("a") as file:
        file.write(f"\n{text}\n")
    print(f"\n{text}")
    return int(failed)


def _run(stage: Stage, out: Path, log: Path, limit: float) -> str:
    paths = (str(ROOT), str(SITE) if SITE.is_dir() else "", os.environ.get("PYTHONPATH", ""))
    environment = {
        "DIT_KERNELS_TUNED": str(out / "tuned.json"), **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1", "PATH": search_path(),
        **stage.environment,
    }  # fmt: skip
    start = time.monotonic()
    first = log.stat().st_size
    more: tuple[str, ...] = ()
    result = out / (stage.result or "none")
    while True:
        before = result.read_bytes() if result.is_file() else b""
        left = limit - (time.monotonic() - start)
        # the benchmarks stop by themselves before they are stopped, so that their last row is whole
        filled = {
            "out": str(out), "seconds": f"{max(1.0, SHARE * left - 3):.0f}",
            "target": target(), "arch": arch(),
        }  # fmt: skip
        command = [word.format(**filled) for word in (*stage.command, *more)]
        code = _ended(command, environment, log, left, min(GRACE, 0.1 * left))
        for leftover in (*out.glob("*.part"), *out.glob("tuned.json.*")):
            leftover.unlink()  # of a process that was killed while it wrote
        left = limit - (time.monotonic() - start)
        if left < 2 * GRACE or not _cut_off(result, before):
            break
        more = ("--resume",)
    seconds = time.monotonic() - start
    tail = log.read_bytes()[first:].decode(errors="replace").strip().splitlines()
    print("\n".join(f"    {line[:200]}" for line in tail[-25:]))
    state = "ok" if code == 0 else f"FAILED ({code})"
    return f"{state} in {seconds:.0f} s: {tail[-1].strip('= ')[:100]}"


def _ended(
    command: Sequence[str], environment: dict[str, str], log: Path, limit: float, grace: float
) -> int | str:
    """Its exit code, or that it took too long; with it ends what it started, also when we are interrupted."""
    with log.open("a") as file:
        file.write(f"\n$ {' '.join(command)}\n")
        file.flush()
        # a session of its own, so that what it started ends with it
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True, preexec_fn=listens,
        )  # fmt: skip
        try:
            return process.wait(timeout=limit - grace)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, signal.SIGINT)
                process.wait(timeout=grace)
            return f"over its {limit:.0f} s"
        finally:
            # a process in a hung kernel may outlive its kill for a while: the next stage doesn't wait
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(timeout=GRACE)


def _cut_off(result: Path, before: bytes) -> bool:
    """Whether a measurement ended the process, or left a GPU on which no other can run."""
    content = result.read_bytes() if result.is_file() else before
    return content != before and "begun" in json.loads(content)


if __name__ == "__main__":
    sys.exit(main())
