"""How an op becomes a torch op: schema, fake kernel, choice of backend and autograd, once for all ops.

    public function      checks its arguments
      -> FusedOp.__call__
        -> autograd.Function            only where a gradient can be asked for
          -> torch.ops.dit_kernels.<op>
            -> <backend>.forward        the kernel

`define` + `register_fake` under a hand-written Function is the cheapest boundary that still traces
with torch.compile(fullgraph=True); torch.library.custom_op costs half as much again a call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from dit_kernels import backends
from dit_kernels.ops.arguments import autocast_dtype

_library = torch.library.Library("dit_kernels", "DEF")

Tensors = tuple[Tensor | None, ...]


class FusedOp:
    """One registered op with its backward.

    Two torch ops are defined. Lists hold only what exists, so that nothing empty is allocated:

        <name>(<tensors>, <statics>, bool stats, str backend) -> Tensor[]
            the outputs, then with `stats` what the backward wants to be saved (row statistics)
        <name>_backward(Tensor?[] grads, <tensors>, Tensor[] saved, <statics>, bool[] needs, str backend) -> Tensor[]
            the gradients of those tensors whose `needs` is set, contiguous, in schema order

    Args:
        name: op name, also the folder under `dit_kernels/ops/`.
        tensors: schema of the tensor arguments, e.g. "Tensor x, Tensor? shift".
        statics: schema of the other arguments, e.g. "str norm, float eps".
        reference: the reference module. Its forward is differentiable plain torch: it also gives the
            reference backward, forward-mode derivatives and second derivatives of every backend. Its
            cost counts the FLOPs and bytes of a call.
        fake: (*tensors, *statics, stats) -> list of empty tensors of the right shape and dtype.
    """

    def __init__(
        self,
        name: str,
        tensors: str,
        statics: str,
        reference: ModuleType,
        fake: Callable[..., list[Tensor]],
    ) -> None:
        self.name = name
        self.n_tensors = tensors.count("Tensor")
        self.reference = reference
        statics = statics + ", " if statics else ""
        _library.define(f"{name}({tensors}, {statics}bool stats, str backend) -> Tensor[]")
        _library.define(
            f"{name}_backward(Tensor?[] grads, {tensors}, Tensor[] saved, {statics}bool[] needs, str backend)"
            " -> Tensor[]"
        )
        _library.impl(name, self._forward, "CompositeExplicitAutograd")
        _library.impl(f"{name}_backward", self._backward, "CompositeExplicitAutograd")
        torch.library.register_fake(
            f"dit_kernels::{name}", lambda *args: fake(*args[:-1]), lib=_library
        )
        torch.library.register_fake(
            f"dit_kernels::{name}_backward", self._fake_backward, lib=_library
        )
        self.forward_op = getattr(torch.ops.dit_kernels, name).default
        self.backward_op = getattr(torch.ops.dit_kernels, f"{name}_backward").default
        self.function: Any
        self.function_with_jvp: Any
        self.function, self.function_with_jvp = _autograd_functions(self)
        # torch's FlopCounterMode sees the op's matrix products
        register_flop_formula(self.forward_op.overloadpacket, get_raw=True)(self._forward_flops)
        register_flop_formula(self.backward_op.overloadpacket, get_raw=True)(self._backward_flops)

    def __call__(
        self,
        tensors: Tensors,
        statics: tuple[Any, ...],
        backend: str | None,
        *,
        outputs: int = 1,
        save: tuple[int, ...] = (),
    ) -> Sequence[Tensor]:
        """Run the op. `outputs` counts the differentiable ones; `save` lists outputs the backward reads."""
        name = backends.requested(self.name, backend)
        if torch.compiler.is_compiling():
            tensors = _distinct(tensors)
        if name == backends.PLAIN:
            return self.reference.eager(*tensors, *statics)[:outputs]
        if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
            return self.function_with_jvp.apply(outputs, save, *tensors, *statics, name)[:outputs]
        if torch.is_grad_enabled():
            for tensor in tensors:
                if tensor is not None and tensor.requires_grad:
                    return self.function.apply(outputs, save, *tensors, *statics, name)[:outputs]
        return self.forward_op(*tensors, *statics, False, name)

    def _forward(self, *args: Any) -> list[Tensor]:
        *call, stats, name = args
        module = backends.select(self.name, name, tuple(call), training=stats)
        if module is not self.reference:
            return module.forward(*call, stats)
        with _no_autocast(call):
            return [_owned(t, call) for t in module.forward(*call, stats)]

    def _backward(self, grads: list[Tensor | None], *args: Any) -> list[Tensor]:
        tensors, saved = args[: self.n_tensors], args[self.n_tensors]
        *statics, needs, name = args[self.n_tensors + 1 :]
        module = backends.select(self.name, name, (*tensors, *statics), training=True)
        if module is not self.reference:
            return module.backward(grads, *tensors, saved, *statics, needs)
        with _no_autocast(tensors), _autograd_on():
            backward = getattr(module, "backward", None)
            if backward is not None:
                result = backward(grads, tensors, statics, needs)
            else:
                result = vjp(module.forward, grads, tensors, statics, needs)
        return [_owned(t, (*grads, *tensors)) for t in result]

    def _fake_backward(self, grads: list[Tensor | None], *args: Any) -> list[Tensor]:
        tensors, needs = args[: self.n_tensors], args[-2]
        return [t.new_empty(t.shape) for t, need in zip(tensors, needs, strict=True) if need]

    def _forward_flops(self, *args: Any, out_val: Any = None) -> int:
        return self.reference.cost(*args[:-2])["forward"][0]

    def _backward_flops(self, grads: Any, *args: Any, out_val: Any = None) -> int:
        n = self.n_tensors
        return self.reference.cost(*args[:n], *args[n + 1 : -2])["backward"][0]


def vjp(
    forward: Callable[..., list[Tensor]],
    grads: Sequence[Tensor | None],
    tensors: Tensors,
    statics: Sequence[Any],
    needs: Sequence[bool],
    *,
    create_graph: bool = False,
) -> list[Tensor]:
    """Gradients of `forward`, by autograd through its plain formula.

    Each tensor enters through a node of its own, so that one passed twice isn't counted twice.
    """
    with torch.enable_grad():
        leaves = [
            t
            if t is None or not need
            else (t.view_as(t) if create_graph else t.detach().requires_grad_())
            for t, need in zip(tensors, needs, strict=True)
        ]
        wanted = [
            leaf for leaf, need in zip(leaves, needs, strict=True) if need and leaf is not None
        ]
        outputs = forward(*leaves, *statics, False)
        # an output that no wanted input reaches has no graph
        pairs = [
            (out, g)
            for out, g in zip(outputs, grads, strict=True)
            if g is not None and out.requires_grad
        ]
        if not pairs:
            return [torch.zeros_like(t) for t in wanted]
        return list(
            torch.autograd.grad(
                [out for out, _ in pairs],
                wanted,
                [g for _, g in pairs],
                create_graph=create_graph,
                allow_unused=True,
                materialize_grads=True,
            )
        )


def jvp(
    forward: Callable[..., list[Tensor]],
    tensors: Tensors,
    tangents: Sequence[Tensor | None],
    statics: Sequence[Any],
) -> list[Tensor]:
    """Forward-mode derivative as the vjp of the vjp: it is linear in the cotangent, and forward AD doesn't nest."""
    moving = [i for i, t in enumerate(tangents) if t is not None]

    def moved(*values: Tensor) -> tuple[Tensor, ...]:
        full = list(tensors)
        for i, value in zip(moving, values, strict=True):
            full[i] = value
        return tuple(forward(*full, *statics, False))

    outputs, pull = torch.func.vjp(moved, *(tensors[i] for i in moving))  # type: ignore[misc]
    zeros = tuple(torch.zeros_like(out) for out in outputs)
    _, push = torch.func.vjp(pull, zeros)  # type: ignore[misc]
    return list(push(tuple(tangents[i] for i in moving))[0])


