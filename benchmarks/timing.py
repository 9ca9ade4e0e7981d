"""Seconds a call, measured so that launch gaps, a warm cache and one lucky run don't count.

GPU: the calls go over several sets of inputs, together larger than the L2 cache; they are captured in a CUDA
graph and the replays are timed by events. What cannot be captured is timed by events around batches.
CPU: a wall clock around each batch.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, a sample a pass; timed by "graph" (replays), "events" or "clock" (a CPU)."""

    samples: list[float]
    by: str

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def columns(self) -> dict[str, object]:
        """As a row of a result file has it."""
        quartiles = statistics.quantiles(self.samples, n=4)
        return {
            "ms": 1e3 * self.median, "ms_quartiles": [1e3 * q for q in quartiles], "timed_by": self.by
        }  # fmt: skip


def timed(
    calls: Sequence[Call], device: str, *, graph: bool = True, seconds: float = 0.3, least: int = 7
) -> Timing:
    """Seconds of one call, a sample a pass over `calls` (the same call on different inputs).

    Args:
        calls: at least one.
        device: "cuda" or "cpu".
        graph: try a CUDA graph.
        seconds: about how long to sample.
        least: samples at the least.
    """
    run = _pass_over(calls)
    for _ in range(2):
        run()
    by = "clock"
    if device == "cuda":
        torch.cuda.synchronize()
        replay = captured(run) if graph else None
        run, by = (replay, "graph") if replay else (run, "events")
    once = _sample(run, device)
    samples = [once]
    for _ in range(max(least, min(200, int(seconds / max(once, 1e-9)))) - 1):
        samples.append(_sample(run, device))
    return Timing([sample / len(calls) for sample in samples], by)


def sets_for(bytes_a_set: int, device: str) -> int:
    """How many sets of inputs make the cache cold: together four times L2."""
    if device != "cuda":
        return 1
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(32, -(-4 * l2 // max(1, bytes_a_set))))


def _pass_over(calls: Sequence[Call]) -> Call:
    def run() -> None:
        for call in calls:
            call()

    return run


@contextlib.contextmanager
def on_capture_stream(device: str) -> Iterator[None]:
    """On a GPU, inside is the stream that graphs are captured on.

    Autograd runs a backward on its forward's stream: only a forward made here leaves one that can be captured.
    """
    if device != "cuda":
        yield
        return
    stream = _capture_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


@functools.cache
def _capture_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


def captured(run: Call) -> Call | None:
    """Replays `run` from a CUDA graph; None where it can't be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with on_capture_stream("cuda"):
            run()
        with torch.cuda.graph(graph, stream=_capture_stream()):
            run()
    except (RuntimeError, torch.AcceleratorError):
        with contextlib.suppress(RuntimeError):
            torch.cuda.synchronize()
        return None
    graph.replay()
    return graph.replay


def _sample(run: Call, device: str) -> float:
    if device != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
