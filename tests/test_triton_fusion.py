"""Fusion, proven: with the launches recorded instead of made, what a Triton backend does beside launching kernels."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from triton.runtime.jit import JITFunction

from benchmarks import offline
from benchmarks.cases import cases_for
from benchmarks.shapes import SHAPES
from dit_kernels import backends, ops, testing
from dit_kernels.ops import triton_launch

pytestmark = pytest.mark.skipif(
    triton_launch.INTERPRETED, reason="under TRITON_INTERPRET=1 launches are made, not recorded"
)

EXAMPLES = {case.id: case for case in testing.cases(torch.bfloat16)}
ALLOCATIONS = {"aten::empty", "aten::new_empty", "aten::empty_like"}
VIEWS = {
    "aten::view",
    "aten::unbind",
    "aten::select",
    "aten::expand",
    "aten::detach",
    "aten::alias",
}
# the gradient of what the result does not depend on
ZEROS = {"aten::zero_"}
# gradients of indexed rows: the tokens are sorted by their row first
SORTING = {
    "aten::sort", "aten::arange", "aten::searchsorted", "aten::diff", "aten::cumsum", "aten::floor_divide",
    "aten::index", "aten::mul", "aten::sub", "aten::add", "aten::minimum", "aten::clamp_", "aten::_to_copy",
    "aten::pad", "aten::constant_pad_nd", "aten::slice", "aten::fill_", "aten::copy_", "aten::narrow",
}  # fmt: skip
# the grids of packed videos: on the device once for each list of grids
TABLE = {"aten::lift_fresh", "aten::_to_copy"}
# op -> its kernels, forward and backward; the second stages, which add up rows of sums, are the *_sums and add_rows
KERNELS = {
    "adaln": (["adaln_fwd"], {"adaln_bwd", "adaln_bwd_sums"}),
    "qk_norm_rope": (
        ["qk_norm_rope_fwd"],
        {"qk_norm_rope_bwd", "qk_norm_rope_bwd_angles", "add_rows"},
    ),
    "attention3d": (
        ["attention3d_fwd"],
        {"attention3d_rows", "attention3d_dq", "attention3d_dkdv"},
    ),
    "patch_embed": (
        ["patch_embed_fwd"],
        {"patch_embed_bwd_video", "patch_embed_bwd_weight", "patch_embed_bwd_pos", "add_rows"},
    ),
    "unpatchify": (["unpatchify"], {"unpatchify"}),
    "final_layer": (
        ["final_layer_fwd"],
        {"final_layer_bwd_x", "final_layer_bwd_sums", "add_rows"},
    ),
    "feed_forward": (["feed_forward_fwd"], {"feed_forward_bwd", "add_rows"}),
}


class Seen(TorchDispatchMode):
    """Names of the aten ops, and bytes of the allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: set[str] = set()
        self.bytes = 0
        self.kernels: list[str] = []
        self.args: tuple[Any, ...] = ()
        self.results: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.ops.add(func._schema.name)
        if func._schema.name in ALLOCATIONS:
            self.bytes += size(out)
        return out


