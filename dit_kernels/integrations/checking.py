"""The first call of a site against the module's own code, by the project's accuracy rule.

Three runs on the real input, without gradients:

    native   the module's own code; what its matrix products, attention and dropout gave is kept
    fused    the site; each such product gives what it gave to the native run
    exact    the module's own code in float64: every tensor enters each function in float64, casts to
             other floats do nothing, and the products give again what they gave

So the products cost nothing again, no error of theirs is counted, and the float64 run is a few passes
over the tokens. Compared are the results and what went into every product. A child module with hooks
that replace its forward (offloading, casting) counts as one product: it runs once, natively. Hooks that
keep a state, and those that people register on modules, see the real calls alone.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from dit_kernels import testing
from dit_kernels.integrations.fused import has_own_forward
from dit_kernels.ops.arguments import autocast_dtype

Key = tuple[Any, ...]
UNDECIDED = "there is nothing to compare"

# what is not replaced and costs, or is random: replayed. The number: how many leading arguments are tokens
PRODUCTS: dict[Any, int] = {
    F.linear: 1,
    torch.matmul: 2,
    Tensor.matmul: 2,
    Tensor.__matmul__: 2,
    torch.bmm: 2,
    torch.baddbmm: 0,
    torch.einsum: 0,
    F.scaled_dot_product_attention: 3,
    F.conv1d: 1,
    F.conv2d: 1,
    F.conv3d: 1,
    torch.conv1d: 1,
    torch.conv2d: 1,
    torch.conv3d: 1,
    F.dropout: 1,
    torch.rand: 0,
    torch.rand_like: 0,
    torch.randn: 0,
    torch.randn_like: 0,
    torch.randint: 0,
    torch.bernoulli: 0,
}
_EXACT = torch.float64
_NARROWINGS = (Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.double)


class _Thread(threading.local):
    running = False


_thread = _Thread()


def running() -> bool:
    """Whether this thread is inside a check: sites below the checked one let calls through."""
    return _thread.running


def batched() -> bool:
    """Whether this is inside torch.vmap, which has no rule for the ops."""
    levels = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() == torch._C._functorch.TransformType.Vmap for level in levels)


def key(args: Sequence[Any], kwargs: dict[str, Any], training: bool) -> Key:
    """What a verdict holds for: the dtypes and ranks of the tensors given, autocast, and train()."""
    tensors: list[Tensor] = []
    _collect(args, tensors)
    _collect(kwargs.values(), tensors)
    form = [(t.dtype, t.dim()) for t in tensors]
    return (*form, training, autocast_dtype(tensors[0]) if tensors else None)


def _collect(values: Iterable[Any], tensors: list[Tensor]) -> None:
    """The tensors among them, at any depth, as `tree_leaves` gives them; it costs more, and this is at every call."""
    for value in values:
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, tuple | list):
            _collect(value, tensors)
        elif isinstance(value, dict):
            _collect(value.values(), tensors)


def impossible(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether there are no values to compare: fake tensors, or a CUDA graph being captured."""
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    if any(t.is_meta or type(t).__name__ == "FakeTensor" for t in tensors):
        return True
    if torch._C._functorch.maybe_current_level() is not None:  # the weights may be wrapped too
        return True
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def difference(
    native: Callable[..., Any],
    fused: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    module: nn.Module,
    replay: bool,
) -> str | None:
    """How the fused run differs from the native one beyond the accuracy rule; None if it doesn't.

    UNDECIDED where there is nothing to compare: an empty batch, or nothing finite.
    """
    given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    record = _Record() if replay else None
    with _apart(given[0].device), _quiet_hooks(module), _hooked_children(module) as children:
        with children.run(record):
            expected = native(*args, **kwargs)
        taken = _Replay(record.products) if record else None
        try:
            with children.run(taken):
                actual = fused(*args, **kwargs)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            return f"it raises {type(error).__name__}, the module's own code doesn't ({error})"
        if actual is NotImplemented:
            return None
        if taken is not None and taken.problem:
            return taken.problem
        try:
            repeated = _Replay(record.products) if record else None
            exact = InFloat64(repeated)
            with torch.autocast(given[0].device.type, enabled=False), children.run(repeated, exact):
                oracle = native(*args, **kwargs)
        except (RuntimeError, TypeError, ValueError) as error:
            return f"it could not be checked in float64 ({error})"
    narrow = autocast_dtype(given[0])
    compared: list[tuple[str, Any, Any, Any]] = [("its result", actual, expected, oracle)]
    if record is not None and taken is not None and repeated is not None:
        if len(taken.inputs) != len(record.products):
            return f"it makes {len(taken.inputs)} products where the module makes {len(record.products)}"
        compared = [
            (f"what goes into {product.name}", got, product.inputs, true)
            for product, got, true in zip(
                record.products, taken.inputs, repeated.inputs, strict=True
            )
        ] + compared
    decided = False
    for what, *sides in compared:
        # detached: a checkpoint counts what is kept for a backward
        leaves = [
            [
                t.detach()
                for t in tree_leaves(side)
                if isinstance(t, Tensor) and t.is_floating_point()
            ]
            for side in sides
        ]
        if len({len(found) for found in leaves}) != 1:
            return f"{what} has {len(leaves[0])} tensors and not {len(leaves[1])}"
        for got, plain, true in zip(*leaves, strict=True):
            if narrow is not None and what != "its result":
                # autocast rounds what goes into a product, wherever it was rounded before
                got, plain = (t.to(narrow) if t.dtype == torch.float32 else t for t in (got, plain))
            if got.dtype != plain.dtype or got.shape != plain.shape:
                return (
                    f"{what} is {got.dtype} {list(got.shape)}, the module's own"
                    f" {plain.dtype} {list(plain.shape)}"
                )
            # what has overflowed, or was NaN when it came, has no right value
            finite = plain.isfinite()
            if not finite.any():
                continue
            decided = decided or what == "its result"
            got, plain, true = (t.where(finite, 0) for t in (got, plain, true))
            worst, bound = testing.error(got, true), testing.allowed(plain, true)
            if not worst <= bound:
                return f"{what} is off by {worst:.2e}, allowed {bound:.2e}"
    return None if decided else UNDECIDED


