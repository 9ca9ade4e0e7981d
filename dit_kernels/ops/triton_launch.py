"""What every `triton.py` shares: where its kernels can run, and how one is launched."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import triton
from torch import Tensor

# Triton reads TRITON_INTERPRET when a kernel is decorated, so it holds for the process
INTERPRETED = bool(triton.knobs.runtime.interpret)

if INTERPRETED:
    from dit_kernels.ops import triton_interpreter

    triton_interpreter.install()

# whether a kernel may be handed CPU tensors: in the interpreter, and where launches are only recorded
host_tensors = INTERPRETED


def unsupported(tensors: Sequence[Tensor | None]) -> str | None:
    """Why no Triton kernel can take these tensors, or None: their device, and float64."""
    for tensor in tensors:
        if tensor is None:
            continue
        if not (tensor.is_cuda or host_tensors):
            return f"its tensors are on {tensor.device}, and Triton's kernels run on a GPU"
        if tensor.dtype == torch.float64:
            return "float64 is computed by the reference backend only"
    return None


def multiprocessors(tensor: Tensor) -> int:
    """How many thread blocks run side by side at least; a fixed number where there is no GPU."""
    if tensor.is_cuda:
        return torch.cuda.get_device_properties(tensor.device).multi_processor_count
    return 132


@functools.cache
def architecture(device: torch.device) -> str:
    """The class of GPUs that tiles are chosen for; where there is no GPU that of Hopper.

    The audit replaces it: it asks for the tiles of every target on one machine.
    """
    if torch.version.hip is not None:
        return "amd"
    if device.type != "cuda":
        return "sm_90"
    major = torch.cuda.get_device_capability(device)[0]
    return {8: "sm_80", 9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


def float32_precision() -> str:
    """`input_precision` of float32 products: TF32 only where torch's own may take it."""
    # the older allow_tf32 raises where the setting was made by the newer name
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed and torch.version.hip is None else "ieee"


class Plan(NamedTuple):
    """A launch but for its pointers."""

    grid: tuple[int, ...]
    numbers: tuple[Any, ...]  # every argument after the pointers
    options: dict[str, Any]
    compiled: dict[int, Any]  # device -> binary; empty at first


class Plans:
    """What a call works out from its arguments, kept for the next one that is alike.

    Alike: shapes, strides, dtypes, 16-byte alignment and device of the tensors and all other arguments are
    equal. Nothing that Triton specialises on differs then, so a plan may hold the compiled kernel.
    """

    every: ClassVar[list[Plans]] = []

    def __init__(self, make: Callable[..., Plan]) -> None:
        self.make = make
        self.kept: dict[Any, Plan] = {}
        self.every.append(self)

    def __call__(self, tensors: Sequence[Tensor | None], *rest: Any) -> Plan:
        """`make(tensors, *rest)`. What is in neither must not change the plan or what is specialised on."""
        key = (
            *[
                t if t is None else (t.shape, t.stride(), t.dtype, t.data_ptr() & 15)
                for t in tensors
            ],
            rest,
            next(t for t in tensors if t is not None).get_device(),
        )
        plan = self.kept.get(key)
        if plan is None:
            if len(self.kept) >= 4096:
                self.kept.clear()
            plan = self.kept[key] = self.make(tensors, *rest)
        return plan

    @classmethod
    def clear(cls) -> None:
        for plans in cls.every:
            plans.kept.clear()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> Any:
    """`kernel[grid](*args, **options)` on the device of the first tensor; nothing for an empty grid.

    Every launch that Triton prepares goes through here: tests and the audit replace it.
    Floating-point fusion is always explicit: Triton 3.10 flips its default.

    Returns:
        The compiled kernel, as Triton does.
    """
    if 0 in grid:
        return None
    elsewhere = _other_device(args)
    if elsewhere is not None:
        with torch.cuda.device(elsewhere):
            return launch(kernel, grid, *args, **options)
    options.setdefault("enable_fp_fusion", True)
    return kernel[grid](*args, **options)


def run(kernel: Any, plan: Plan, *pointers: Tensor | None) -> None:
    """`launch` by a plan. From the second call on it skips Triton's argument handling, which costs more than
    the rest of a call; a profiler's launch hooks turn that off.
    """
    if plan.compiled and not triton.knobs.runtime.launch_enter_hook.calls:
        active = triton.runtime.driver.active
        device = active.get_current_device()
        binary = plan.compiled.get(device)  # none where the tensors are on another device
        if binary is not None:
            x, y, z = (*plan.grid, 1, 1)[:3]
            binary.run(
                x, y, z, active.get_current_stream(device), binary.function, binary.packed_metadata,
                None, None, None, *pointers, *plan.numbers,
            )  # fmt: skip
            return
    binary = launch(kernel, plan.grid, *pointers, *plan.numbers, **plan.options)
    if not INTERPRETED and binary is not None:
        tensor = next(t for t in pointers if t is not None)
        device = (
            tensor.get_device()
            if tensor.is_cuda
            else triton.runtime.driver.active.get_current_device()
        )
        plan.compiled[device] = binary


def _other_device(args: Sequence[Any]) -> torch.device | None:
    """The tensors' device, where it is not the current one, on which Triton would launch."""
    for arg in args:
        tensor = arg[0] if isinstance(arg, tuple) and arg else arg
        if isinstance(tensor, Tensor):
            elsewhere = tensor.is_cuda and tensor.device.index != torch.cuda.current_device()
            return tensor.device if elsewhere else None
    return None
