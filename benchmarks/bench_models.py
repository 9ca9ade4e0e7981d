"""Whole models: forward, training step and generation, by eager PyTorch, torch.compile and our kernels.

    dit-kernels bench models [MODEL ...] [--mode forward] [--seconds 60] [--out DIR]

One model, two sets of kernels: `eager` and `compile` run its plain formulas with torch's own attention,
`ours` the fused ops. torch.compile compiles the transformer's block, which all layers share: what people do
who don't want to wait for minutes. A generation ends at latents, without the decoder to pixels.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.bench import (
    Parser,
    Row,
    add_run_options,
    attempted,
    closing,
    lost,
    opened,
    result_file,
    task_key,
    write_rows,
)
from benchmarks.timing import timed
from dit_kernels import backends, testing
from dit_kernels.models import DiT, DiT_models

MODES = ("forward", "train", "generate")
GUIDANCE = 4.0
GROUPS = 8  # of the U-Net's norms
# seconds: with fewer left nothing is begun, or compiled; after so many on a GPU it is given up
NEEDED = {False: 5, True: 20}
PATIENCE = 300
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Model:
    """A model and what it takes.

    Args:
        make: the model; `small` gives its form of two blocks, which the float64 oracle can check.
        size, small_size: of one sample [Cin, ...].
        classes: number of class labels, or 0.
        words, text_dim: prompt tokens, or 0.
        steps: of a generation.
        missing: why it isn't there, or None.
    """

    name: str
    make: Callable[..., nn.Module]
    size: tuple[int, ...]
    small_size: tuple[int, ...] = ()
    classes: int = 0
    words: int = 0
    text_dim: int = 0
    steps: int = 50
    missing: Callable[[], str | None] = lambda: None

    def inputs(self, batch: int, device: str, dtype: torch.dtype, *, small: bool = False) -> Inputs:
        size = self.small_size if small else self.size
        found = {
            "x": torch.randn(batch, *size, device=device, dtype=dtype),
            "t": torch.rand(batch, device=device) * 1000,
        }
        if self.classes:
            found["y"] = torch.arange(batch, device=device) % self.classes
        if self.words:
            shape = (batch, 7 if small else self.words, self.text_dim)
            found["text"] = torch.randn(shape, device=device, dtype=dtype)
        return found

    def unconditional(self, inputs: Inputs) -> Inputs:
        """No class, or an empty prompt, for classifier-free guidance."""
        return {
            name: torch.full_like(value, self.classes)
            if name == "y"
            else torch.zeros_like(value)
            if name == "text"
            else value
            for name, value in inputs.items()
        }


@dataclass(frozen=True)
class Implementation:
    """How a model is run: with which kernels, and whether compiled and replayed from a CUDA graph."""

    name: str
    ours: bool = False
    compiled: bool = False
    graph: bool = False
    attention: str | None = None  # torch's kernel, by default torch's choice


IMPLEMENTATIONS = (
    Implementation("eager"),
    Implementation("ours", ours=True),
    Implementation("compile", compiled=True),
    Implementation("ours-compile-graph", ours=True, compiled=True, graph=True),
    Implementation("compile-cudnn", compiled=True, attention="CUDNN_ATTENTION"),
)


def _dit(name: str) -> Callable[..., nn.Module]:
    return functools.partial(DiT_models[name])


def _tiny(**options: Any) -> Callable[..., nn.Module]:
    return functools.partial(DiT, hidden_size=128, num_heads=4, **options)


class UNet(nn.Module):
    """diffusers' U-Net of images with classes, taking a DiT's arguments."""

    def __init__(self, width: int, size: int, channels: int, classes: int) -> None:
        super().__init__()
        from diffusers import UNet2DModel

        self.unet = UNet2DModel(
            sample_size=size, in_channels=channels, out_channels=channels, layers_per_block=2, norm_num_groups=GROUPS,
            block_out_channels=(width, 2 * width, 4 * width), num_class_embeds=classes + 1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.unet(x, t, class_labels=y).sample


def unet_beside(model: Model) -> Model:
    """A U-Net on the same latents whose forward takes the FLOPs of the model's as nearly as its width allows."""

    @functools.cache
    def width() -> int:
        wanted = flops(model, "forward")
        found: dict[int, int] = {}
        units = 16  # of the norms' groups; the FLOPs grow about as the square of the width
        while units not in found:
            found[units] = flops(made(GROUPS * units), "forward")
            units = max(1, round(units * (wanted / found[units]) ** 0.5))
        return GROUPS * min(found, key=lambda units: abs(found[units] - wanted))

    def made(channels: int | None = None) -> Model:
        def make(**_: Any) -> nn.Module:
            return UNet(channels or width(), model.size[-1], model.size[0], model.classes)

        return Model(
            "U-Net", make, model.size, classes=model.classes, steps=model.steps,
            missing=_no_diffusers,
        )  # fmt: skip

    return made()


