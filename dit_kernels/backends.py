"""Which backend serves which op, how one is chosen for a call, and why one is missing.

A backend is one module `dit_kernels/ops/<op>/<backend>.py` with three functions that take the
registered op's arguments in its schema's order:

    supports(...) -> str | None     None, or the reason why this call cannot be served
    forward(...)  -> list[Tensor]
    backward(...) -> list[Tensor]
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType, TracebackType
from typing import Any

import torch

from dit_kernels import measured

# op -> the backends that "auto" tries, first to last, where nothing was measured (see measured.py); the
# reference serves what none of them takes
TABLE: dict[str, tuple[str, ...]] = {
    "adaln": ("triton", "cuda"),
    "qk_norm_rope": ("triton", "cuda"),
    "attention3d": ("triton",),
    "patch_embed": ("triton", "cuda"),
    "unpatchify": ("triton", "cuda"),
    "final_layer": ("triton", "cuda"),
    "feed_forward": ("triton", "cuda"),
}
NAMES = ("auto", "reference", "triton", "cuda")
# not a backend: the formula as people write it, in the inputs' dtype and with torch's own autograd.
# The accuracy rule and the benchmarks compare with it (`dit_kernels.testing.plain_torch`).
PLAIN = "plain torch"


class _PerThread(threading.local):
    """What `use_backend` set. Not a ContextVar: Dynamo cannot trace one."""

    name = ""


_local = _PerThread()


class Unsupported(RuntimeError):
    """The backend asked for by name is not there, or cannot serve the call."""


class use_backend:
    """Context manager: every op called inside uses the named backend unless its own `backend=` says otherwise.

    Args:
        name: "auto", "reference", "triton" or "cuda". It holds for the current thread.

    Raises:
        ValueError: the name is none of these.
    """

    def __init__(self, name: str) -> None:
        check_name("use_backend", name)
        self.name = name
        self.previous: list[str] = []  # one for each time that it is entered and not yet left

    def __enter__(self) -> use_backend:
        self.previous.append(_local.name)
        _local.name = self.name
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _local.name = self.previous.pop()


@contextlib.contextmanager
def as_requested(name: str) -> Iterator[None]:
    """Inside, this thread asks for what `requested` gave in another place or thread."""
    previous, _local.name = _local.name, name
    try:
        yield
    finally:
        _local.name = previous


def check_name(caller: str, name: str) -> None:
    if name not in NAMES:
        raise ValueError(f"{caller}: backend must be one of {', '.join(NAMES)}; got {name!r}")


def requested(caller: str, backend: str | None) -> str:
    """The name asked for by argument or context; "" leaves it to the environment variable.

    The variable is read inside the op (see `select`), where torch.compile does not look.
    """
    if backend is not None:
        check_name(caller, backend)
        return backend
    return _local.name


def select(op: str, name: str, args: tuple[Any, ...], *, training: bool = False) -> ModuleType:
    """The backend module that serves this call.

    Args:
        training: a backward follows, or this is one: it must be served by the backend of its forward.

    Raises:
        Unsupported: the backend asked for by name is not there or cannot serve this call.
    """
    if not name:
        name = os.environ.get("DIT_KERNELS_BACKEND") or "auto"
        check_name(f"{op}: DIT_KERNELS_BACKEND", name)
    if name == "auto":
        candidates = TABLE[op]
        if len(candidates) > 1:
            candidates = measured.order(op, candidates, args, training=training)
        for candidate in candidates:
            if unavailable(candidate) is None:
                module = load(op, candidate)
                if module.supports(*args) is None:
                    return module
        return load(op, "reference")
    if name != "reference":
        reason = (
            unavailable(name)
            or (None if name in TABLE[op] else "it has no kernel for this op in this version")
            or load(op, name).supports(*args)
        )
        if reason:
            raise Unsupported(f"{op}: backend {name!r} cannot serve this call: {reason}")
    return load(op, name)


@functools.cache
def load(op: str, backend: str) -> ModuleType:
    return importlib.import_module(f"dit_kernels.ops.{op}.{backend}")


@functools.cache
def unavailable(backend: str) -> str | None:
    """Why no op can use the backend on this machine, or None."""
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
            return "there is no GPU, and TRITON_INTERPRET=1 is not set"
    if backend == "cuda":
        from dit_kernels.ops import cuda_extension  # the ops import this module

        return cuda_extension.unavailable()
    return None


@dataclass(frozen=True)
class BackendStatus:
    """One line of `dit-kernels info`: a backend, the ops it serves, and what to do where it is missing."""

    name: str
    available: bool
    ops: tuple[str, ...]
    reason: str
    fix: str


def report() -> list[BackendStatus]:
    """Every backend with its state on this machine."""
    from dit_kernels.ops import cuda_extension

    fixes = {
        "the package triton is not installed": 'pip install "triton>=3.6"',
        "there is no GPU, and TRITON_INTERPRET=1 is not set": (
            "run on a machine with a GPU; TRITON_INTERPRET=1 runs the kernels slowly on the CPU"
        ),
        **cuda_extension.FIXES,
    }
    lines = [BackendStatus("reference", True, tuple(TABLE), "", "")]
    for name in NAMES[2:]:
        ops = tuple(op for op, names in TABLE.items() if name in names)
        reason = (unavailable(name) or "") if ops else "this version has no kernels for it"
        fix = fixes.get(reason, "nothing: auto takes the next backend") if reason else ""
        lines.append(BackendStatus(name, not reason, ops, reason, fix))
    return lines
