"""Random small calls of every op: the view of each tensor, which gradients are asked for, and the cotangents' views.

A seed names its calls, which are the same in every run and on every device. What lies between the elements of a view is NaN.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_kernels import ops, testing

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Draw:
    """What one call is drawn from. Often little is unusual in it: else no vector kernel would take it."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.generator = torch.Generator("cpu").manual_seed(seed)
        self.dtype = self.one(*DTYPES)
        self.mixed, self.views = self.one(0, 0, 0.5), self.one(0.2, 0.6)

    def one(self, *options: Any) -> Any:
        return self.random.choice(options)

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def randn(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        value = torch.randn(shape, generator=self.generator, device="cpu")
        return value.to(torch.get_default_device(), dtype)

    def tensor(self, *shape: int) -> Tensor:
        dtype = self.one(*DTYPES) if self.chance(self.mixed) else self.dtype
        return self.view(self.randn(shape, dtype))

    def maybe(self, *shape: int) -> Tensor | None:
        return self.tensor(*shape) if self.chance(0.6) else None

    def view(self, value: Tensor) -> Tensor:
        """The value as it is, or in other strides: padded, permuted, expanded, with a step, from another address."""
        if not self.chance(self.views):
            return value
        shape, order = list(value.shape), list(range(value.dim()))
        padded, padding, step, offset = None, self.one(1, 2, 4, 8), 1, 0
        change = self.one("pad", "pad", "offset", "any")
        if change in ("pad", "any"):
            padded = self.one(order[-1], *order)
        if change in ("offset", "any"):
            offset = self.one(1, 2, 4, 8)
        if change == "any":
            step = self.one(1, 1, 2)
            if self.chance(0.3):
                self.random.shuffle(order)
            if len(shape) > 1 and self.chance(0.3):
                shape[self.random.randrange(len(shape) - 1)] = 1
        strides, reach = [0] * len(shape), step
        for axis in reversed(order):
            strides[axis] = reach
            reach *= shape[axis] + (padding if axis == padded else 0)
        memory = torch.full((offset + reach,), math.nan, dtype=value.dtype)
        first = value[tuple(slice(n) for n in shape)]
        return memory.as_strided(shape, strides, offset).copy_(first).expand_as(value)

    def modulation(self, samples: int, tokens: int, channels: int) -> Tensor | None:
        """A row a sample, a group of tokens or a token; or none."""
        groups = self.one(*(n for n in range(1, tokens + 1) if tokens % n == 0), tokens)
        middle = self.one(None, (), (groups,), (tokens,))
        return None if middle is None else self.tensor(samples, *middle, channels)

    def patches(self) -> dict[str, Any]:
        grid = self.one(1, 1, 2), self.one(1, 2, 3, 5), self.one(1, 2, 3, 4, 8)
        patch = self.one(1, 1, 2), self.one(1, 2, 3), self.one(1, 2, 2, 4)
        return dict(grid=grid, patch_size=patch, channels=self.one(2, 3, 4, 8, 16))


# an op, and its arguments by name
Call = tuple[str, dict[str, Any]]
Op = Callable[[Draw], Call]


def adaln(draw: Draw) -> Call:
    samples, tokens = draw.one(1, 2, 3), draw.one(1, 4, 6, 12)
    channels = draw.one(24, 33, 40, 72, 100, 264)
    shape = samples, tokens, channels
    index, rows = None, 5
    if draw.chance(0.2):
        named = [[draw.one(*range(rows)) for _ in range(tokens)] for _ in range(samples)]
        index = torch.tensor(named, dtype=torch.int32)

    def modulation() -> Tensor | None:
        return draw.modulation(*shape) if index is None else draw.maybe(rows, channels)

    def table(of: Tensor | None) -> Tensor | None:
        return draw.tensor(channels) if of is not None and draw.chance(0.4) else None

    shift, scale, gate = modulation(), modulation(), modulation()
    normed = dict(
        shift=shift, scale=scale, shift_table=table(shift), scale_table=table(scale),
        shift2=modulation() if draw.chance(0.3) else None, norm=draw.one("layer", "rms"),
        weight=draw.maybe(channels), bias=draw.maybe(channels),
    )  # fmt: skip
    gated = dict(
        residual=draw.tensor(*shape), branch=draw.tensor(*shape), gate=gate, gate_table=table(gate),
        gate_act=draw.one("none", "tanh"), branch_norm=draw.one(None, "rms"),
    )  # fmt: skip
    if gated["branch_norm"]:
        gated["branch_weight"] = draw.maybe(channels)
    function = draw.one("adaln", "gated_residual", "gated_adaln")
    kwargs = {
        "adaln": {"x": draw.tensor(*shape), **normed},
        "gated_residual": gated,
        "gated_adaln": {**gated, **normed},
    }[function]
    return function, {**kwargs, "row_index": index}


def qk_norm_rope(draw: Draw) -> Call:
    samples, tokens, heads = draw.one(1, 2), draw.one(1, 3, 7), draw.one(1, 2, 3)
    dim, over = draw.one(8, 16, 24, 32, 40, 64, 72), draw.one("head", "hidden")
    width = dim * heads if over == "hidden" else dim
    shape = samples, tokens, heads, dim
    kwargs = dict(
        q=draw.tensor(*shape), k=draw.tensor(*shape),
        q_weight=draw.maybe(width), k_weight=draw.maybe(width), q_bias=draw.maybe(width),
        norm=draw.one("rms", "layer"), over=over, layout=draw.one("interleaved", "half"),
        act=draw.one(None, None, "relu"),
    )  # fmt: skip
    if draw.chance(0.7):
        rows = draw.one((tokens,), (1, tokens, 1), (samples, tokens, 1), (samples, tokens, heads))
        for name in ("cos", "sin"):
            kwargs[name] = draw.tensor(*rows, dim // 2)
    return "qk_norm_rope", kwargs


def patch_embed(draw: Draw) -> Call:
    form, samples, channels = draw.patches(), draw.one(1, 2), draw.one(8, 16, 24, 33, 72, 136)
    sizes = [n * p for n, p in zip(form["grid"], form["patch_size"], strict=True)]
    return "patch_embed", dict(
        video=draw.tensor(samples, form["channels"], *sizes),
        weight=draw.tensor(channels, form["channels"], *form["patch_size"]),
        bias=draw.maybe(channels), pos_embed=draw.maybe(math.prod(form["grid"]), channels),
    )  # fmt: skip


def unpatchify(draw: Draw) -> Call:
    form, samples = draw.patches(), draw.one(1, 2)
    values = math.prod(form["patch_size"]) * form["channels"]
    tokens = draw.tensor(samples, math.prod(form["grid"]), values)
    return "unpatchify", dict(tokens=tokens, layout=layout(draw), **form)


def final_layer(draw: Draw) -> Call:
    form, samples, width = draw.patches(), draw.one(1, 2), draw.one(8, 16, 24, 33, 72, 136)
    form["channels"] = min(form["channels"], 10)  # Triton's has at most 256 values a patch
    values = math.prod(form["patch_size"]) * form["channels"]
    shape = samples, math.prod(form["grid"]), width
    return "final_layer", dict(
        x=draw.tensor(*shape), shift=draw.modulation(*shape), scale=draw.modulation(*shape),
        weight=draw.tensor(values, width), bias=draw.maybe(values), layout=layout(draw),
        norm=draw.one("layer", "rms"), **form,
    )  # fmt: skip


def layout(draw: Draw) -> str:
    return " ".join(draw.random.sample("thwc", 4))


def feed_forward(draw: Draw) -> Call:
    rows, width = draw.one((7,), (2, 5), (3, 1)), draw.one(8, 20, 32, 33, 264)
    if draw.chance(0.5):
        form, options = "gelu_bias", {"approximate": draw.one("none", "tanh")}
    else:
        form, options, width = "swiglu", {"gate": draw.one("first", "second")}, 2 * width
    return form, dict(x=draw.tensor(*rows, width), bias=draw.maybe(width), **options)


# calls of one test: in CUDA as many as the emulator makes in less than a second; in Triton few, as a call
# compiles kernels of its own on a GPU
OPS = {
    adaln: (25, 6),
    qk_norm_rope: (75, 6),
    patch_embed: (80, 6),
    unpatchify: (150, 6),
    final_layer: (40, 6),
    feed_forward: (25, 6),
}


def results(
    function: str,
    kwargs: dict[str, Any],
    wanted: list[str],
    cotangents: list[Tensor],
    backend: str | None,
) -> list[Tensor]:
    """The outputs, then the gradients that are asked for."""
    leaves = {name: kwargs[name].detach().requires_grad_() for name in wanted}
    made = getattr(ops, function)(**{**kwargs, **leaves}, backend=backend)
    outputs = [o for o in (made if isinstance(made, tuple) else (made,)) if o is not None]
    pairs = [(o, g) for o, g in zip(outputs, cotangents, strict=True) if o.requires_grad]
    if not pairs:
        return outputs
    reached, given = zip(*((o, g.to(o.dtype)) for o, g in pairs), strict=True)
    grads = torch.autograd.grad(
        reached, list(leaves.values()), given, allow_unused=True, materialize_grads=True
    )
    return [*outputs, *grads]


def described(kwargs: dict[str, Any]) -> str:
    def words(value: Any) -> str:
        if not isinstance(value, Tensor):
            return repr(value)
        where = f"{tuple(value.stride())} from {value.storage_offset()}"
        return f"{value.dtype} {list(value.shape)}, strides {where}"

    return "".join(f"\n  {name} = {words(value)}" for name, value in kwargs.items())


def call(op: Op, seed: int) -> tuple[str, Callable[[str | None, torch.dtype], list[Tensor]]]:
    """The call in words, and what it gives by a backend: in float64, or as it was drawn."""
    draw = Draw(seed)
    function, kwargs = op(draw)
    floats = [n for n, v in kwargs.items() if isinstance(v, Tensor) and v.is_floating_point()]
    wanted = [name for name in floats if draw.chance(0.6)]
    with testing.plain_torch():
        like = testing.run(function, kwargs, backward=False).outputs.values()
    dy = [draw.view(draw.randn(out.shape, out.dtype)) for out in like]
    text = described({**kwargs, **{f"d(out{i})": g for i, g in enumerate(dy)}})
    exact = testing.converted(kwargs, torch.float64)

    def found(served: str | None, dtype: torch.dtype) -> list[Tensor]:
        values = exact if dtype == torch.float64 else kwargs
        return results(function, values, wanted, dy, served)

    return f"{function}, gradients of {wanted}{text}", found


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_random_calls(backend, op, seed, agree):
    in_cuda, in_triton = OPS[op]
    for number in range(in_cuda if backend == "cuda" else in_triton):
        text, found = call(op, 1000 * seed + number)
        try:
            agree(found)
        except (AssertionError, RuntimeError) as error:
            raise AssertionError(text) from error
