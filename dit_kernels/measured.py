"""Which backend was measured to be the fastest, for classes of calls on the GPUs that were measured.

`make report` writes measured.json from the committed benchmark results. On a GPU that is in it, `auto` tries
first what was fastest for the call's class, or for the nearest class of the same op; on another GPU, or where
nothing was compared, the order is that of `backends.TABLE`.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

FILE = Path(__file__).with_suffix(".json")


class CallClass(NamedTuple):
    """What calls have in common that are served by one backend.

    Args:
        op: name of the registered op.
        form: which of its tensors are there ("x" or "-") and its options in words, in the schema's order.
        itemsize: bytes an element of the first tensor.
        channels: length of its last dimension.
        size: bits of its number of elements; a class spans a factor of two.
    """

    op: str
    form: str
    itemsize: int
    channels: int
    size: int


class Fastest(NamedTuple):
    """The fastest backends of a class: of the forward alone, and of forward and backward together."""

    call: CallClass
    inference: str
    training: str


def call_class(op: str, args: Sequence[Any]) -> CallClass:
    """The class of a call, from the registered op's arguments in its schema's order."""
    form = "".join(
        [
            "x" if isinstance(arg, Tensor) else "-" if arg is None else f" {arg}"
            for arg in args
            if arg is None or isinstance(arg, Tensor | str)
        ]
    )
    first = next(arg for arg in args if isinstance(arg, Tensor))
    channels = first.shape[-1] if first.dim() else 1
    return CallClass(op, form, first.element_size(), channels, first.numel().bit_length())


def order(
    op: str, candidates: tuple[str, ...], args: Sequence[Any], *, training: bool
) -> tuple[str, ...]:
    """The candidates, the measured fastest first."""
    for first in args:
        if first is not None:
            break
    name = gpu(first.get_device())
    if not on_gpu(name):
        return candidates
    # what a class is made of, without the class: this is in every call
    key = (
        name, op, training, first.dtype, first.shape, *[a if a.__class__ is str else a is None for a in args]
    )  # fmt: skip
    known = _orders.get(key)
    if known is None:
        found = nearest(name, call_class(op, args))
        best = candidates[0] if found is None else found.training if training else found.inference
        known = (best, *(name for name in candidates if name != best))
        if len(_orders) >= 4096:
            _orders.clear()
        _orders[key] = known
    return known


_orders: dict[tuple[Hashable, ...], tuple[str, ...]] = {}


@functools.cache
def gpu(index: int) -> str:
    """The card's name; "" for the CPU, -1."""
    return torch.cuda.get_device_name(index) if index >= 0 else ""


def nearest(name: str, call: CallClass) -> Fastest | None:
    """The measured class of the same op and item size that is nearest: of the same form if there is one, then by size."""

    def distance(found: Fastest) -> tuple[bool, float]:
        channels = abs(math.log2(max(1, found.call.channels) / max(1, call.channels)))
        return found.call.form != call.form, channels + abs(found.call.size - call.size)

    alike = [
        found for found in on_gpu(name)
        if (found.call.op, found.call.itemsize) == (call.op, call.itemsize)
    ]  # fmt: skip
    return min(alike, key=distance, default=None)


@functools.cache
def on_gpu(name: str) -> tuple[Fastest, ...]:
    """What was measured on this GPU."""
    return load(FILE).get(name, ()) if name else ()


def load(path: Path) -> dict[str, tuple[Fastest, ...]]:
    """GPU -> its classes."""
    content = json.loads(path.read_text())
    return {
        name: tuple(
            Fastest(CallClass(**row["call"]), row["inference"], row["training"]) for row in rows
        )
        for name, rows in content.items()
    }


def text(measured: dict[str, Sequence[Fastest]]) -> str:
    """The file's content, a line a class."""
    gpus = []
    for name, rows in measured.items():
        lines = (
            json.dumps({"call": row.call._asdict(), "inference": row.inference, "training": row.training})
            for row in rows
        )  # fmt: skip
        gpus.append(f" {json.dumps(name)}: [\n  " + ",\n  ".join(lines) + "\n ]")
    return "{\n" + ",\n".join(gpus) + "\n}\n" if gpus else "{}\n"
