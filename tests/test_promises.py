"""What every op promises, over the example inputs of all of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

from dit_kernels import backends, ops, testing, use_backend

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CASES = {case.id: case for case in testing.cases(torch.float64)}
every_case = pytest.mark.parametrize("name", CASES)


def cases(dtype: torch.dtype) -> Iterator[testing.Case]:
    """Where tensors are made by default: tests/kernels runs some of these tests on a GPU."""
    return testing.cases(dtype, torch.get_default_device().type)


def in_dtype(name: str, dtype: torch.dtype) -> testing.Case:
    return next(case for case in cases(dtype) if case.id == name)


def differentiable(case: testing.Case):
    """(function of the floating tensors, those tensors as leaves)"""
    floats = {
        k: v for k, v in case.kwargs.items() if isinstance(v, Tensor) and v.is_floating_point()
    }
    rest = {k: v for k, v in case.kwargs.items() if k not in floats}

    def call(*values: Tensor):
        result = getattr(ops, case.function)(**dict(zip(floats, values, strict=True)), **rest)
        result = result if isinstance(result, tuple) else (result,)
        return tuple(out for out in result if out is not None)

    return call, [v.detach().clone().requires_grad_() for v in floats.values()]


@every_case
@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy_forward_and_backward(name, dtype):
    for measured in testing.measure(in_dtype(name, DTYPES[dtype]), backend="reference"):
        assert measured.ok, measured


@every_case
def test_the_eager_formula_is_the_same_function(name):
    """What the bound is made from must itself be right: a wrong eager would excuse a wrong kernel."""
    case = CASES[name]
    expected = testing.run(case.function, case.kwargs, backend="reference").all()
    with testing.plain_torch():
        eager = testing.run(case.function, case.kwargs).all()
    for tensor, value in expected.items():
        torch.testing.assert_close(eager[tensor], value, rtol=1e-10, atol=1e-10)


@every_case
def test_gradient_is_the_derivative(name):
    call, leaves = differentiable(CASES[name])
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@every_case
def test_second_derivative(name):
    call, leaves = differentiable(CASES[name])
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@every_case
def test_forward_mode_derivative(name):
    call, leaves = differentiable(CASES[name])
    assert torch.autograd.gradcheck(
        call, leaves, fast_mode=True, check_forward_ad=True, check_backward_ad=False
    )
    values = tuple(leaf.detach() for leaf in leaves)
    tangents = tuple(torch.randn_like(v) for v in values)
    outputs, pushed = torch.func.jvp(call, values, tangents)
    step = 1e-6
    moved = call(*(v + step * t for v, t in zip(values, tangents, strict=True)))
    back = call(*(v - step * t for v, t in zip(values, tangents, strict=True)))
    for out, push, up, down in zip(outputs, pushed, moved, back, strict=True):
        finite = out.isfinite()
        torch.testing.assert_close(
            push[finite], ((up - down) / (2 * step))[finite], rtol=1e-4, atol=1e-6
        )


@every_case
def test_only_asked_gradients_change_nothing(name):
    """Each tensor alone gets the gradient that it gets among all."""
    call, leaves = differentiable(CASES[name])
    outputs = call(*leaves)
    cotangents = [torch.randn_like(out) for out in outputs]
    together = torch.autograd.grad(
        outputs, leaves, cotangents, materialize_grads=True, allow_unused=True
    )
    for i, expected in enumerate(together):
        alone = [leaf.detach().requires_grad_(i == j) for j, leaf in enumerate(leaves)]
        outputs = call(*alone)
        reached = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
        (grad,) = torch.autograd.grad(
            [o for o, _ in reached], [alone[i]], [c for _, c in reached],
            materialize_grads=True, allow_unused=True,
        )  # fmt: skip
        assert torch.equal(grad, expected)


@every_case
def test_torch_compile_fullgraph_forward_and_backward(name):
    case = in_dtype(name, torch.float32)
    call, leaves = differentiable(case)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    expected, got = call(*leaves), compiled(*leaves)
    cotangents = [torch.randn_like(out) for out in expected]
    options = {"allow_unused": True, "materialize_grads": True}
    pairs = zip(
        (*expected, *torch.autograd.grad(expected, leaves, cotangents, **options)),
        (*got, *torch.autograd.grad(got, leaves, cotangents, **options)),
        strict=True,
    )
    assert all(torch.equal(a, b) for a, b in pairs)


@every_case
def test_opcheck(name, monkeypatch):
    """The registered ops, forward and backward, as a call of the public function reaches them."""
    case = in_dtype(name, torch.float32)
    op = __import__(f"dit_kernels.ops.{case.op}", fromlist=["_op"])._op
    forward, backward = op.forward_op, op.backward_op
    given, passed = [], []
    monkeypatch.setattr(op, "forward_op", lambda *args: given.append(args) or forward(*args))
    run = type(op).__call__
    monkeypatch.setattr(
        type(op), "__call__", lambda *args, **kept: passed.append(kept) or run(*args, **kept)
    )
    call, leaves = differentiable(case)
    outputs = call(*(leaf.detach() for leaf in leaves))
    ((*arguments, stats, backend),) = given
    assert stats is False
    torch.library.opcheck(forward, (*arguments, True, backend))
    torch.library.opcheck(forward, (*arguments, False, backend))
    tensors, statics = arguments[: op.n_tensors], arguments[op.n_tensors :]
    everything = forward(*tensors, *statics, True, backend)
    saved = [everything[i] for i in passed[0].get("save", ())] + everything[len(outputs) :]
    needs = [t is not None and t.is_floating_point() for t in tensors]
    grads = [torch.randn_like(out) for out in everything[: len(outputs)]]
    torch.library.opcheck(backward, (grads, *tensors, saved, *statics, needs, backend))


@every_case
def test_non_contiguous_inputs_give_the_same(name):
    case = CASES[name]
    wide = {
        k: v.new_zeros(*v.shape, 2).copy_(v[..., None].expand(*v.shape, 2))[..., 0]
        if isinstance(v, Tensor) and v.is_floating_point()
        else v
        for k, v in case.kwargs.items()
    }
    expected = testing.run(case.function, case.kwargs).all()
    got = testing.run(case.function, wide).all()
    for tensor, value in expected.items():
        torch.testing.assert_close(got[tensor], value, rtol=1e-12, atol=1e-12)


@every_case
def test_autocast_keeps_the_gradients_dtypes(name):
    case = in_dtype(name, torch.float32)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        result = testing.run(case.function, case.kwargs)
    for tensor, grad in result.grads.items():
        assert grad.dtype == case.kwargs[tensor].dtype
        assert grad.shape == case.kwargs[tensor].shape
    inputs = case.kwargs.values()
    expected = torch.bfloat16 if case.op == "attention3d" else torch.float32
    assert result.outputs["out0"].dtype == expected, inputs


def test_autocast_rounds_nothing_inside_a_derivative():
    """Asked for inside autocast: with create_graph, and in forward mode."""
    case = in_dtype("final_layer-dit", torch.float32)
    call, leaves = differentiable(case)
    values = tuple(leaf.detach() for leaf in leaves)

    def derivatives():
        (out,) = call(*leaves)
        grads = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        return *grads, *torch.func.jvp(call, values, values)[1]

    expected = derivatives()
    with torch.autocast("cpu", torch.bfloat16):
        got = derivatives()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@every_case
def test_deterministic(name):
    case = in_dtype(name, torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (testing.run(case.function, case.kwargs).all() for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first[tensor], second[tensor]) for tensor in first)


@every_case
def test_export(name):
    case = in_dtype(name, torch.float32)
    call, leaves = differentiable(case)
    values = tuple(leaf.detach() for leaf in leaves)

    class Module(torch.nn.Module):
        def forward(self, *values):
            return call(*values)

    program = torch.export.export(Module(), values)
    assert any("dit_kernels" in str(node.target) for node in program.graph.nodes)
    for got, expected in zip(program.module()(*values), call(*values), strict=True):
        assert torch.equal(got, expected)


@every_case
def test_inference_mode_and_no_grad_save_nothing(name):
    call, leaves = differentiable(CASES[name])
    with torch.no_grad():
        expected = call(*leaves)
    with torch.inference_mode():
        got = call(*leaves)
    for a, b in zip(expected, got, strict=True):
        assert torch.equal(a, b)
        assert not a.requires_grad


LENGTHS = (5, 7, 12, 31, 40)


DYNAMIC = (
    "gated_adaln", "qk_norm_rope", "attention3d", "patch_embed", "unpatchify", "final_layer",
    "gelu_bias", "swiglu",
)  # fmt: skip


@pytest.mark.parametrize("op", DYNAMIC)
def test_a_new_length_does_not_recompile(op):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def body(x, modulation, qkv, angle, video):
        tokens = x.shape[1]
        shift, scale, gate = modulation.chunk(3, -1)
        if op == "gated_adaln":
            return ops.gated_adaln(x, x, gate, shift, scale)[1]
        if op == "qk_norm_rope":
            return ops.qk_norm_rope(*qkv.unbind(2)[:2], cos=angle, sin=angle)[0]
        if op == "attention3d":
            return ops.attention3d(*qkv.unbind(2), grid=(tokens, 1, 1), window_size=(3, 1, 1))
        if op == "patch_embed":
            return ops.patch_embed(video, torch.ones(8, 3, 1, 2, 2))
        if op == "unpatchify":
            return ops.unpatchify(x, (tokens, 1, 1), (1, 2, 2), 8)
        if op == "final_layer":
            weight = torch.ones(16, 32)
            return ops.final_layer(x, shift, scale, weight, None, (tokens, 1, 1), (1, 2, 2), 4)
        return getattr(ops, op)(x)

    compiled = torch.compile(body, fullgraph=True, dynamic=True, backend=counter)
    first = 0
    for tokens in LENGTHS:
        inputs = (
            torch.randn(2, tokens, 32, requires_grad=True),
            torch.randn(2, 96, requires_grad=True),
            torch.randn(2, tokens, 3, 2, 16, requires_grad=True),
            torch.randn(tokens, 8),
            torch.randn(1, 3, tokens, 4, 4, requires_grad=True),
        )
        expected = body(*inputs)
        got = compiled(*inputs)
        assert torch.equal(got, expected)
        got.sum().backward()
        # the first length may be traced twice: Dynamo starts again where it met a float (eps)
        first = counter.frame_count if tokens == LENGTHS[0] else first
        assert counter.frame_count == first


@pytest.mark.parametrize("op", backends.TABLE)
def test_every_op_has_examples_costs_and_flops(op):
    reference = backends.load(op, "reference")
    examples = reference.example_inputs(torch.float32)
    assert examples
    from torch.utils.flop_counter import FlopCounterMode

    for function, kwargs in examples.values():
        with FlopCounterMode(display=False) as counter:
            testing.run(function, kwargs, backward=False)
        flops = counter.get_total_flops()
        assert (flops > 0) == (op in ("attention3d", "patch_embed", "final_layer"))


def test_attention_flops_count_the_window_only():
    from torch.utils.flop_counter import FlopCounterMode

    q = torch.randn(1, 4 * 6 * 8, 2, 16)

    def flops(**options):
        with FlopCounterMode(display=False) as counter:
            ops.attention3d(q, q, q, **options)
        return counter.get_total_flops()

    assert flops() == 4 * 192 * 192 * 32
    assert flops(grid=(4, 6, 8), window_size=(2, 3, 4)) == 4 * 192 * 24 * 32


EMPTY = {
    "adaln": lambda b, n: ops.adaln(torch.ones(b, n, 8), torch.ones(b, 8), torch.ones(b, 8)),
    "adaln-frames": lambda b, n: ops.adaln(torch.ones(b, n, 8), torch.ones(b, n, 8)),
    "gated_residual": lambda b, n: ops.gated_residual(
        torch.ones(b, n, 8), torch.ones(b, n, 8), torch.ones(b, 8)
    ),
    "qk_norm_rope": lambda b, n: ops.qk_norm_rope(torch.ones(b, n, 2, 8))[0],
    "attention3d": lambda b, n: ops.attention3d(*[torch.ones(b, n, 2, 8)] * 3),
    "patch_embed": lambda b, n: ops.patch_embed(
        torch.ones(b, 3, n, 4, 4), torch.ones(8, 3, 1, 2, 2)
    ),
    "unpatchify": lambda b, n: ops.unpatchify(torch.ones(b, n, 8), (n, 1, 1), (1, 2, 2), 2),
    "final_layer": lambda b, n: ops.final_layer(
        torch.ones(b, n, 8), None, None, torch.ones(8, 8), None, (n, 1, 1), (1, 2, 2), 2
    ),
    "gelu_bias": lambda b, n: ops.gelu_bias(torch.ones(b, n, 8)),
    "swiglu": lambda b, n: ops.swiglu(torch.ones(b, n, 8)),
}


@pytest.mark.parametrize(("op", "shape"), list(itertools.product(EMPTY, [(0, 3), (2, 0), (0, 0)])))
def test_empty_batch(op, shape):
    out = EMPTY[op](*shape)
    full = EMPTY[op](1, 1)
    assert out.numel() == 0
    assert out.dim() == full.dim()
    assert out.dtype == full.dtype


def test_outputs_are_written_everywhere(monkeypatch):
    """torch.empty is poisoned with NaN: what a kernel leaves unwritten shows."""
    torch.use_deterministic_algorithms(True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    try:
        for case in cases(torch.float32):
            for name, value in testing.run(case.function, case.kwargs).all().items():
                if (case.function, name) != ("attention3d", "out1"):
                    assert value.isfinite().all(), (case.id, name)
    finally:
        torch.use_deterministic_algorithms(False)


def test_two_threads_choose_their_own_backend():
    import threading

    seen = {}

    def ask(name):
        with use_backend(name):
            barrier.wait()
            seen[name] = backends.requested("test", None)
            barrier.wait()

    barrier = threading.Barrier(2)
    threads = [threading.Thread(target=ask, args=(n,)) for n in ("reference", "triton")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"reference": "reference", "triton": "triton"}
