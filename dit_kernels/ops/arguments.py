"""Checks that several ops make on their arguments: each failure is one sentence, expected against got."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dit_kernels import debug

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_float(op: str, **tensors: Tensor | None) -> None:
    """Every tensor given is floating point and on the first one's device.

    Raises:
        TypeError: one has another dtype.
        ValueError: one is on another device.
    """
    device = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor; got {type(tensor).__name__}")
        if tensor.dtype not in FLOATS:
            raise TypeError(
                f"{op}: {name} must be float32, bfloat16, float16 or float64; got {tensor.dtype}"
            )
        device = tensor.device if device is None else device
        if tensor.device != device:
            raise ValueError(f"{op}: {name} must be on {device}; got {tensor.device}")


def check_given(op: str, **tensors: Tensor) -> None:
    """Arguments that have no default: None is an error too.

    Raises:
        TypeError: one is no tensor.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor; got {type(tensor).__name__}")


def check_int32(op: str, name: str, tensor: Tensor, like: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be an int32 tensor; got {type(tensor).__name__}")
    if tensor.dtype != torch.int32:
        raise TypeError(f"{op}: {name} must be int32; got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{op}: {name} must be on {like.device}; got {tensor.device}")


def check_choice(op: str, name: str, value: str | None, choices: Sequence[str | None]) -> None:
    if value not in choices:
        raise ValueError(
            f"{op}: {name} must be one of {', '.join(map(repr, choices))}; got {value!r}"
        )


def check_int(op: str, name: str, value: object, least: int = 0) -> None:
    """
    Raises:
        TypeError: no int.
        ValueError: less than `least`.
    """
    if not _is_int(value):
        raise TypeError(f"{op}: {name} must be an int; got {type(value).__name__}")
    if value < least:  # type: ignore[operator]
        raise ValueError(f"{op}: {name} must be at least {least}; got {value}")


def _is_int(value: object) -> bool:
    """numpy's, a tensor's and a symbolic one too."""
    return isinstance(value, int) or hasattr(value, "__index__")


def check_eps(op: str, eps: float) -> None:
    """The epsilon of a norm."""
    try:
        fine = 0 <= eps < math.inf
    except TypeError:
        raise TypeError(f"{op}: eps must be a number; got {type(eps).__name__}") from None
    if not fine:
        raise ValueError(f"{op}: eps must be a finite number of at least 0; got {eps}")


def check_shape(op: str, name: str, tensor: Tensor | None, shape: Sequence[int], form: str) -> None:
    """`form` is the shape in letters, as the message shows it."""
    if tensor is not None and tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{op}: {name} must be {form} = {list(shape)}; got {list(tensor.shape)}")


def check_modulation(
    op: str,
    name: str,
    modulation: Tensor,
    tokens: Sequence[int],
    row_index: Tensor | None = None,
    shape: Sequence[int] | None = None,
) -> None:
    """One of the four forms of shift, scale and gate for x seen as `tokens` [B, N, C].

    `shape` is x's as the caller gave it, for the message.
    """
    got, (samples, length, channels) = modulation.shape, tokens
    shape = tokens if shape is None else shape
    if row_index is not None:
        if len(got) != 2 or got[1] != channels:
            raise ValueError(
                f"{op}: with row_index {name} must be [R, C]; got {list(got)} for x {list(shape)}"
            )
        check_range(op, f"row_index for {name}", row_index, 0, got[0] - 1)
        return
    fits = len(got) in (2, 3) and got[0] == samples and got[-1] == channels
    if fits and len(got) == 3:
        fits = got[1] == length or (got[1] > 0 and length % got[1] == 0)
    if not fits:
        raise ValueError(
            f"{op}: {name} must be [B, C], [B, G, C] with G | N, or [B, N, C];"
            f" got {list(got)} for x {list(shape)}"
        )


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """What autocast would compute in on the tensor's device, or None outside of it."""
    kind = tensor.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def check_range(op: str, name: str, values: Tensor, low: int, high: int) -> None:
    """Only under DIT_KERNELS_DEBUG=1: it waits for the device."""
    if debug() and values.numel() and not (low <= int(values.min()) and int(values.max()) <= high):
        raise ValueError(
            f"{op}: {name} must lie in [{low}, {high}];"
            f" got values from {int(values.min())} to {int(values.max())}"
        )


def triple(op: str, name: str, value: Sequence[int], least: int = 1) -> tuple[int, int, int]:
    """Three ints, each at least `least`."""
    if isinstance(value, (int, float)) or value is None or len(value) != 3:
        raise ValueError(f"{op}: {name} must be 3 ints (t, h, w); got {value!r}")
    if not all(_is_int(v) for v in value):
        raise TypeError(f"{op}: {name} must be 3 ints (t, h, w); got {value!r}")
    if any(v < least for v in value):
        raise ValueError(f"{op}: {name} must be at least {least} on each axis; got {tuple(value)}")
    return (value[0], value[1], value[2])
