"""Correct bfloat16 and int64 for Triton's interpreter. Imported only under TRITON_INTERPRET=1.

The interpreter keeps bfloat16 as raw uint16. Upstream (3.6 to 3.9) it truncates float32 -> bfloat16
instead of rounding to nearest even, and computes sums, products and `tl.dot` on the raw bits. Here the
conversion rounds, `tl.dot` widens its operands, and every other arithmetic on bfloat16 is an error:
a kernel computes in float32. A float32 `tl.dot` is rounded once: numpy's product rounds an element by its
place in the tile, so that a backward would not find the scores of its forward, as it does on a GPU.
A number that a kernel declares as int64 is one: upstream makes every small number an int32, whose products
with others overflow where those of the compiled kernel don't.
`tl.reduce` with a function of its own, which upstream calls for every element, works on halves of the axis.
The language is patched once a launch: upstream does it again for every function that a kernel calls, which
took half of the time of the tests.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter, jit

_builder = interpreter.InterpreterBuilder


def install() -> None:
    """Once a process; a second call does nothing."""
    if interpreter._convert_float is _convert_float:
        return
    interpreter._convert_float = _convert_float
    _builder.create_dot = _create_dot
    _builder.cast_impl = _cast_impl
    for name in ("binary_op", "unary_op", "ternary_op", "create_fma", "create_erf", "create_rsqrt"):
        setattr(_builder, name, _not_on_bfloat16(getattr(_builder, name)))
    if hasattr(_builder, "create_dot_scaled"):  # since 3.9
        _builder.create_dot_scaled = _not_on_bfloat16(_builder.create_dot_scaled)
    _builder.create_atomic_rmw = _not_on_bfloat16(_builder.create_atomic_rmw)
    interpreter.ReduceScanOpInterface.apply = _not_on_bfloat16(
        interpreter.ReduceScanOpInterface.apply
    )
    interpreter.ReduceOps.generic_reduce = _generic_reduce
    interpreter._patch_lang_tensor = _patch_lang_tensor
    interpreter._patch_lang = _patch_lang
    interpreter.GridExecutor.__call__ = _launch


_upstream_convert_float = interpreter._convert_float
_upstream_cast_impl = _builder.cast_impl
_upstream_create_dot = _builder.create_dot
_upstream_patch_lang_tensor = interpreter._patch_lang_tensor
_upstream_patch_lang = interpreter._patch_lang
_upstream_launch = interpreter.GridExecutor.__call__


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 as uint16 -> float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow(values: np.ndarray, to_zero: bool = False) -> np.ndarray:
    """float32 -> bfloat16 as uint16, to nearest even."""
    bits = np.array(values, dtype=np.float32, order="C").view(np.uint32)
    nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    if not to_zero:
        bits = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    return np.where(nan, np.uint16(0x7FC0), (bits >> np.uint32(16)).astype(np.uint16))


def _convert_float(values: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
    if source == tl.float32 and target == tl.bfloat16:
        return narrow(values, to_zero=rounding == ir.ROUNDING_MODE.RTZ)
    if source == tl.bfloat16 and target == tl.float32:
        return widen(values)
    if tl.bfloat16 in (source, target):
        raise _error(f"conversion {source} -> {target}")
    return _upstream_convert_float(values, source, target, rounding)


def _cast_impl(self: Any, source: Any, target: Any) -> Any:
    pair = (source.dtype.scalar, target.scalar)
    if tl.bfloat16 in pair and tl.float32 not in pair and pair[0] != pair[1]:
        raise _error(f"conversion {pair[0]} -> {pair[1]}")
    return _upstream_cast_impl(self, source, target)


def _create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
    if d.dtype.scalar == tl.bfloat16:
        raise _error("tl.dot with a bfloat16 accumulator")
    if a.dtype.scalar == b.dtype.scalar == tl.float32:
        product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64)) + d.data
        return interpreter.TensorHandle(product.astype(d.data.dtype), d.dtype.scalar)
    a, b = (
        interpreter.TensorHandle(widen(t.data), tl.float32) if t.dtype.scalar == tl.bfloat16 else t
        for t in (a, b)
    )
    return _upstream_create_dot(self, a, b, d, *options)


def _generic_reduce(self: Any, tensors: Any) -> list[Any]:
    """A combine function over halves of the axis: upstream calls it once an element."""
    axis = self.axis
    arrays = [t.handle.data for t in tensors]
    if axis is None:
        axis, arrays = 0, [a.reshape(-1) for a in arrays]
    while (length := arrays[0].shape[axis]) > 1:
        ends = [np.take(a, range(length // 2), axis) for a in arrays]
        ends += [np.take(a, range(length // 2, length), axis) for a in arrays]
        pieces = zip(ends, tensors * 2, strict=True)
        combined = self.combine_fn.fn(*(self.to_tensor(e, t.dtype) for e, t in pieces))
        combined = combined if isinstance(combined, tuple | tl.tuple) else (combined,)
        arrays = [c.handle.data for c in combined]
    if self.keep_dims:
        shapes = [(1,) * t.handle.data.ndim if self.axis is None else a.shape for a, t in zip(arrays, tensors, strict=True)]  # fmt: skip
        arrays = [a.reshape(shape) for a, shape in zip(arrays, shapes, strict=True)]
    else:
        arrays = [a.take(0, axis) for a in arrays]
    return [self.to_tensor(a, t.dtype) for a, t in zip(arrays, tensors, strict=True)]


def _not_on_bfloat16(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def checked(self: Any, *args: Any) -> Any:
        selects = any(arg is np.where for arg in args)  # moves bits and computes nothing
        operands = args[0] if args and isinstance(args[0], tuple) else args
        for operand in () if selects else operands:
            dtype = getattr(operand, "dtype", None)
            if isinstance(dtype, tl.dtype) and dtype.scalar == tl.bfloat16:
                raise _error(method.__name__)
        return method(self, *args)

    return checked


def _error(what: str) -> TypeError:
    return TypeError(f"the Triton interpreter has no bfloat16 for {what}: convert to float32 first")


@functools.cache
def _declared_int64(kernel: Callable[..., Any]) -> frozenset[str]:
    declared = kernel.__annotations__.items()
    return frozenset(name for name, kind in declared if jit._normalize_ty(kind) == "i64")


def _launch(grid: Any, *args: Any, **kwargs: Any) -> None:
    declared = _declared_int64(grid.fn)

    def number(name: str, value: Any) -> Any:
        if name not in declared or not isinstance(value, int):
            return value
        return tl.tensor(interpreter.TensorHandle(np.array([value], np.int64), tl.int64), tl.int64)

    _upstream_launch(
        grid,
        *(number(name, value) for name, value in zip(grid.arg_names, args, strict=False)),
        **{name: number(name, value) for name, value in kwargs.items()},
    )


def _patch_lang_tensor(tensor: Any, *scope: Any) -> None:
    _upstream_patch_lang_tensor(tensor, *scope)
    # a scalar is an array of one element, which int() no longer takes since numpy 2.4 (triton 3.6)
    tensor.__index__ = lambda self: int(self.handle.data.item())


_launched = False  # whether a kernel is running, and so the language patched
# what a kernel and the standard functions that it calls may know the language as
_languages = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})


def _patch_lang(function: Any) -> Any:
    global _launched
    if _launched:
        return None  # for a call inside a kernel, of which upstream keeps nothing
    scope = _upstream_patch_lang(_languages)
    restore = scope.restore

    def end_of_launch() -> None:
        global _launched
        _launched = False
        restore()

    scope.restore = end_of_launch
    _launched = True
    return scope
