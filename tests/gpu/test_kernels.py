"""Every backend that runs on this GPU, on every example input and on the shapes of real models."""

from __future__ import annotations

import pytest
import torch

from benchmarks.cases import cases_for
from benchmarks.shapes import SHAPES
from dit_kernels import backends, ops, testing

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = {case.id: case for case in testing.cases(torch.float32)}
KERNELS = [(name, backend) for name, case in NAMES.items() for backend in backends.TABLE[case.op]]
MODELS = [
    (shape, case.name, backend)
    for shape in SHAPES
    for case in cases_for(SHAPES[shape])
    for backend in backends.TABLE[case.op]
]


def supported(function, kwargs, backend):
    """A case that the backend says it does not serve is shown as skipped, with its reason."""
    try:
        with torch.no_grad():
            getattr(ops, function)(**kwargs, backend=backend)
    except backends.Unsupported as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(("name", "backend"), KERNELS, ids=lambda value: value)
@pytest.mark.parametrize("dtype", DTYPES)
def test_memcheck_examples(name, backend, dtype):
    case = next(c for c in testing.cases(DTYPES[dtype], "cuda") if c.id == name)
    supported(case.function, case.kwargs, backend)
    for measured in testing.measure(case, backend=backend):
        assert measured.ok, measured


@pytest.mark.parametrize(("shape", "name", "backend"), MODELS, ids=lambda value: value)
def test_models_shapes(shape, name, backend):
    """The channels, heads and windows of each model, on few tokens."""
    case = next(c for c in cases_for(SHAPES[shape]) if c.name == name)
    kwargs = case.arguments(SHAPES[shape].small(), torch.bfloat16, "cuda", 0)
    supported(case.function, kwargs, backend)
    for measured in testing.measure(
        testing.Case(case.op, name, case.function, kwargs), backend=backend
    ):
        assert measured.ok, measured


@pytest.mark.parametrize(("name", "backend"), KERNELS, ids=lambda value: value)
def test_cuda_graph_replays(name, backend):
    case = next(c for c in testing.cases(torch.bfloat16, "cuda") if c.id == name)
    supported(case.function, case.kwargs, backend)
    expected = testing.run(case.function, case.kwargs, backward=False, backend=backend).outputs
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        testing.run(case.function, case.kwargs, backward=False, backend=backend)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = testing.run(case.function, case.kwargs, backward=False, backend=backend).outputs
    for out in captured.values():
        out.zero_()
    graph.replay()
    for key, out in captured.items():
        assert torch.equal(out, expected[key])


@pytest.mark.parametrize(("name", "backend"), KERNELS, ids=lambda value: value)
def test_gradients_are_deterministic(name, backend):
    case = next(c for c in testing.cases(torch.bfloat16, "cuda") if c.id == name)
    supported(case.function, case.kwargs, backend)
    options = {"deterministic": True} if case.op == "attention3d" else {}
    first, second = (
        testing.run(case.function, case.kwargs, backend=backend, **options).all() for _ in range(2)
    )
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_tensors_of_more_than_2_31_elements(backend):
    if backend not in backends.TABLE["adaln"]:
        pytest.skip(f"adaln has no {backend} kernel")
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs 40 GB of GPU memory")
    tokens, channels = (1 << 21) + 3, 1152
    x = torch.randn(1, tokens, channels, dtype=torch.bfloat16, device="cuda")
    shift, scale = torch.randn(1, 2 * channels, device="cuda").chunk(2, dim=-1)
    y = ops.adaln(x, shift, scale, backend=backend)
    tail = x[:, -5:].clone()
    assert torch.equal(y[:, -5:], ops.adaln(tail, shift, scale, backend=backend))
