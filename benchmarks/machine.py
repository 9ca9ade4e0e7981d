"""The machine that a run is made on: what it is, and the two ceilings that its figures are held against."""

from __future__ import annotations

import datetime
import functools
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import timed

ROOT = Path(__file__).parent.parent


def describe(device: str) -> dict[str, Any]:
    """Names and versions, for the head of a result file."""
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name,
            "cuda": torch.version.cuda,
            "driver": _driver(),
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
        }
    else:
        found |= {"device": f"CPU ({platform.machine()})", "threads": torch.get_num_threads()}
    return found


def folder(device: str) -> str:
    """Where a machine's results lie: "h200", "h100", ..., "cpu"."""
    return "cpu" if device != "cuda" else short(torch.cuda.get_device_name(0))


def short(name: str) -> str:
    """The card of "NVIDIA H100 80GB HBM3"; "cpu" of a CPU."""
    words = name.lower().replace("-", " ").split()
    if words[0] == "cpu":
        return "cpu"
    named = [w for w in words if any(c.isdigit() for c in w) and not w.endswith(("gb", "hbm3"))]
    return named[0] if named else "-".join(words)


def results(device: str) -> Path:
    """Where runs are written by default: a GPU's are to be committed, a CPU's stay where one is."""
    if device == "cuda":
        return ROOT / "benchmarks" / "results" / folder(device)
    return Path("runs") / "bench"


def ceilings(device: str) -> dict[str, float]:
    """Measured here and now: copy bandwidth (bytes read + written), bf16 matrix product, a launch that does nothing."""
    on_gpu = device == "cuda"
    numel, side = (1 << 31, 8192) if on_gpu else (1 << 24, 1024)
    source = torch.empty(numel, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    copy = timed([functools.partial(target.copy_, source)], device).median
    del source, target
    # some CPUs multiply bfloat16 faster than float32, some slower: the ceiling is the faster one's
    dtypes = (torch.bfloat16,) if on_gpu else (torch.bfloat16, torch.float32)
    product = min(_product(side, dtype, device) for dtype in dtypes)
    nothing = torch.zeros(1, device=device)
    return {
        "copy_gbps": 2 * numel / copy / 1e9,
        "matmul_tflops": 2 * side**3 / product / 1e12,
        # one after the other from Python, and inside of a graph: the floor of every time that is replayed
        "launch_us": 1e6 * timed([nothing.zero_], device, graph=False).median,
        "graph_launch_us": 1e6 * timed([nothing.zero_], device).median,
    }


def _product(side: int, dtype: torch.dtype, device: str) -> float:
    # random data: a product of zeros draws less power and runs faster
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return timed([lambda: a @ b], device).median


def _commit() -> str:
    """COMMIT where it is set: a copy of the tree on another machine may have no history."""
    if os.environ.get("COMMIT"):
        return os.environ["COMMIT"]
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return run.stdout.strip()


def _driver() -> str:
    try:
        run = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return run.stdout.splitlines()[0].strip()


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
