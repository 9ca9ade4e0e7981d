"""Every op at every shape: a benchmark case is a public function and a maker of its arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.shapes import Shape
from dit_kernels import backends, measured, ops

Arguments = dict[str, Any]
Random = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """`make(shape, randn)` gives the keyword arguments of `ops.<function>`."""

    op: str
    name: str
    function: str
    make: Callable[[Shape, Random], Arguments]

    def arguments(self, shape: Shape, dtype: torch.dtype, device: str, seed: int) -> Arguments:
        generator = None
        if device != "meta":
            generator = torch.Generator(device).manual_seed(seed)

        def randn(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device, dtype=dtype)

        return self.make(shape, randn)

    def cost(self, shape: Shape, dtype: torch.dtype) -> dict[str, tuple[int, int]]:
        """(FLOPs, bytes) forward and backward, from the op's own cost()."""
        arguments = self.arguments(shape, dtype, "meta", 0)
        if shape.lengths and self.op == "attention3d":
            # without grids the op counts every sequence as the longest
            arguments["grid"] = [(1, 1, length) for length in shape.lengths]
        return backends.load(self.op, "reference").cost(*self._registered(arguments))

    def call_class(self, shape: Shape, dtype: torch.dtype) -> measured.CallClass:
        """What `auto` looks up to find the backend that was the fastest."""
        arguments = self.arguments(shape, dtype, "meta", 0)
        return measured.call_class(self.op, self._registered(arguments))

    def _registered(self, arguments: Arguments) -> tuple[Any, ...]:
        """The registered op's own arguments, in its schema's order."""
        recorder = _Recorder()
        with recorder, torch.no_grad():
            getattr(ops, self.function)(**arguments)
        (args,) = recorder.calls
        return args[:-2]


class _Recorder(TorchDispatchMode):
    """Keeps the arguments of the registered ops that are called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "dit_kernels":
            self.calls.append(args)
        return func(*args, **(kwargs or {}))


def _modulation(shape: Shape, randn: Random, count: int) -> tuple[Tensor, ...]:
    """Chunks of one Linear's output, a row a sample, as models have them."""
    return randn(shape.batch, count * shape.channels).chunk(count, dim=-1)


def _adaln(shape: Shape, randn: Random) -> Arguments:
    shift, scale = _modulation(shape, randn, 2)
    return {"x": randn(shape.batch, shape.tokens, shape.channels), "shift": shift, "scale": scale}


def _adaln_rms(shape: Shape, randn: Random) -> Arguments:
    return {**_adaln(shape, randn), "norm": "rms"}


def _gated_residual(shape: Shape, randn: Random) -> Arguments:
    size = (shape.batch, shape.tokens, shape.channels)
    return {
        "residual": randn(*size),
        "branch": randn(*size),
        "gate": _modulation(shape, randn, 1)[0],
    }


def _gated_adaln(shape: Shape, randn: Random) -> Arguments:
    size = (shape.batch, shape.tokens, shape.channels)
    gate, shift, scale = _modulation(shape, randn, 3)
    return {
        "residual": randn(*size), "branch": randn(*size), "gate": gate, "shift": shift, "scale": scale
    }  # fmt: skip


def _gated_adaln_frames(shape: Shape, randn: Random) -> Arguments:
    """A modulation a frame; text tokens, which have no frame, are left out."""
    size = (shape.batch, shape.patches, shape.channels)
    rows = randn(shape.batch, shape.grid[0], 3 * shape.channels).chunk(3, dim=-1)
    return {
        "residual": randn(*size), "branch": randn(*size), "gate": rows[0], "shift": rows[1],
        "scale": rows[2],
    }  # fmt: skip


def _qkv(shape: Shape, randn: Random) -> tuple[Tensor, ...]:
    """Views into a packed projection."""
    packed = randn(shape.batch, shape.tokens, 3, shape.heads, shape.head_dim)
    return packed.unbind(2)


def _qk_norm_rope(shape: Shape, randn: Random) -> Arguments:
    q, k, _ = _qkv(shape, randn)
    over = shape.qk_norm or "head"
    width = shape.head_dim * (shape.heads if over == "hidden" else 1)
    arguments = {"q": q, "k": k, "over": over, "q_weight": randn(width), "k_weight": randn(width)}
    if shape.rope:
        cos, sin = ops.rope_3d(shape.grid, shape.rope, device=q.device)
        arguments |= {"cos": cos, "sin": sin, "rope_len": shape.patches}
    return arguments