def _no_diffusers() -> str | None:
    if importlib.util.find_spec("diffusers") is None:
        return "diffusers is not installed"
    try:
        from diffusers import UNet2DModel  # noqa: F401
    except Exception as error:  # a half-working installation must not end the run
        return f"diffusers does not import: {type(error).__name__}: {error}".splitlines()[0]
    return None


_XL = Model("DiT-XL/2", _dit("DiT-XL/2"), (4, 32, 32), (4, 8, 12), classes=1000)
_TINY = Model(
    "tiny-image", _tiny(depth=2, num_classes=10, input_size=(1, 16, 16)), (4, 16, 16), (4, 8, 12),
    classes=10, steps=2,
)  # fmt: skip
MODELS = {
    "cuda": (
        _XL,
        Model(
            "video-XL", _dit("video-XL"), (16, 16, 32, 32), (16, 3, 8, 12), words=77, text_dim=1024
        ),
        unet_beside(_XL),
    ),
    "cpu": (
        _TINY,
        Model(
            "tiny-video",
            _tiny(
                depth=2, input_size=(4, 8, 8), learn_sigma=False, pos_embed="rope", qk_norm="rms",
                text_dim=32, text_mode="cross",
            ),
            (4, 4, 8, 8), (4, 2, 8, 4), words=7, text_dim=32, steps=2,
        ),
        unet_beside(_TINY),
    ),
}  # fmt: skip


@functools.cache
def flops(model: Model, mode: str) -> int:
    """Of one sample in the matrix products of one call, by torch's counter; nothing is computed."""
    with torch.device("meta"):
        net = model.make().to(torch.bfloat16)
        inputs = model.inputs(1, "meta", torch.bfloat16)
        counter = FlopCounterMode(display=False)
        with counter:
            if mode == "train":
                net(**inputs).sum().backward()
            else:
                with torch.no_grad():
                    net(**inputs)
    # a guided step evaluates the model twice
    return counter.get_total_flops() * (2 * model.steps if mode == "generate" else 1)


