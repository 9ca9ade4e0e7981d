"""Choice of a backend: argument over context over environment, and never silently another."""

from __future__ import annotations

import sys
import types

import pytest
import torch

import dit_kernels
from dit_kernels import backends, measured, ops, use_backend
from dit_kernels.measured import CallClass, Fastest

X = torch.randn(1, 4, 8)


def fake_backend(reason=None):
    """A backend that marks its result with sevens."""
    module = types.ModuleType("dit_kernels.ops.feed_forward.triton")
    module.supports = lambda *args: reason
    module.forward = lambda x, bias, act, stats: [torch.full_like(x, 7.0)]
    module.backward = lambda grads, x, bias, saved, act, needs: [torch.full_like(x, 5.0)]
    return module


@pytest.fixture
def installed(monkeypatch):
    def install(reason=None):
        monkeypatch.setitem(
            sys.modules, "dit_kernels.ops.feed_forward.triton", fake_backend(reason)
        )
        monkeypatch.setitem(backends.TABLE, "feed_forward", ("triton",))
        monkeypatch.setattr(backends, "unavailable", lambda name: None)
        backends.load.cache_clear()

    yield install
    backends.load.cache_clear()


def served_by_fake(**options):
    return bool((ops.gelu_bias(X, **options) == 7).all())


def test_auto_takes_the_first_that_supports_the_call(installed):
    installed()
    assert served_by_fake()
    assert served_by_fake(backend="auto")
    assert not served_by_fake(backend="reference")


def test_auto_falls_back_to_the_reference(installed):
    installed(reason="x is too small")
    assert not served_by_fake()


def test_a_backend_asked_for_by_name_never_falls_back(installed):
    installed(reason="x is too small")
    with pytest.raises(
        RuntimeError, match="feed_forward: backend 'triton' cannot serve this call: x is too small"
    ):
        ops.gelu_bias(X, backend="triton")
    with use_backend("triton"), pytest.raises(RuntimeError, match="x is too small"):
        ops.gelu_bias(X)


def test_argument_over_context_over_environment(installed, monkeypatch):
    installed()
    monkeypatch.setenv("DIT_KERNELS_BACKEND", "reference")
    assert not served_by_fake()
    with use_backend("triton"):
        assert served_by_fake()
        assert not served_by_fake(backend="reference")
        with use_backend("reference"):
            assert not served_by_fake()
        assert served_by_fake()
    assert not served_by_fake()


def test_the_context_ends_with_an_exception(installed, monkeypatch):
    installed()
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert served_by_fake()


def test_one_context_can_be_entered_twice(installed):
    installed()
    context = use_backend("reference")
    with context:
        with context:
            assert not served_by_fake()
        assert not served_by_fake()
    assert served_by_fake()


def test_backward_runs_on_the_backend_of_the_forward(installed):
    installed()
    x = X.clone().requires_grad_()
    with use_backend("triton"):
        y = ops.gelu_bias(x)
    with use_backend("reference"):
        (grad,) = torch.autograd.grad(y.sum(), x)
    assert (grad == 5).all()


def test_the_context_holds_inside_torch_compile(installed):
    installed()
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def inside(x):
        with use_backend("reference"):
            first = ops.gelu_bias(x)
        return first, ops.gelu_bias(x)

    first, second = inside(X)
    assert not (first == 7).all()
    assert (second == 7).all()
    outside = torch.compile(lambda x: ops.gelu_bias(x), fullgraph=True, backend="aot_eager")
    assert (outside(X) == 7).all()
    with use_backend("reference"):
        assert not (outside(X) == 7).all()


def test_wrong_names(monkeypatch):
    with pytest.raises(
        ValueError,
        match="use_backend: backend must be one of auto, reference, triton, cuda; got 'cpu'",
    ):
        use_backend("cpu")
    monkeypatch.setenv("DIT_KERNELS_BACKEND", "fast")
    with pytest.raises(
        ValueError,
        match="DIT_KERNELS_BACKEND: backend must be one of auto, reference, triton, cuda; got 'fast'",
    ):
        ops.gelu_bias(X)


def test_a_missing_backend_says_why(monkeypatch):
    monkeypatch.setitem(backends.TABLE, "feed_forward", ())
    monkeypatch.setattr(backends, "unavailable", lambda name: None)
    with pytest.raises(
        RuntimeError, match="'cuda' cannot serve this call: it has no kernel for this op"
    ):
        ops.gelu_bias(X, backend="cuda")
    monkeypatch.setattr(backends, "unavailable", lambda name: "there is no GPU")
    with pytest.raises(RuntimeError, match="'triton' cannot serve this call: there is no GPU"):
        ops.gelu_bias(X, backend="triton")