def _attention(shape: Shape, randn: Random) -> Arguments:
    q, k, v = _qkv(shape, randn)
    return {"q": q, "k": k, "v": v}


def _attention_window(shape: Shape, randn: Random) -> Arguments:
    return {
        **_attention(shape, randn), "grid": shape.grid, "window_size": shape.window,
        "text_tokens": shape.text,
    }  # fmt: skip


def _starts(shape: Shape, device: torch.device) -> Tensor:
    starts = [sum(shape.lengths[:i]) for i in range(len(shape.lengths) + 1)]
    return torch.tensor(starts, dtype=torch.int32, device=device)


def _attention_packed(shape: Shape, randn: Random) -> Arguments:
    arguments = _attention(shape, randn)
    starts = _starts(shape, arguments["q"].device)
    return {**arguments, "cu_seqlens": starts, "max_seqlen": max(shape.lengths)}


def _gated_adaln_packed(shape: Shape, randn: Random) -> Arguments:
    """Each token reads the row of its sequence."""
    size = (1, shape.tokens, shape.channels)
    gate, shift, scale = randn(len(shape.lengths), 3 * shape.channels).chunk(3, dim=-1)
    rows = [i for i, length in enumerate(shape.lengths) for _ in range(length)]
    index = torch.tensor(rows, dtype=torch.int32, device=gate.device)
    return {
        "residual": randn(*size), "branch": randn(*size), "gate": gate, "shift": shift, "scale": scale,
        "row_index": index,
    }  # fmt: skip


def _patch_embed(shape: Shape, randn: Random) -> Arguments:
    size = [n * p for n, p in zip(shape.grid, shape.patch, strict=True)]
    return {
        "video": randn(shape.batch, shape.in_channels, *size),
        "weight": randn(shape.channels, shape.in_channels, *shape.patch),
        "bias": randn(shape.channels),
        "pos_embed": randn(shape.patches, shape.channels),
    }


def _width(shape: Shape) -> int:
    pt, ph, pw = shape.patch
    return pt * ph * pw * shape.in_channels


def _unpatchify(shape: Shape, randn: Random) -> Arguments:
    return {
        "tokens": randn(shape.batch, shape.patches, _width(shape)), "grid": shape.grid,
        "patch_size": shape.patch, "channels": shape.in_channels,
    }  # fmt: skip


def _final_layer(shape: Shape, randn: Random) -> Arguments:
    shift, scale = _modulation(shape, randn, 2)
    return {
        "x": randn(shape.batch, shape.patches, shape.channels), "shift": shift, "scale": scale,
        "weight": randn(_width(shape), shape.channels), "bias": randn(_width(shape)),
        "grid": shape.grid, "patch_size": shape.patch, "channels": shape.in_channels,
    }  # fmt: skip


def _gelu(shape: Shape, randn: Random) -> Arguments:
    return {"x": randn(shape.batch, shape.tokens, 4 * shape.channels)}


CASES = (
    Case("adaln", "adaln", "adaln", _adaln),
    Case("adaln", "adaln-rms", "adaln", _adaln_rms),
    Case("adaln", "gated_residual", "gated_residual", _gated_residual),
    Case("adaln", "gated_adaln", "gated_adaln", _gated_adaln),
    Case("adaln", "gated_adaln-frames", "gated_adaln", _gated_adaln_frames),
    Case("adaln", "gated_adaln-packed", "gated_adaln", _gated_adaln_packed),
    Case("qk_norm_rope", "qk_norm_rope", "qk_norm_rope", _qk_norm_rope),
    Case("attention3d", "attention", "attention3d", _attention),
    Case("attention3d", "attention-window", "attention3d", _attention_window),
    Case("attention3d", "attention-packed", "attention3d", _attention_packed),
    Case("patch_embed", "patch_embed", "patch_embed", _patch_embed),
    Case("unpatchify", "unpatchify", "unpatchify", _unpatchify),
    Case("final_layer", "final_layer", "final_layer", _final_layer),
    Case("feed_forward", "gelu", "gelu_bias", _gelu),
    Case("feed_forward", "swiglu", "swiglu", _gelu),
)


def cases_for(shape: Shape, wanted: tuple[str, ...] = ()) -> Iterator[Case]:
    """The cases that a shape has; `wanted` keeps ops or cases of these names."""
    for case in CASES:
        if wanted and case.op not in wanted and case.name not in wanted:
            continue
        if case.name.endswith("-packed") != bool(shape.lengths):
            continue
        if case.name == "attention-window" and shape.window is None:
            continue
        if case.op == "qk_norm_rope" and shape.qk_norm is None:
            continue
        yield case