@contextlib.contextmanager
def kernels(implementation: Implementation) -> Iterator[None]:
    """Inside, the ops are ours, or the plain formulas with torch's attention."""
    if implementation.ours:
        yield
        return
    reference = backends.load("attention3d", "reference")
    own = reference.eager

    def attention(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> list[Tensor]:
        text_lens, kv_lens, cu_seqlens, _, window_size, _, _, _, causal_time, _, scale, *_ = args
        masked = any(lens is not None for lens in (text_lens, kv_lens, cu_seqlens))
        if masked or window_size or causal_time:
            return own(q, k, v, *args)
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return [F.scaled_dot_product_attention(*heads_first, scale=scale).transpose(1, 2)]

    chosen = contextlib.nullcontext()
    if implementation.attention:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        chosen = sdpa_kernel(getattr(SDPBackend, implementation.attention))
    reference.eager = attention
    try:
        with testing.plain_torch(), chosen:
            yield
    finally:
        reference.eager = own


def prepared(
    model: Model, mode: str, implementation: Implementation, device: str, *, small: bool = False
) -> nn.Module:
    """The model in the dtype of its mode, nothing in it zero, compiled where the implementation is."""
    torch.manual_seed(0)
    with torch.device(device):
        net = model.make(depth=2) if small else model.make()
    for parameter in net.parameters():
        # a branch behind a gate of zero would be cheaper than it is in a trained model, and untested
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    net = net.train() if mode == "train" else net.eval().requires_grad_(False).to(torch.bfloat16)
    if implementation.compiled:
        torch._dynamo.reset()
        for part in getattr(net, "blocks", [net]):
            part.compile(fullgraph=True, dynamic=False)
    return net


def call(
    model: Model, mode: str, net: nn.Module, inputs: Inputs, implementation: Implementation
) -> Callable[[], object]:
    """What is timed."""

    def forward() -> Tensor:
        with torch.no_grad(), kernels(implementation):
            return net(**inputs)

    if mode == "forward":
        return forward
    device = inputs["x"].device.type
    if mode == "train":
        options = {"fused": True, "capturable": True} if device == "cuda" else {}
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, **options)
        target = torch.randn_like(inputs["x"])

        def step() -> Tensor:
            optimizer.zero_grad()
            with kernels(implementation):
                loss = (_velocity(net, inputs) - target).square().mean()
                loss.backward()
            optimizer.step()
            return loss.detach()

        return step

    double = {
        name: torch.cat((value, without))
        for (name, value), without in zip(
            inputs.items(), model.unconditional(inputs).values(), strict=True
        )
    }
    times = torch.linspace(1000, 1000 / model.steps, model.steps, device=device)

    def generate() -> Tensor:
        x = inputs["x"]
        with torch.no_grad(), kernels(implementation):
            for t in times:
                here = {**double, "x": torch.cat((x, x)), "t": t.expand(2 * len(x))}
                guided, free = net(**here)[:, : x.shape[1]].chunk(2)
                x = x - (free + GUIDANCE * (guided - free)) / model.steps
        return x

    return generate


def _velocity(net: nn.Module, inputs: Inputs) -> Tensor:
    """As a training loop calls a model whose weights are float32; without a learned variance."""
    x = inputs["x"]
    with torch.autocast(x.device.type, torch.bfloat16):
        return net(**inputs)[:, : x.shape[1]].float()


def accuracy(
    model: Model, mode: str, implementation: Implementation, device: str
) -> list[testing.Accuracy]:
    """The accuracy rule on two blocks and few tokens; in training also of the gradient of the input."""
    net = prepared(model, mode, implementation, device, small=True)
    plain = prepared(model, mode, IMPLEMENTATIONS[0], device, small=True)
    exact = copy.deepcopy(plain).double()
    dtype = torch.float32 if mode == "train" else torch.bfloat16
    inputs = model.inputs(2, device, dtype, small=True)

    def outputs(net: nn.Module, how: Implementation, *, oracle: bool = False) -> list[Tensor]:
        given = {
            name: value.double() if oracle and value.is_floating_point() else value
            for name, value in inputs.items()
        }
        if mode != "train":
            with torch.no_grad(), kernels(how):
                return [net(**given)]
        given["x"] = given["x"].clone().requires_grad_()
        # labels are dropped at random in training, in the same places in each run
        torch.manual_seed(0)
        with kernels(how):
            out = net(**given)[:, : given["x"].shape[1]] if oracle else _velocity(net, given)
            return [out.detach(), *torch.autograd.grad(out.square().mean(), given["x"])]

    reference = Implementation("reference", ours=True)
    with backends.use_backend("reference"):
        oracle = outputs(exact, reference, oracle=True)
    eager, got = outputs(plain, IMPLEMENTATIONS[0]), outputs(net, implementation)
    return [
        testing.Accuracy(name, testing.error(a, o), testing.allowed(e, o, torch.bfloat16))
        for name, a, e, o in zip(("output", "dx"), got, eager, oracle, strict=False)
    ]