def test_report_names_every_backend_with_reason_and_remedy():
    lines = {line.name: line for line in backends.report()}
    assert set(lines) == {"reference", "triton", "cuda"}
    assert lines["reference"].available
    for line in lines.values():
        assert line.available or (line.reason and line.fix)


def test_the_package_names_its_version_and_what_it_offers():
    from importlib.metadata import version

    assert dit_kernels.__version__ == version("dit-kernels")
    public = [name for name in dir(dit_kernels) if not name.startswith("_")]
    assert public == sorted(name for name in dit_kernels.__all__ if name != "__version__")
    for name in public:
        getattr(dit_kernels, name)


def served_by(name):
    """A backend of feed_forward that marks its results with its name's length."""
    module = types.ModuleType(f"dit_kernels.ops.feed_forward.{name}")
    module.supports = lambda *args: None
    module.forward = lambda x, bias, act, stats: [torch.full_like(x, len(name))]
    module.backward = lambda grads, x, bias, saved, act, needs: [torch.full_like(x, -len(name))]
    return module


@pytest.fixture
def two_backends(monkeypatch):
    """Both serve everything; on this "card" classes of feed_forward were measured."""
    for name in ("triton", "cuda"):
        monkeypatch.setitem(sys.modules, f"dit_kernels.ops.feed_forward.{name}", served_by(name))
    monkeypatch.setattr(backends, "unavailable", lambda name: None)
    monkeypatch.setattr(measured, "gpu", lambda index: "a card")
    backends.load.cache_clear()

    def measure(*rows):
        monkeypatch.setattr(measured, "on_gpu", lambda name: rows if name == "a card" else ())
        measured._orders.clear()

    yield measure
    backends.load.cache_clear()
    measured._orders.clear()


def gelu(channels, rows, **options):
    """The backends that served the forward and, with a gradient, the backward."""
    x = torch.zeros(rows, channels, **options)
    y = ops.gelu_bias(x)
    names = [y.reshape(-1)[0].item()]
    if x.requires_grad:
        names.append(-torch.autograd.grad(y.sum(), x)[0][0, 0].item())
    return ["triton" if length == 6 else "cuda" for length in names]


def of(channels, rows, inference, training, form="x- gelu-tanh", itemsize=4, op="feed_forward"):
    size = (channels * rows).bit_length()
    return Fastest(CallClass(op, form, itemsize, channels, size), inference, training)


def test_without_a_measurement_auto_keeps_the_tables_order(two_backends):
    two_backends()
    assert gelu(64, 8) == ["triton"]
    two_backends(of(64, 8, "cuda", "cuda", itemsize=2), of(64, 8, "cuda", "cuda", op="adaln"))
    assert gelu(64, 8) == ["triton"]


def test_auto_takes_what_was_measured_to_be_the_fastest(two_backends):
    two_backends(of(64, 8, "cuda", "triton"), of(64, 8192, "triton", "cuda"))
    assert gelu(64, 8) == ["cuda"]
    assert gelu(64, 8, requires_grad=True) == ["triton", "triton"]
    assert gelu(64, 8192) == ["triton"]
    assert gelu(64, 8192, requires_grad=True) == ["cuda", "cuda"]


def test_a_class_that_was_not_measured_gets_the_nearest(two_backends):
    two_backends(
        of(64, 8, "cuda", "cuda"), of(1024, 1024, "triton", "triton"),
        of(1024, 1024, "cuda", "cuda", form="xx gelu-tanh"),
    )  # fmt: skip
    assert gelu(48, 16) == ["cuda"]
    assert gelu(768, 512) == ["triton"]
    two_backends(of(1024, 1024, "cuda", "cuda", form="xx gelu-tanh"))
    assert gelu(768, 512) == ["cuda"]  # of another form, but of the same op


def test_a_backend_by_name_is_served_whatever_was_measured(two_backends):
    two_backends(of(64, 8, "cuda", "cuda"))
    assert ops.gelu_bias(torch.zeros(8, 64), backend="triton")[0, 0] == 6
    with use_backend("reference"):
        assert ops.gelu_bias(torch.zeros(8, 64))[0, 0] == 0


def test_the_measured_file_is_read_as_it_is_written(tmp_path):
    found = {"NVIDIA H200": (of(64, 8, "cuda", "triton"), of(1152, 65536, "triton", "triton"))}
    path = tmp_path / "measured.json"
    path.write_text(measured.text(found))
    assert measured.load(path) == found
    path.write_text(measured.text({}))
    assert measured.load(path) == {}


def test_no_gpu_has_no_measurement():
    assert measured.gpu(torch.zeros(1).get_device()) == ""
    assert measured.on_gpu("") == ()