def size(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def watch(op: str, call: Callable[[], object]) -> tuple[Seen, Seen]:
    """What the backend's forward and backward did in a call."""
    backend = backends.load(op, "triton")

    def watched(real: Callable[..., list[Tensor]], found: Seen):
        def run(*args: Any) -> list[Tensor]:
            before = len(launches)
            with found:
                found.results = real(*args)
            found.args = args
            found.kernels = [launch.name for launch in launches[before:]]
            return found.results

        return run

    seen = Seen(), Seen()
    with offline.recorded() as launches, pytest.MonkeyPatch.context() as patch:
        for name, found in zip(("forward", "backward"), seen, strict=True):
            patch.setattr(backend, name, watched(getattr(backend, name), found))
        call()
    return seen


@pytest.mark.parametrize("name", EXAMPLES)
def test_nothing_but_kernels(name):
    case = EXAMPLES[name]
    forward, backward = watch(
        case.op, lambda: testing.run(case.function, case.kwargs, backend="triton")
    )
    index, packed = (case.kwargs.get(name) is not None for name in ("row_index", "cu_seqlens"))
    assert forward.ops <= ALLOCATIONS | VIEWS | (TABLE if packed else set())
    assert forward.bytes == size(*forward.results)
    assert backward.ops <= ALLOCATIONS | VIEWS | ZEROS | (SORTING if index else set())
    first, others = KERNELS[case.op]
    assert forward.kernels == first
    assert set(backward.kernels) <= others


ROUNDED = [name for name, case in EXAMPLES.items() if case.op in ("adaln", "qk_norm_rope")]


@pytest.mark.parametrize(
    ("name", "rounding"),
    [*((name, None) for name in EXAMPLES), *((name, "eager") for name in ROUNDED)],
)
def test_every_launch_says_whether_products_are_fused_with_sums(monkeypatch, name, rounding):
    """Triton 3.10 flips its default; under rounding="eager" a fused product would skip a rounding."""
    found: dict[str, bool] = {}

    def run(kernel: Any, *args: Any, **options: Any) -> None:
        found[kernel.fn.__name__] = options["enable_fp_fusion"]

    monkeypatch.setattr(JITFunction, "run", run)
    case = EXAMPLES[name]
    kwargs = {**case.kwargs, **({"rounding": rounding} if rounding else {})}
    with offline.launched():
        testing.run(case.function, kwargs, backend="triton")
    assert found
    for kernel, fused in found.items():
        second_stage = kernel in ("adaln_bwd_sums_kernel", "_add_rows_kernel")  # sums alone
        assert fused == (kwargs.get("rounding") != "eager" or second_stage), kernel


MULTIPROCESSORS = 132  # that launches are cut for where there is no GPU


def workspace(op: str, args: tuple[Any, ...], results: list[Tensor]) -> int:
    """Bytes that a backward may allocate beside its gradients."""
    x = next(t for t in args[1:] if isinstance(t, Tensor))
    match op:
        case "unpatchify":
            return 0
        case "attention3d":  # lse and delta of each query, padded to 16 bytes
            return 16 * x.shape[0] * x.shape[1] * x.shape[2]
        case (
            "patch_embed"
        ):  # two tiles of sums of the weight's gradient, and of the bias's, a multiprocessor
            return 4 * 2 * MULTIPROCESSORS * (128 * 64 + 128)
        case "final_layer":  # dvideo in the order of the product; four tiles of sums; modulations' rows of 256 tokens
            tokens, values = x.shape[0] * x.shape[1], args[4].shape[0]
            sums = 4 * MULTIPROCESSORS * 64 * values + 2 * (tokens // 256 + 1) * x.shape[2]
            return 2 * tokens * values + 4 * (sums + 4 * MULTIPROCESSORS * values)
    # float32 rows of sums: one for 64 tokens, or for each of 8 programs a multiprocessor
    rows = max(x.shape[:-1].numel() // 64, 8 * MULTIPROCESSORS)
    return 4 * rows * sum(grad.shape[-1] for grad in results if grad.numel() < x.numel())


@pytest.mark.parametrize(
    ("shape", "case"),
    [
        pytest.param(shape, case, id=f"{shape}-{case.name}")
        for shape in ("dit-xl-256", "wan-1.3b-480p", "ltx-video")
        for case in cases_for(SHAPES[shape])
    ],
)
def test_backward_allocates_its_gradients_and_a_small_workspace(shape, case):
    kwargs = case.make(SHAPES[shape], lambda *s: torch.empty(s, dtype=torch.bfloat16))
    leaves = {k: v for k, v in kwargs.items() if isinstance(v, Tensor) and v.is_floating_point()}
    for leaf in leaves.values():
        leaf.requires_grad_()

    def call() -> None:
        results = getattr(ops, case.function)(**kwargs, backend="triton")
        results = results if isinstance(results, tuple) else (results,)
        grads = [torch.empty_like(result) for result in results]
        torch.autograd.grad(results, list(leaves.values()), grads, allow_unused=True)

    forward, backward = watch(case.op, call)
    assert forward.bytes == size(*forward.results)
    extra = backward.bytes - size(*backward.results)
    assert 0 <= extra <= workspace(case.op, backward.args, backward.results)


@pytest.mark.parametrize("name", EXAMPLES)
def test_schema_and_fake_kernels(name):
    """`opcheck` of forward and backward: no argument is written or aliased, and results are as traced."""
    case = EXAMPLES[name]
    forward, backward = watch(
        case.op, lambda: testing.run(case.function, case.kwargs, backend="triton")
    )
    found = torch.ops.dit_kernels
    # what is computed in one graph: tests/kernels/test_promises_kernels.py
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    with offline.recorded():
        for stats in (True, False):
            args = (*forward.args[:-1], stats, "triton")
            torch.library.opcheck(getattr(found, case.op).default, args, test_utils=checks)
        args = (*backward.args, "triton")
        torch.library.opcheck(
            getattr(found, f"{case.op}_backward").default, args, test_utils=checks
        )


@pytest.mark.parametrize(
    "case", list(cases_for(SHAPES["wan-1.3b-480p"])), ids=lambda case: case.name
)
def test_a_repeated_call_skips_tritons_argument_handling(monkeypatch, case):
    """It costs more than the rest of a call (see benchmarks/host_cost.py)."""
    handled: list[int] = []
    repeated: list[int] = []

    def run(kernel: Any, *args: Any, **options: Any) -> SimpleNamespace:
        handled.append(len(kernel.params))
        return SimpleNamespace(
            run=lambda *args: repeated.append(len(args)), function=None, packed_metadata=None
        )

    monkeypatch.setattr(JITFunction, "run", run)
    kwargs = case.make(SHAPES["wan-1.3b-480p"], lambda *s: torch.empty(s, dtype=torch.bfloat16))
    with offline.launched(), torch.no_grad():
        for _ in range(3):
            getattr(ops, case.function)(**kwargs, backend="triton")
    assert len(handled) == 1
    # grid, stream, binary, its metadata, three for profilers; then every argument, constants too
    assert repeated == [9 + handled[0]] * 2


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_plan_passes_what_triton_would(monkeypatch, name):
    """The second call skips Triton's argument handling; the driver gets the same arguments in the same order."""

    class Driver(offline.Driver):
        def __init__(self, target: str) -> None:
            super().__init__(target)
            self.device = 99  # for which nothing has been compiled

    passed: list[tuple[Any, ...]] = []
    binary = SimpleNamespace(
        run=lambda *args: passed.append(args), function=7, packed_metadata=(4, 1, 0),
        launch_metadata=lambda *args: None,
    )  # fmt: skip
    monkeypatch.setattr(offline, "Driver", Driver)
    monkeypatch.setattr(JITFunction, "_do_compile", lambda self, *args: binary)
    case = EXAMPLES[name]
    given = {t.data_ptr() for t in case.kwargs.values() if isinstance(t, Tensor)}

    def seen(argument: Any) -> Any:
        if not isinstance(argument, Tensor):
            return type(argument), argument
        address = argument.data_ptr()
        return argument.shape, argument.stride(), argument.dtype, given & {address}

    with offline.launched(), torch.no_grad():
        for _ in range(2):
            getattr(ops, case.function)(**case.kwargs, backend="triton")
    by_triton, by_plan = passed
    assert (
        by_plan[:6] == by_triton[:6]
    )  # grid, stream, binary, its metadata; then three for profilers
    assert by_plan[6:9] == (None, None, None)
    assert [seen(a) for a in by_plan[9:]] == [seen(a) for a in by_triton[9:]]