def _autograd_functions(op: FusedOp) -> tuple[type, type]:
    """The op's Function, and the same with a jvp: Dynamo rejects a custom jvp, so that one serves eager mode only."""
    # Dynamo can carry these in a closure, but not the FusedOp itself
    n, forward_op, backward_op = op.n_tensors, op.forward_op, op.backward_op
    formula = op.reference.forward

    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(outputs: int, save: tuple[int, ...], *args: Any) -> tuple[Tensor, ...]:
            return tuple(forward_op(*args[:-1], True, args[-1]))

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            outputs, save, *args = inputs
            kept = tuple(output[i] for i in save) + tuple(output[outputs:])
            ctx.save_for_backward(*args[:n], *kept)
            ctx.mark_non_differentiable(*output[outputs:])
            ctx.set_materialize_grads(False)
            ctx.statics = tuple(args[n:-1])
            ctx.backend_name = args[-1]
            ctx.outputs = outputs

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            unpacked = ctx.saved_tensors  # once: activation checkpointing allows no second time
            tensors, saved = unpacked[:n], unpacked[n:]
            grads = grads[: ctx.outputs]
            needs = [bool(need) for need in ctx.needs_input_grad[2 : 2 + n]]
            if not torch.compiler.is_compiling() and torch.is_grad_enabled():
                # a kernel has no second derivative: under create_graph the formula is differentiated
                with _no_autocast(tensors):
                    result = vjp(formula, grads, tensors, ctx.statics, needs, create_graph=True)
            else:
                result = backward_op(
                    list(grads), *tensors, list(saved), *ctx.statics, needs, ctx.backend_name
                )
            found = iter(result)
            return (None, None, *(next(found) if need else None for need in needs)) + (None,) * (
                len(ctx.statics) + 1
            )

    class FusedWithJvp(Fused):
        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            Fused.setup_context(ctx, inputs, output)
            ctx.save_for_forward(*inputs[2 : 2 + n])
            ctx.n_stats = len(output) - inputs[0]

        @staticmethod
        def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
            tensors = ctx.saved_tensors[:n]
            with _no_autocast(tensors):
                result = jvp(formula, tensors, tangents[2 : 2 + n], ctx.statics)
            return (*result, *(None,) * ctx.n_stats)

    Fused.__name__ = Fused.__qualname__ = op.name
    FusedWithJvp.__name__ = FusedWithJvp.__qualname__ = f"{op.name}_with_jvp"
    return Fused, FusedWithJvp


