"""Triton without a GPU: real calls of the public ops, whose launches are recorded instead of made.

A recorded launch keeps the arguments, so a kernel is compiled from what a call really passes: alignment,
strides of chunk views and constants included. Tensors are allocated on the CPU and never touched.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from dit_kernels import backends
from dit_kernels.ops import triton_launch, triton_tuning

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

# what `triton_launch.architecture` calls a target
ARCHITECTURES = {"gfx942": "amd"}


class _Utilities:
    """Nothing is loaded."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 1 << 20}

    def load_binary(self, *args: Any) -> tuple[Any, ...]:
        return object(), 0, 0, 0, 1024

    def unload_module(self, module: Any) -> None:
        """Triton 3.9 calls it when a kernel is collected."""


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

    @property
    def tensors(self) -> list[Tensor]:
        """What the kernel gets as pointers, in order."""
        found: list[Tensor] = []
        for arg in self.args:
            found += [
                t for t in (arg if isinstance(arg, tuple) else (arg,)) if isinstance(t, Tensor)
            ]
        return found

    @property
    def tile(self) -> str:
        """The kernel's BLOCK sizes."""
        return "x".join(str(n) for name, n in self._named().items() if name.startswith("BLOCK_"))

    @property
    def run(self) -> int:
        """Bytes of the pieces that a kernel moves whole, where they are no power of two; else 16.

        A tile is powers of two: unpatchify pads its innermost axis, of A3 values (Mochi: 12 channels), to P3.
        """
        named = self._named()
        size = self.tensors[0].element_size()
        return named["A3"] * size if named.get("A3") != named.get("P3") else 16

    def _named(self) -> dict[str, Any]:
        names = (p.name for p in self.kernel.params)
        return {**dict(zip(names, self.args, strict=False)), **self.options}

    def key(self, target: str) -> str:
        """A hash of what the binary is made from and that this repository decides, whichever Triton compiles it.

        The code of the kernel and of what it calls, and of each argument what Triton specialises on.
        """
        named = self._named()
        described = [
            (p.name, _described(named.pop(p.name), p.is_constexpr, p.do_not_specialize))
            for p in self.kernel.params
            if p.name in named
        ]
        parts = (_code(self.kernel), described, sorted(named.items()), target)
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def compile(self, target: str) -> Any:
        """As Triton compiles it for these arguments."""
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
        return triton.compile(source, target=TARGETS[target], options=dict(parsed.__dict__))


def _described(value: Any, constant: bool, plain: bool) -> Any:
    """What Triton specialises on."""
    if isinstance(value, tuple) and not constant:
        return tuple(_described(item, constant, plain) for item in value)
    if isinstance(value, Tensor):
        return str(value.dtype), value.data_ptr() % 16 == 0
    if constant or value is None:
        return repr(value)
    if isinstance(value, int) and not plain:
        return "int", value == 1, value % 16 == 0, value >= 2**31
    return type(value).__name__


@functools.cache
def _code(function: Any) -> str:
    """A Triton function without comments, docstring and layout; then the functions and constants it uses."""
    own = function.fn
    words, after = [], tokenize.NEWLINE
    lines = iter(function.raw_src)  # as it was imported: the file may have changed since
    for kind, text, *_ in tokenize.generate_tokens(lambda: next(lines, "")):
        if kind in (tokenize.COMMENT, tokenize.NL):
            continue
        statement = kind == tokenize.STRING and after in (tokenize.NEWLINE, tokenize.INDENT)
        if not statement:
            words.append(tokenize.tok_name[kind] if text.isspace() or not text else text)
        after = kind
    parts = [" ".join(words)]
    for name in sorted(set(words)):
        used = own.__globals__.get(name)
        if getattr(getattr(used, "fn", None), "__module__", "").startswith("dit_kernels"):
            if used is not function:
                parts.append(_code(used))
        elif isinstance(used, triton.language.constexpr | int | float | str):
            parts.append(f"{name} = {getattr(used, 'value', used)!r}")
    return "\n".join(parts)


@contextlib.contextmanager
def recorded(target: str = "sm_90") -> Iterator[list[Launch]]:
    """Inside, every Triton backend takes CPU tensors and its launches are listed, not made.

    Tiles are those that the backends choose for `target`.
    """
    launches: list[Launch] = []

    def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        if 0 not in grid:
            launches.append(Launch(kernel, grid, args, {"enable_fp_fusion": True, **options}))

    before = triton_launch.launch, triton_launch.architecture
    triton_launch.launch = launch
    triton_launch.architecture = lambda device: ARCHITECTURES.get(target, target)  # type: ignore[assignment]
    try:
        with _on_the_host():
            yield launches
    finally:
        triton_launch.launch, triton_launch.architecture = before


@contextlib.contextmanager
def launched(target: str = "sm_90") -> Iterator[None]:
    """Inside, launches go all the way through Triton's own run and stop at the driver's launch."""
    before = driver._active
    driver.set_active(Driver(target))
    try:
        with _on_the_host():
            yield
    finally:
        driver._active = before


@contextlib.contextmanager
def _on_the_host() -> Iterator[None]:
    """Inside, CPU tensors go to the Triton backends; no plan made elsewhere is used, or kept after."""
    before = triton_launch.host_tensors, backends.unavailable, triton_tuning.tuned
    triton_launch.host_tensors = True
    triton_tuning.tuned = dict  # type: ignore[assignment]  # nothing: the defaults
    backends.unavailable = lambda backend: None  # type: ignore[assignment]
    triton_launch.Plans.clear()
    try:
        yield
    finally:
        triton_launch.host_tensors, backends.unavailable, triton_tuning.tuned = before
        triton_launch.Plans.clear()
