"""The emulator runs correct kernels correctly and finds a bug of each kind (toys.cu)."""

from __future__ import annotations

import collections
import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
# in CMakeLists.txt's order: of an inline function in two objects the linker takes the first
EMULATOR = ("runtime", "memory", "operations", "sanitizer")
SOURCES = (*(f"csrc/emulator/{name}.cpp" for name in EMULATOR), "tests/cuda/toys.cu")


@pytest.fixture(scope="session")
def toys(tmp_path_factory):
    """toys.cu with the emulator, compiled as CMakeLists.txt compiles the kernels."""
    folder = tmp_path_factory.mktemp("toys")
    flags = re.search(
        r"set\(DK_EMULATED_FLAGS (.*?)\)", (ROOT / "CMakeLists.txt").read_text(), re.S
    )
    compiler = shutil.which("g++") or "c++"
    common = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-I", ROOT / "csrc", "-c"]
    objects = []
    for source in SOURCES:
        instrumented = flags[1].split() if source.endswith(".cu") else ["-O1"]
        objects.append(folder / (Path(source).stem + ".o"))
        subprocess.run(
            [compiler, *common, *instrumented, ROOT / source, "-o", objects[-1]], check=True
        )
    library = folder / "toys.so"
    subprocess.run([compiler, "-shared", *objects, "-o", library, "-lpthread", "-ldl"], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.toy.restype = ctypes.c_char_p
    return loaded


@pytest.fixture
def run(toys):
    def run(
        name: str,
        a: Tensor | None = None,
        b: Tensor | None = None,
        out: Tensor | None = None,
        *,
        number: int = 0,
        seed: int = 0,
    ) -> str:
        arrays = []
        for t in (a, b, out):
            arrays += [
                ctypes.c_void_p(t.data_ptr() if t is not None else 0),
                ctypes.c_size_t(t.nbytes if t is not None else 0),
            ]
        return toys.toy(name.encode(), ctypes.c_ulong(seed), *arrays, number).decode()

    return run


IN = torch.arange(64.0)
SEEDS = range(5)


def zeros(n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(n, dtype=dtype)


@pytest.mark.parametrize("blocks", [1, 3, 200])
def test_block_sum(run, blocks):
    """200 blocks are spread over threads of the system."""
    x, out = torch.randint(0, 9, (blocks, 128)).float(), torch.zeros(blocks, 128)
    assert run("block_sums", x, out=out, number=blocks) == ""
    assert torch.equal(out, x.sum(1, keepdim=True).expand(-1, 128))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("reverses<true>", IN.flip(0)),
        ("reverses_in_warps<true>", IN.view(2, 32).flip(1).view(64)),
        ("overwrites<true>", torch.full((64,), 6.0)),
        ("zero_fills", torch.where(IN % 2 == 0, IN, 0.0)),
        ("shifted", IN[:32]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_correct_kernels(run, name, expected, seed):
    out = zeros(len(expected))
    if name == "shifted":  # both blocks write the same
        assert run(name, IN[:32], out=out) == ""
    else:
        assert run(name, IN, out=out, seed=seed) == ""
    assert torch.equal(out, expected)


def test_asynchronous_copies(run):
    x, out = torch.randn(128), zeros(128)
    assert run("prefetches<Async::right>", x, out=out) == ""
    assert torch.equal(out, x.view(-1, 2).flip(1).view(-1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_ldmatrix_and_mma(run, dtype):
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype)
    out = torch.zeros(16, 8)
    name = {torch.float16: "__half", torch.bfloat16: "__nv_bfloat16"}[dtype]
    assert run(f"multiplies<{name}>", a, b, out) == ""
    exact = a.double() @ b.double()
    assert (out - exact).abs().max() <= 16 * torch.finfo(torch.float32).eps * (
        a.double().abs() @ b.double().abs()
    ).max()


def test_tf32_mma(run):
    """Ten bits of the operands' fraction count."""
    a, b = torch.randint(64, 127, (16, 8)).float(), torch.randint(-99, 99, (8, 8)).float()
    out = torch.zeros(16, 8)
    assert run("multiplies_tf32", a, b, out) == ""
    assert torch.equal(out, a @ b)
    assert run("multiplies_tf32", a + 2.0**-5, b, out) == ""
    assert torch.equal(out, a @ b)


@pytest.mark.parametrize("seed", SEEDS)
def test_named_barriers(run, seed):
    out = zeros(64)
    assert run("named_barriers", IN, out=out, seed=seed) == ""
    assert torch.equal(out, IN.view(2, 32).flip(1).view(64))


def test_votes_shuffles_and_reductions(run):
    out = zeros(64 * 9, torch.int32).view(64, 9)
    assert run("votes", out=out) == ""
    ballot = sum(1 << lane for lane in range(0, 32, 3))
    for thread in range(64):
        lane = thread % 32
        up = lane - 3 if lane >= 3 else lane
        down = lane + 3 if lane % 8 + 3 < 8 else lane
        expected = [ballot, 1, 0, up, down, lane // 8 * 8 + 2, 31, sum(range(32)), 2]
        got = out[thread].tolist()
        assert [got[0] & 0xFFFFFFFF, *got[1:]] == expected


def test_order_is_drawn_from_the_seed(run):
    def order(seed: int) -> list[int]:
        # the counter is an output too, so it starts as -1
        out = zeros(257, torch.int32)
        assert run("order", out=out, seed=seed) == ""
        return out[1:].tolist()

    first = order(0)
    assert sorted(first) == list(range(-1, 255))
    assert first != sorted(first)
    assert first == order(0)
    assert first != order(1)


@pytest.mark.parametrize("blocks", [1, 2, 3, 5, 1000])
def test_blocks_run_in_any_order(run, blocks):
    """Of a few blocks each order comes up, and of many each is first now and then."""
    orders = set()
    for seed in range(100):
        out = zeros(1 + blocks, torch.int32)
        assert run("order_of_blocks", out=out, number=blocks, seed=seed) == ""
        orders.add(tuple((out[1:] + 1).tolist()))
        assert sorted(out[1:].tolist()) == list(range(-1, blocks - 1))
    assert len(orders) >= {1: 1, 2: 2, 3: 6, 5: 50, 1000: 100}[blocks]
    firsts = collections.Counter(order.index(0) for order in orders)
    assert len(firsts) >= min(blocks, 60)


def test_a_missing_barrier_changes_the_result(run):
    """Where no detector watches: what another thread has not written yet is NaN, for others in each order."""
    wrong = set()
    for seed in SEEDS:
        out = zeros(128)
        assert run("hands_over<true>", IN, out=out, seed=seed) == ""
        assert torch.equal(out[:64], IN.flip(0))
        assert run("hands_over<false>", IN, out=out, seed=seed) == ""
        wrong.add(tuple(out[:64].isnan().tolist()))
        assert any(out[:64].isnan())
    assert len(wrong) == len(SEEDS)


def test_outputs_and_shared_memory_start_as_nan(run):
    out = zeros(64)
    assert run("leaves_some_unwritten", out=out) == ""
    assert torch.equal(out.isnan(), torch.arange(64) % 2 == 1)
    out = zeros(64)
    for _ in range(2):
        assert run("reads_unwritten_shared", out=out) == ""
        assert out.isnan().all()
        assert run("reads_unwritten_shared", out=out, number=5) == ""
        assert torch.equal(out.isnan(), torch.arange(64) >= 5)
        # another kernel uses the memory, and the next block finds none of it
        assert run("reverses<true>", IN, out=out) == ""


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("reverses<false>", r"race on shared memory: it (reads|writes) byte \d+ of tile, .*no barrier between"),
        ("reverses_in_warps<false>", r"race on shared memory: it (reads|writes)"),
        ("overwrites<false>", r"race on shared memory: it (writes|reads)"),
        ("prefetches<Async::no_barrier>", r"asynchronous copy .* has not landed|race on shared"),
        ("prefetches<Async::no_wait>", "an asynchronous copy of thread .* has not landed: its wait"),
        ("prefetches<Async::wait_for_too_few>", "an asynchronous copy of thread .* has not landed"),
        ("divergent_barrier", "deadlock: 40 threads wait at __syncthreads, 24 have returned"),
        ("divergent_shuffle", "deadlock: .*62 threads wait at a shuffle|deadlock: .*a shuffle"),
        ("shuffle_after_return", "have returned or don't exist|deadlock: .* wait at a shuffle"),
        ("shuffle_outside_its_mask", "lane 0 reads lane 16, which the mask 0x0000ffff lacks"),
        ("different_shuffles", "wait in a (vote|shuffle) with mask|a (vote|shuffle) with mask"),
        ("writes_its_input", r"writes 4 bytes at 0x\w+, in a, which is an input"),
    ],
)  # fmt: skip
def test_bugs_are_found(run, name, what, seed):
    error = run(name, torch.arange(128.0), out=zeros(128), seed=seed)
    assert re.search(what, error), error
    assert re.match(
        rf"{name.partition('<')[0]}(<.*>)?: block \(0, 0, 0\), thread \(\d+, 0, 0\)", error
    ), error
    assert f"seed {seed}" in error


@pytest.mark.parametrize("threads", [32, 128])
@pytest.mark.parametrize("seed", SEEDS)
def test_atomics_race_with_what_is_none(run, seed, threads):
    out = zeros(threads, torch.int32)
    assert run("counts<Counts::right>", out=out, number=threads, seed=seed) == ""
    assert torch.equal(out, torch.full_like(out, threads))
    for how, does in (
        ("starts_late", "updates .* wrote|writes .* updated"),
        ("reads_early", "updates .* read|reads .* updated"),
        ("writes_early", "updates .* wrote|writes .* updated"),
    ):
        error = run(f"counts<Counts::{how}>", out=out, number=threads, seed=seed)
        assert re.match(r"counts<.*>: block \(0, 0, 0\), thread \(\d+, 0, 0\)", error), error
        assert re.search(rf"race on shared memory: it ({does}), with no barrier between", error), (
            error
        )


@pytest.mark.parametrize("seed", SEEDS)
def test_all_threads_come_to_one_barrier(run, seed):
    assert run("two_barriers", out=zeros(64), number=2, seed=seed) == ""
    error = run("two_barriers", out=zeros(64), number=1, seed=seed)
    assert re.match(
        r"two_barriers: block \(0, 0, 0\), thread \(\d+, 0, 0\).*: __syncthreads of toys.cu:(\d+), "
        r"while \d+ threads of the block wait at that of toys.cu:(?!\1)\d+",
        error,
    ), error
    out = zeros(64)
    assert run("shared_barriers", IN, out=out, seed=seed) == ""
    assert torch.equal(out, torch.full_like(out, 2 * float(IN.sum() + 64)))


def test_addresses(run):
    out = zeros(64)
    assert run("shifted_read", IN, out=out) == ""
    assert "reads 4 bytes at" in (error := run("shifted_read", IN, out=out, number=1))
    assert "4 bytes past the end of a" in error
    assert "thread (63, 0, 0)" in error
    assert "4 bytes past the end of out" in run("shifted_write", IN, out=out, number=1)
    assert "4 bytes before the start of out" in run("shifted_write", IN, out=out, number=-1)
    assert "belongs to no tensor" in run("leaves_some_unwritten")
    # a gap between two tensors is of neither
    both = torch.zeros(200)
    assert "past the end of a" in run("shifted_read", both[:64], out=both[100:164], number=36)


@pytest.mark.parametrize("how", ["memcpy", "memmove", "memset", "constant", "row"])
def test_copies_by_library_functions(run, how):
    """Of a size known at run time or not, and of a struct that is copied as a whole."""
    name, out = f"copies<Copies::{how}>", zeros(64)
    assert run(name, IN, out=out) == ""
    assert torch.equal(out, zeros(64) if how == "memset" else IN)
    errors = {-1: run(name, IN, out=out, number=-1)}
    assert "writes 256 bytes at" in errors[-1]
    assert "4 bytes past the end of out" in errors[-1]
    if how != "memset":
        errors[1] = run(name, IN, out=out, number=1)
        assert re.search("reads 256 bytes at .* 4 bytes past the end of a", errors[1]), errors[1]
    if how not in ("constant", "row"):
        errors[2] = run(name, IN, out=out, number=2)
        assert re.search("260 bytes at .* 4 bytes past the end of (a|out)", errors[2]), errors[2]
    if how in ("memcpy", "memmove"):  # the input is long enough, the array is not
        errors[3] = run(name, torch.arange(65.0), out=zeros(65), number=2)
        assert "260 bytes of shared memory, 4 bytes past the end of tile" in errors[3]
    for error in errors.values():
        assert re.match(r"copies<.*>: block \(0, 0, 0\), thread \(0, 0, 0\)", error), error


def test_alignment(run):
    x, out = torch.randn(68), zeros(64)
    assert run("vectors", x, out=out, number=4) == ""
    assert torch.equal(out, x[4:])
    assert re.search(
        r"reads 16 bytes at 0x\w+, which is not a multiple of 16",
        run("vectors", x, out=out, number=1),
    )


def test_shared_memory_bounds(run):
    out = zeros(64)
    assert run("dynamic", out=out, number=256) == ""
    assert "byte 255 of dynamic shared memory; the launch gave 252" in run(
        "dynamic", out=out, number=252
    )
    assert run("past_the_array", out=out) == ""
    assert "index 64 is out of bounds of" in run("past_the_array", out=out, number=1)


def test_arrays_in_shared_memory_end_where_they_end(run):
    """No other array lies behind one, and none of them is another's."""
    out = zeros(32)
    for which, name in enumerate(("second", "first")):
        assert run("leaves_its_array", out=out, number=which) == ""
        # as far as to where another array would begin, had it no gap before it
        for shift, place in ((1, "past the end"), (32, "past the end"), (-1, "before the start")):
            error = run("leaves_its_array", out=out, number=2 * shift + which)
            assert re.match(r"leaves_its_array: block \(0, 0, 0\), thread \(\d+, 0, 0\)", error)
            assert re.search(rf"writes 4 bytes .* bytes {place} of {name}, which has 128", error)


def test_stacks_and_launches_have_a_size(run):
    assert "local variables need more than" in run("needs_a_large_stack", out=zeros(32))
    assert "invalid launch" in run("dynamic", out=zeros(64), number=300_000)
    for name, bound in (("bounded<48>", 96), ("also_bounded", 64), ("unbounded", 1024)):
        out = zeros(bound)
        assert run(name, out=out, number=bound) == ""
        assert not out.isnan().any()
        error = run(name, out=out, number=bound + 1)
        says = (
            "" if name == "unbounded" else rf"\({bound + 1}, 1, 1\), .*__launch_bounds__\({bound}\)"
        )
        assert re.match(rf"{name}: invalid launch: .*block {says}", error), error
    # and after an error everything is as before
    test_block_sum(run, 3)


def test_an_error_names_its_line(run):
    if not shutil.which("addr2line"):
        pytest.skip("addr2line comes with binutils, which this machine lacks")
    error = run("reverses<false>", IN, out=zeros(64))
    line = int(re.search(r"at toys\.cu:(\d+)", error)[1])
    text = (ROOT / SOURCES[-1]).read_text().splitlines()[line - 1]
    assert "tile[" in text


@pytest.mark.parametrize("half", [True, False], ids=["float16", "bfloat16"])
def test_conversions_round_as_torch_does(toys, half):
    """Every 16-bit value, the values halfway between two, and their neighbours."""
    dtype = torch.float16 if half else torch.bfloat16
    exact = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    between = (exact.double() + exact.roll(-1).double()).div(2).float()
    infinity = torch.tensor(torch.inf)
    x = torch.cat([exact, between, between.nextafter(infinity), between.nextafter(-infinity)])
    bits, back = torch.empty(len(x), dtype=torch.int16), torch.empty(len(x))
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x, bits, back)]
    toys.convert(*pointers, len(x), half)
    expected = x.to(dtype)
    nan = expected.isnan()
    assert torch.equal(bits.view(dtype).isnan(), nan)
    assert torch.equal(bits[~nan], expected.view(torch.int16)[~nan])
    assert torch.equal(back[~nan], expected.float()[~nan])
