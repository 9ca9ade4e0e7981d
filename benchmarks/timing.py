"""Seconds a call, measured so that launch gaps, a warm cache and one lucky run don't count.

GPU: a pass goes over several sets of inputs and keeps their outputs, all together larger than the L2 cache;
passes are captured in a CUDA graph, and its replays are timed by events. A short spin of the GPU before each
hides how long the host takes to launch it. What cannot be captured is timed by events around batches.
CPU: a wall clock around each pass.
"""

from __future__ import annotations

import contextlib
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]

SAMPLE = 1e-3  # seconds of one at least: the events' own cost is a thousandth of it
SPIN = 100_000  # cycles, some 50 us: longer than the host takes to queue a replay
SLOW = 0.1  # seconds of a pass from which few samples do: it varies little, and time is short


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
    calls: Sequence[Call], device: str, *, graph: bool = True, seconds: float = 0.1, least: int = 7
) -> Timing:
    """Seconds of one call, a sample a pass over `calls` (the same call on different inputs).

    Args:
        calls: at least one.
        device: "cuda" or "cpu".
        graph: try a CUDA graph.
        seconds: about how long to sample.
        least: samples at the least; of what takes long, three.
    """
    run, passes, by = _passes(calls), 1, "clock"
    run()
    pass_seconds = _sample(run, device)  # warm by now: compiled, tuned, its memory allocated
    if device == "cuda":
        by = "events"
        passes = math.ceil(SAMPLE / pass_seconds)
        run = _passes(calls, passes)
        if graph and (replay := captured(run)):
            run, by = replay, "graph"
            pass_seconds = _sample(run, device) / passes
            # without the gaps between launches more of them may be needed
            more = math.ceil(SAMPLE / pass_seconds)
            if more > 2 * passes and (replay := captured(_passes(calls, more))):
                run, passes = replay, more
    batch = passes * pass_seconds
    if batch > SLOW:
        least = min(least, 3)
    count = max(least, min(200, int(seconds / max(batch, 1e-9))))
    samples = [_sample(run, device) / (passes * len(calls)) for _ in range(count)]
    return Timing(samples, by)


def sets_for(bytes_a_set: int, device: str) -> int:
    """How many sets of inputs make the cache cold: together four times L2."""
    if device != "cuda":
        return 1
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(256, -(-4 * l2 // max(1, bytes_a_set))))


def _passes(calls: Sequence[Call], count: int = 1) -> Call:
    def run() -> None:
        for _ in range(count):
            # kept to the end of the pass: else each call would write where the last one did, into the cache
            kept = [call() for call in calls]
            kept.clear()

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
    """Replays `run` from a CUDA graph; None where it can't be captured, with everything as it was."""
    stream, device = torch.cuda.current_stream(), torch.cuda.current_device()
    torch.cuda.synchronize()
    try:
        with on_capture_stream("cuda"), _waits_are_errors():
            run()
    except RuntimeError:
        torch.cuda.set_stream(stream)
        return None
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=_capture_stream()):
            run()
    except RuntimeError:
        # torch leaves its stream, its allocator and its random numbers as if still capturing
        torch.cuda.set_stream(stream)
        with contextlib.suppress(RuntimeError, AttributeError):
            torch._C._cuda_endAllocateToPool(device, pool)
            torch._C._cuda_releasePool(device, pool)
        random = torch.cuda.default_generators[device]
        fresh = torch.Generator(random.device)
        fresh.manual_seed(0)
        random.graphsafe_set_state(fresh)
        torch.cuda.synchronize()
        return None
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay


@contextlib.contextmanager
def _waits_are_errors() -> Iterator[None]:
    """Inside, what waits for the GPU raises: the usual reason why something can't be captured."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _sample(run: Call, device: str) -> float:
    if device != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(SPIN)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