def filling_batch(seconds: Callable[[int], float], first: int = 1, most: int = 4096) -> int:
    """The batch from which doubling gains less than 3%, or the last that memory allows.

    Raises:
        torch.OutOfMemoryError: not even the first fits.
    """
    best, rate = 0, 0.0
    batch = first
    while batch <= most:
        try:
            new = batch / seconds(batch)
        except torch.OutOfMemoryError:
            if not best:
                raise
            break
        if new < 1.03 * rate:
            break
        best, rate = batch, new
        batch *= 2
    return best


@dataclass(frozen=True)
class Task:
    """One row to be: a model in a mode, at batch 1 or at the batch that fills the machine."""

    model: Model
    mode: str
    measure: str
    implementation: Implementation


def tasks(device: str, names: Sequence[str], modes: Sequence[str]) -> list[Task]:
    """What tells most comes first: a run may be cut off."""
    order = (
        ("forward", "latency"), ("train", "throughput"), ("generate", "latency"),
        ("forward", "throughput"), ("generate", "throughput"), ("train", "latency"),
    )  # fmt: skip
    found = []
    for mode, measure in order:
        for model in MODELS[device]:
            if mode not in modes or (names and model.name not in names):
                continue
            for implementation in IMPLEMENTATIONS:
                if model.name == "U-Net" and implementation.ours:
                    continue
                found.append(Task(model, mode, measure, implementation))
    return found


def run(
    wanted: Sequence[Task],
    device: str,
    seconds: float = float("inf"),
    done: frozenset[tuple[str, ...]] = frozenset(),
) -> Iterator[Row]:
    """As `bench.run`."""
    end = time.monotonic() + seconds
    accurate: dict[tuple[str, bool, str], bool | None] = {}
    left = [task for task in wanted if task_key(_row(task)) not in done]
    for i, task in enumerate(left):
        if time.monotonic() + NEEDED[task.implementation.compiled] > end:
            yield {"unfinished": len(left) - i}
            return
        if reason := _missing(task, device):
            yield {**_row(task), "absent": reason}
            continue
        rows = functools.partial(_checked_and_measured, task, device, accurate)
        yield from attempted(_row(task), rows, device, PATIENCE)
        if lost(device):
            yield {"unfinished": len(left) - i - 1, "begun": {}}
            return


def _missing(task: Task, device: str) -> str | None:
    if device == "cpu" and task.implementation.attention:
        return "needs a GPU"
    if device == "cpu" and task.model.name == "U-Net" and task.implementation.compiled:
        return "a whole U-Net compiles for minutes on a CPU"
    return task.model.missing()


def _row(task: Task) -> Row:
    return {
        "model": task.model.name, "mode": task.mode, "measure": task.measure,
        "implementation": task.implementation.name,
        "dtype": "bfloat16 autocast" if task.mode == "train" else "bfloat16",
    }  # fmt: skip


def _checked_and_measured(
    task: Task, device: str, accurate: dict[tuple[str, bool, str], bool | None]
) -> Iterator[Row]:
    name = (task.model.name, task.mode == "train", task.implementation.name)
    if name not in accurate:
        accurate[name] = _is_accurate(task, device)
    yield {**_row(task), **_measured(task, device, accurate[name])}


def _is_accurate(task: Task, device: str) -> bool | None:
    """None where there is nothing to compare with.

    Raises:
        AssertionError: ours is not.
    """
    if task.model.name == "U-Net":  # no op of ours in it, and no oracle
        return None
    # a generation is its forwards; the rest of it is the same for all
    mode = "train" if task.mode == "train" else "forward"
    wrong = [a for a in accuracy(task.model, mode, task.implementation, device) if not a.ok]
    if wrong and task.implementation.ours:
        raise AssertionError(
            f"{wrong[0].tensor} is off by {wrong[0].error:.2e}, allowed {wrong[0].allowed:.2e}"
        )
    return not wrong