def _distinct(tensors: Tensors) -> Tensors:
    """Dynamo cannot trace a Function that gets one tensor twice (k = v, say): later ones become views."""
    found: list[Tensor | None] = []
    for tensor in tensors:
        again = any(tensor is earlier for earlier in found if earlier is not None)
        found.append(tensor.view_as(tensor) if again and tensor is not None else tensor)
    return tuple(found)


def _no_autocast(args: Sequence[Any]) -> contextlib.AbstractContextManager[Any]:
    """The reference is exact: autocast must not round the matrix products inside it."""
    for arg in args:
        if isinstance(arg, Tensor):
            if autocast_dtype(arg) is not None:
                return torch.autocast(arg.device.type, enabled=False)
            break
    return contextlib.nullcontext()


def _autograd_on() -> contextlib.AbstractContextManager[Any]:
    """The reference backward differentiates its formula, also where the caller has excluded autograd.

    AOTAutograd runs an inference graph below autograd: without this a compiled function that holds the
    backward op would silently get zeros.
    """
    keys = torch._C.DispatchKey
    exclude = torch._C._dispatch_tls_local_exclude_set()
    for key in (
        keys.AutogradFunctionality,
        keys.AutogradOther,
        keys.AutogradNestedTensor,
        keys.ADInplaceOrView,
    ):
        exclude = exclude.remove(key)
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), exclude)


def _owned(result: Tensor, args: Sequence[Any]) -> Tensor:
    """A contiguous tensor that shares no memory with the arguments, as a registered op must return."""
    result = result.detach().contiguous()
    storage = result.untyped_storage()._cdata
    for arg in args:
        if isinstance(arg, Tensor) and arg.untyped_storage()._cdata == storage:
            return result.clone()
    return result
