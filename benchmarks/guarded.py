"""A measurement that crashes, hangs or runs out of memory is a row of the result, and not the end of the run."""

from __future__ import annotations

import contextlib
import faulthandler
from collections.abc import Callable, Iterator

import torch

from benchmarks.record import Row


def attempted(
    row: Row, measured: Callable[[], Iterator[Row]], device: str, patience: float
) -> Iterator[Row]:
    """The measured rows, or one that says why there are none."""
    yield {"begun": row}
    try:
        with ended_after(patience, device):
            yield from measured()
    except torch.OutOfMemoryError:
        yield {**row, "absent": "out of memory"}
    except Exception as error:  # Triton's own are none of Python's narrower kinds
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        yield {**row, "failed": f"{type(error).__name__}: {reason}"}
    finally:
        with contextlib.suppress(RuntimeError):
            if device == "cuda":
                torch.cuda.empty_cache()


@contextlib.contextmanager
def ended_after(seconds: float, device: str) -> Iterator[None]:
    """Inside, a kernel that never ends ends the process, which nothing else can; it says where it was."""
    if device == "cuda":
        faulthandler.dump_traceback_later(seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def lost(device: str) -> bool:
    """Whether a kernel's error has ended the GPU's context: every later call would fail with it."""
    try:
        if device == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