@contextlib.contextmanager
def _apart(device: torch.device) -> Iterator[None]:
    """Without gradients, and without moving the random numbers on."""
    devices = [] if device.type == "cpu" else [device]
    _thread.running = True
    try:
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"),
        ):
            yield
    finally:
        _thread.running = False


class _Children:
    """The hooked modules below the checked one, for as long as the check takes."""

    def __init__(self) -> None:
        self.products: _Record | _Replay | None = None

    @contextlib.contextmanager
    def run(self, products: _Record | _Replay | None, mode: Any = None) -> Iterator[None]:
        self.products = products
        try:
            with mode or products or contextlib.nullcontext():
                yield
        finally:
            self.products = None

    def forward(self, own: Callable[..., Any], checked: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.products is None or not running():  # another thread's call
                return own(*args, **kwargs)
            return self.products.child(checked, args, kwargs)

        return call


@contextlib.contextmanager
def _hooked_children(module: nn.Module) -> Iterator[_Children]:
    children = _Children()
    replaced = {m: m.__dict__["forward"] for m in _hooked(module)}
    for child, own in replaced.items():
        child.__dict__["forward"] = children.forward(own, _without_state(child) or own)
    try:
        yield children
    finally:
        for child, own in replaced.items():
            child.__dict__["forward"] = own


def _hooked(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if has_own_forward(child):
            yield from _hooked(child)
        else:
            yield child


def _without_state(module: nn.Module) -> Callable[..., Any] | None:
    """The module's forward without those of diffusers' hooks that count calls or keep results: its caches.

    None where it has none of them.
    """
    registry: Any = module.__dict__.get("_diffusers_hook")
    hooks = [registry.hooks[name] for name in registry._hook_order] if registry else []
    if "_hf_hook" in module.__dict__ or not any(hook._is_stateful for hook in hooks):
        return None
    innermost = registry._fn_refs[0]
    forward = innermost.original_forward or innermost.forward
    for hook in hooks:
        if not hook._is_stateful and not hasattr(hook, "new_forward"):
            forward = functools.partial(_through, hook, module, forward)
    return forward


def _through(
    hook: Any, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    args, kwargs = hook.pre_forward(module, *args, **kwargs)
    return hook.post_forward(module, forward(*args, **kwargs))


@contextlib.contextmanager
def _quiet_hooks(module: nn.Module) -> Iterator[None]:
    """What people hang on the modules below sees a model's calls, and none of a check's.

    Hooks that bring weights in stay: FSDP2's, tensor parallelism's, DeepSpeed's.
    """
    quieted = []
    for child in module.modules():
        for hooks in (child._forward_pre_hooks, child._forward_hooks):
            for name, hook in hooks.items():
                owner = getattr(hook, "__module__", None) or type(hook).__module__
                if not owner.startswith(("torch.distributed.", "deepspeed.")):
                    quieted.append((hooks, name, hook))
    for hooks, name, hook in quieted:
        hooks[name] = functools.partial(_unless_running, hook)
    try:
        yield
    finally:
        for hooks, name, hook in quieted:
            if name in hooks:
                hooks[name] = hook


def _unless_running(hook: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return None if running() else hook(*args, **kwargs)


@dataclass
class _Product:
    name: str
    inputs: list[Tensor]
    output: Any


def _is_product(function: Any, args: Any, kwargs: Any) -> bool:
    if function is F.dropout:
        share = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
        return bool(share and kwargs.get("training", args[2] if len(args) > 2 else True))
    if function in PRODUCTS:
        return True
    # kernels of other packages, such as flash attention
    space = getattr(function, "namespace", None)
    return space is not None and space not in ("aten", "prims", "prim", "dit_kernels")


def _inputs(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    count = PRODUCTS.get(function, 0)
    return [t for t in (*args, *kwargs.values())[:count] if isinstance(t, Tensor)]


def _kept(output: Any) -> Any:
    """A copy: code may write into what a product gave."""
    return tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, output)


class _Record(TorchFunctionMode):
    """Keeps what each product takes and gives."""

    def __init__(self) -> None:
        self.products: list[_Product] = []
        self.inside = False

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if not self.inside and _is_product(function, args, kwargs):
            name = getattr(function, "__name__", str(function))
            inputs = _inputs(function, args, kwargs)
            self.products.append(_Product(name, inputs, _kept(result)))
        return result

    def child(self, own: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self.inside = True
        result = own(*args, **kwargs)
        self.inside = False
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        self.products.append(_Product("a module with hooks", inputs, _kept(result)))
        return result


class _Replay(TorchFunctionMode):
    """Gives each product what it gave before, and keeps what it was asked with."""

    def __init__(self, products: list[_Product]) -> None:
        self.products = products
        self.inputs: list[list[Tensor]] = []
        self.problem = ""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if _is_product(function, args, kwargs):
            return self.give(function, args, kwargs)
        return function(*args, **kwargs)

    def give(self, function: Any, args: Any, kwargs: Any) -> Any:
        name = getattr(function, "__name__", str(function))
        return self.next(name, _inputs(function, args, kwargs), function, args, kwargs)

    def child(self, own: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        return self.next("a module with hooks", inputs, own, args, kwargs)

    def next(self, name: str, inputs: list[Tensor], function: Any, args: Any, kwargs: Any) -> Any:
        index = len(self.inputs)
        if index >= len(self.products) or self.products[index].name != name:
            self.problem = self.problem or f"product {index} is {name}, not the module's own"
            return function(*args, **kwargs)
        self.inputs.append(inputs)
        return _kept(self.products[index].output)


class InFloat64(TorchFunctionMode):
    """Inside, code written for any dtype runs in float64."""

    def __init__(self, replay: _Replay | None = None) -> None:
        self.replay = replay

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") in ("__get__", "__set__"):
            return function(*args, **kwargs)
        args, kwargs = tree_map(_exact, (args, kwargs))
        if function in _NARROWINGS:
            return args[0]
        if function is Tensor.type_as:
            return args[0]
        if function is Tensor.to:
            args = tuple(_EXACT if _is_float(a) else a for a in args)
            if len(args) > 1 and isinstance(args[1], Tensor):
                args = (args[0], args[1].device)
        if _is_float(kwargs.get("dtype")):
            kwargs["dtype"] = _EXACT
        if self.replay is not None and _is_product(function, args, kwargs):
            return tree_map(_exact, self.replay.give(function, args, kwargs))
        return tree_map(_exact, function(*args, **kwargs))


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.dtype) and value.is_floating_point


def _exact(value: Any) -> Any:
    if isinstance(value, Tensor) and type(value) in (Tensor, torch.nn.Parameter):
        if value.dtype in (torch.float32, torch.bfloat16, torch.float16):
            return value.to(_EXACT)
        if value.dtype == torch.complex64:
            return value.to(torch.complex128)
    return value