def _measured(task: Task, device: str, accurate: bool | None) -> Row:
    model, mode, implementation = task.model, task.mode, task.implementation
    batch = 1
    if task.measure == "throughput":
        batch = _filling_batch(model, mode, implementation, device)
    net = prepared(model, mode, implementation, device)
    dtype = torch.float32 if mode == "train" else torch.bfloat16
    while True:
        try:
            once = call(model, mode, net, model.inputs(batch, device, dtype), implementation)
            once()
            break
        except torch.OutOfMemoryError:  # compiled, it may need more than the search found
            if batch == 1:
                raise
            batch //= 2
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    least = 3 if mode == "generate" else 7
    timing = timed([once], device, graph=implementation.graph, seconds=2.0, least=least)
    total = flops(model, mode) * batch
    return {
        "accurate": accurate, "batch": batch, **timing.columns, "per_second": batch / timing.median,
        "flops": total, "tflops": total / timing.median / 1e12,
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
    }  # fmt: skip


def _filling_batch(model: Model, mode: str, implementation: Implementation, device: str) -> int:
    """Searched without compiling, which would take a compilation a batch; a generation is its forwards."""
    if device == "cpu":
        return 4  # a CPU is full at once
    plain = Implementation(implementation.name, ours=implementation.ours)
    mode = "forward" if mode == "generate" else mode
    net = prepared(model, mode, plain, device)
    dtype = torch.float32 if mode == "train" else torch.bfloat16

    def seconds(batch: int) -> float:
        once = call(model, mode, net, model.inputs(batch, device, dtype), plain)
        return timed([once], device, graph=False, seconds=0.0, least=2).median

    return filling_batch(seconds, first=8 if len(model.size) == 3 else 1)


def describe(row: Row, ceilings: dict[str, float]) -> str:
    name = f"{row['model']:12} {row['mode']:8} {row['measure']:10} {row['implementation']:18}"
    if "absent" in row:
        return f"{name} absent: {row['absent']}"
    if "failed" in row:
        return f"{name} FAILED: {row['failed']}"
    marks = "  INACCURATE" if row["accurate"] is False else ""
    return (
        f"{name} batch {row['batch']:4} {row['ms']:10.2f} ms {row['per_second']:9.1f} a second"
        f"  {utilisation(row, ceilings):5.1f}% of the matrix product's rate{marks}"
    )


def utilisation(row: Row, ceilings: dict[str, float]) -> float:
    """Model FLOP utilisation in percent, against the ceiling measured in the same run."""
    return 100 * row["tflops"] / ceilings["matmul_tflops"]


def main(arguments: Sequence[str] | None = None) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = [model.name for model in MODELS[device]]
    parser = Parser(
        "dit-kernels bench models", description="Time whole models: forward, training, generation."
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help="of " + ", ".join(names))
    parser.add_argument("--mode", action="append", choices=MODES, help="all by default")
    add_run_options(parser)
    parser.add_argument("--name", default="models", help="of the JSON file")
    given = parser.parse_args(arguments)
    unknown = [name for name in given.models if name not in names]
    if unknown:
        given_on = "GPU" if device == "cuda" else "CPU"
        print(
            f"dit-kernels bench models: no model {unknown[0]!r} on a {given_on}; there are {', '.join(names)}",
            file=sys.stderr,
        )
        return 2
    end = time.monotonic() + given.seconds
    wanted = tasks(device, given.models, given.mode or MODES)
    try:
        path = result_file(given.out, given.name, device, resume=given.resume)
    except (OSError, ValueError) as error:
        print(f"dit-kernels bench models: {error}", file=sys.stderr)
        return 2
    result, done = opened(path, device, resume=given.resume)
    rows = run(wanted, device, end - time.monotonic(), done)
    code = write_rows(path, result, rows, describe)
    closing(result, path)
    return code


if __name__ == "__main__":
    sys.exit(main())
