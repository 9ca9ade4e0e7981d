"""Triton without a GPU: real calls of the public ops, whose launches are recorded instead of made.

A recorded launch keeps the arguments, so a kernel is compiled from what a call really passes: alignment,
strides of chunk views and constants included. Tensors are allocated on the CPU and never touched.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from dit_kernels import backends
from dit_kernels.ops import triton_launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class _Utilities:
    """Nothing is loaded."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 1 << 20}

    def load_binary(self, *args: Any) -> tuple[Any, ...]:
        return object(), 0, 0, 0, 1024


class Driver:
    """A Triton driver for one target whose launches do nothing: argument handling and compilation are real."""

    utils = _Utilities()

    def __init__(self, target: str) -> None:
        self.target = TARGETS[target]
        self.device = list(TARGETS).index(target)  # Triton caches what it compiled by device

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return lambda *args: None


@dataclass
class Launch:
    """One launch of a call."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__.strip("_").removesuffix("_kernel")

    def source(self, target: str) -> tuple[Any, dict[str, Any], str]:
        """(source, compile options, hash of both), specialised as Triton does for these arguments."""
        driver.set_active(Driver(target))
        options = {
            "debug": False,
            "instrumentation_mode": triton.knobs.compilation.instrumentation_mode,
            **self.options,
        }
        *_, backend, binder = self.kernel.device_caches[driver.active.get_current_device()]
        bound, specialization, rest = binder(*self.args, **options)
        parsed, signature, constants, attributes = self.kernel._pack_args(
            backend, options, bound, specialization, rest
        )
        source = triton.compiler.ASTSource(self.kernel, signature, constants, attributes)
        parts = (triton.__version__, source.hash(), target, parsed.hash())
        key = hashlib.sha256("-".join(parts).encode()).hexdigest()[:16]
        return source, dict(parsed.__dict__), key

    def compile(self, target: str) -> Any:
        source, options, _ = self.source(target)
        return triton.compile(source, target=TARGETS[target], options=options)


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Inside, every Triton backend takes CPU tensors and its launches are listed, not made."""
    launches: list[Launch] = []

    def launch(
        kernel: Any, grid: tuple[int, ...], *args: Any, compiled: Any = None, **options: Any
    ) -> None:
        if 0 not in grid:
            launches.append(Launch(kernel, grid, args, {"enable_fp_fusion": True, **options}))

    before = triton_launch.launch, triton_launch.host_tensors, backends.unavailable
    triton_launch.launch = launch
    triton_launch.host_tensors = True
    backends.unavailable = lambda backend: None  # type: ignore[assignment]
    try:
        yield launches
    finally:
        triton_launch.launch, triton_launch.host_tensors, backends.unavailable = before


@contextlib.contextmanager
def launched(target: str = "sm_90") -> Iterator[None]:
    """Inside, launches go all the way through Triton's own run and stop at the driver's launch."""
    before = triton_launch.host_tensors, backends.unavailable, driver._active
    triton_launch.host_tensors = True
    backends.unavailable = lambda backend: None  # type: ignore[assignment]
    driver.set_active(Driver(target))
    try:
        yield
    finally:
        triton_launch.host_tensors, backends.unavailable, driver._active = before
