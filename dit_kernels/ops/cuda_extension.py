"""The compiled CUDA kernels: `dit_kernels._C` on a GPU, or `dit_kernels._C_emulated` on the CPU.

With DIT_KERNELS_EMULATE=1 the same kernels run on CPU tensors, slowly and with every memory access
checked (csrc/emulator). A launcher is called with where to launch, then tensors and numbers:

    kernels().feed_forward_fwd(*where(x), x, bias, y, rows, ...)
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor

EMULATED = os.environ.get("DIT_KERNELS_EMULATE") == "1"
_NAME = "dit_kernels._C_emulated" if EMULATED else "dit_kernels._C"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# reason -> what to type
FIXES = {
    "dit_kernels._C is not built": (
        "DIT_KERNELS_CUDA=1 pip install . (without nvcc on PATH the compiler comes from PyPI)"
    ),
    "dit_kernels._C_emulated is not built": "apt-get install g++, then DIT_KERNELS_CUDA=1 pip install .",
    "there is no GPU, and DIT_KERNELS_EMULATE=1 is not set": (
        "run on a machine with a GPU; DIT_KERNELS_EMULATE=1 runs the kernels slowly on the CPU"
    ),
}


def unavailable() -> str | None:
    """Why no CUDA kernel can run in this process, or None."""
    if importlib.util.find_spec(_NAME) is None:
        return f"{_NAME} is not built"
    if not EMULATED and not torch.cuda.is_available():
        return "there is no GPU, and DIT_KERNELS_EMULATE=1 is not set"
    return None


@functools.cache
def kernels() -> ModuleType:
    return importlib.import_module(_NAME)


def unsupported(*tensors: Tensor | None) -> str | None:
    """Why no CUDA kernel can take these tensors, or None: their device and dtype."""
    if kernels().takes(*tensors):
        return None
    for tensor in tensors:
        if tensor is None:
            continue
        if not (tensor.is_cpu if EMULATED else tensor.is_cuda):
            if EMULATED:
                return f"DIT_KERNELS_EMULATE=1 runs the kernels on the CPU, and a tensor is on {tensor.device}"
            return f"its tensors are on {tensor.device}, and CUDA kernels run on a GPU"
        if tensor.is_floating_point() and tensor.dtype not in DTYPES:
            return f"the CUDA kernels take float32, bfloat16 and float16; got {tensor.dtype}"
    return None


def where(tensor: Tensor) -> tuple[int, int]:
    """The first two arguments of every launcher: device and stream."""
    if EMULATED:
        return 0, 0
    device = tensor.get_device()
    return device, torch._C._cuda_getCurrentRawStream(device)


_CODES = {None: 0, torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def dtype_code(tensor: Tensor | None) -> int:
    """The number of a floating dtype in csrc/common.cuh."""
    return _CODES[None if tensor is None else tensor.dtype]


@functools.cache
def _properties(device: int) -> tuple[int, int]:
    if EMULATED:
        return 4, 227 * 1024
    properties = torch.cuda.get_device_properties(device)
    kilobytes = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}
    capability = (properties.major, properties.minor)
    return properties.multi_processor_count, 1024 * kilobytes.get(capability, 99)


def multiprocessors(tensor: Tensor) -> int:
    """Few in the emulator, so that small shapes take several steps."""
    return _properties(tensor.get_device())[0]


def shared_memory(tensor: Tensor) -> int:
    """Bytes that one block can have."""
    return _properties(tensor.get_device())[1]
