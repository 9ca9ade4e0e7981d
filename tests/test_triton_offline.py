"""The Triton kernels without a GPU and without the interpreter: compiled for a GPU, never launched."""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import audit, offline
from dit_kernels import backends, ops, testing
from dit_kernels.ops import triton_launch, triton_rows, triton_tuning
from dit_kernels.ops.feed_forward import triton as feed_forward

pytestmark = pytest.mark.skipif(
    triton_launch.INTERPRETED, reason="under TRITON_INTERPRET=1 nothing is compiled"
)


def gated(samples: int, tokens: int, groups: int | None = None, channels: int = 72) -> None:
    """A call with strided modulation, forward and backward."""
    mod = torch.empty(samples, *([groups] if groups else []), 6 * channels, dtype=torch.bfloat16)
    shift, scale, gate = mod.requires_grad_().chunk(6, dim=-1)[:3]
    residual, branch = (
        torch.empty(samples, tokens, channels, dtype=torch.bfloat16, requires_grad=True)
        for _ in range(2)
    )
    out, y = ops.gated_adaln(residual, branch, gate, shift, scale, backend="triton")
    cotangents = [torch.empty_like(out), torch.empty_like(y)]
    torch.autograd.grad([out, y], [residual, branch, mod], cotangents)


def test_the_interpreters_correction_is_not_loaded():
    """It is for TRITON_INTERPRET=1 alone; see tests/triton/test_triton_interpreter.py."""
    assert "dit_kernels.ops.triton_interpreter" not in sys.modules


EXAMPLES = [case for case in testing.cases(torch.bfloat16) if case.op == "adaln"]


@pytest.mark.parametrize("rounding", ["once", "eager"])
@pytest.mark.parametrize("case", EXAMPLES, ids=lambda case: case.id)
def test_every_form_compiles(case, rounding):
    """The interpreter is laxer than the compiler: types of branches, constants, shapes."""
    with offline.recorded() as launches:
        testing.run(case.function, case.kwargs, backend="triton", rounding=rounding)
    assert launches
    for launch in launches:
        launch.compile("sm_90")


@pytest.mark.parametrize("weight", [None, torch.bfloat16, torch.float32])
def test_an_rms_norm_with_a_bias_compiles(weight):
    channels = 72
    x, bias = torch.empty(2, 5, channels).bfloat16(), torch.empty(channels).bfloat16()
    scale = torch.empty(2, 5, channels).bfloat16()
    weight = None if weight is None else torch.empty(channels, dtype=weight)
    kwargs = dict(x=x, scale=scale, weight=weight, bias=bias, norm="rms")
    with offline.recorded() as launches:
        testing.run("adaln", kwargs, backend="triton", rounding="eager")
    for launch in launches:
        launch.compile("sm_90")


@pytest.mark.parametrize("rounding", ["once", "eager"])
def test_eager_rounding_has_no_fused_multiply_add(rounding):
    """Eager rounds a product before it adds to it, in float32 too; Triton's default for the fusion varies."""
    x, branch, gate = torch.empty(2, 64, 256), torch.empty(2, 64, 256), torch.empty(2, 256)
    q, angles = torch.empty(2, 64, 4, 64), torch.empty(64, 32)
    with offline.recorded() as launches:
        ops.gated_residual(x, branch, gate, rounding=rounding, backend="triton")
        ops.qk_norm_rope(q, q, norm=None, cos=angles, sin=angles, rounding=rounding, backend="triton")  # fmt: skip
    for launch in launches:
        found = "fma.rn.f32" in launch.compile("sm_90").asm["ptx"]
        assert found == (rounding == "once"), launch.name


def test_one_variant_for_every_length():
    from dit_kernels.ops.adaln import triton as backend

    triton_launch.Plans.clear()
    kernels = (backend.adaln_fwd_kernel, backend.adaln_bwd_kernel, backend.adaln_bwd_sums_kernel)
    with offline.launched("sm_90"):
        device = triton_launch.triton.runtime.driver.active.get_current_device()
        for kernel in kernels:
            kernel.device_caches[device][0].clear()
        for samples, tokens in ((2, 256), (1, 1000), (3, 77), (1, 4096), (2, 513)):
            gated(samples, tokens)
        assert [len(kernel.device_caches[device][0]) for kernel in kernels] == [1, 1, 1]


def test_no_launch_for_nothing():
    with offline.recorded() as launches:
        gated(0, 16)
        gated(2, 0)
    assert not launches


def test_gradient_sums_are_small():
    """A row of sums for at least 64 tokens, once there are enough programs to fill a large GPU."""
    with offline.recorded() as launches:
        gated(256, 256, channels=1152)
    forward, backward, sums = launches
    assert forward.grid[0] >= 2048
    assert backward.grid[0] <= 256 * 256 // 64
    assert sums.grid[0] == 256


def test_a_launch_goes_to_the_tensors_device(monkeypatch):
    """Triton launches on the current device; the tensors may stand in a tuple."""

    class Elsewhere(torch.Tensor):
        is_cuda = True
        device = torch.device("cuda", 1)

    current = [0]

    @contextlib.contextmanager
    def switched(device: torch.device):
        current[0] = device.index
        yield
        current[0] = 0

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: current[0]

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", switched)
    there = torch.empty(4).as_subclass(Elsewhere)
    assert triton_launch.launch(Kernel(), (1,), None, there) == 1
    assert triton_launch.launch(Kernel(), (1,), (there, there), None, 5) == 1
    assert triton_launch.launch(Kernel(), (1,), torch.empty(4), 5) == 0


@pytest.mark.parametrize("setting", ["older", "newer"])
def test_float32_products_take_tf32_where_torch_does(setting):
    matmul = torch.backends.cuda.matmul
    x, weight = torch.empty(1, 2, 64), torch.empty(16, 64)
    before = matmul.fp32_precision
    try:
        for allowed in (True, False):
            if setting == "older":
                matmul.allow_tf32 = allowed
            else:
                matmul.fp32_precision = "tf32" if allowed else "ieee"
            with offline.recorded() as launches, torch.no_grad():
                q = torch.empty(1, 8, 2, 16)
                ops.attention3d(q, q, q, backend="triton")
                shift = torch.empty(1, 64)
                ops.final_layer(x, shift, shift, weight, None, (1, 1, 2), (1, 2, 2), 4, backend="triton")  # fmt: skip
                ops.patch_embed(torch.empty(1, 4, 2, 4, 4), torch.empty(64, 4, 1, 2, 2), backend="triton")  # fmt: skip
            assert len(launches) == 3
            for launch in launches:
                assert launch._named()["PRECISION"] == ("tf32" if allowed else "ieee"), launch.name
    finally:
        matmul.allow_tf32 = False
        matmul.fp32_precision = before


def test_every_group_of_sums_is_on_the_long_axis_of_the_grid():
    """The others end at 65535: a modulation row for two tokens of a long batch has more."""
    sums, out = torch.empty(1, 3, 72).expand(70_000, 3, 72), torch.empty(1, 72).expand(70_000, 72)
    with offline.recorded() as launches:
        triton_rows.add_rows(sums, out, groups=70_000)
    assert launches[0].grid == (3 * 70_000,)


@pytest.mark.parametrize("target", offline.TARGETS)
def test_audited_figures(target):
    with offline.recorded(target) as launches:
        gated(2, 64, channels=1152)
    row = {"target": target, **audit.inspect(launches[0], target)}
    assert row["spills"] == 0
    assert max(row["loads"]) == max(row["stores"]) == row["aligned"] == 16
    assert not audit.problems(row)


def test_audit_knows_what_rows_allow():
    """Rows that start anywhere cannot be loaded 16 bytes at a time, and only that excuses narrow loads."""
    wide = torch.empty(2, 8, 1153, dtype=torch.bfloat16)
    with offline.recorded() as launches:
        ops.adaln(wide[..., 1:], backend="triton")
    row = {"target": "sm_90", **audit.inspect(launches[0], "sm_90")}
    assert (row["aligned"], max(row["loads"])) == (2, 2)
    assert not audit.problems(row)
    assert audit.problems({**row, "aligned": 16}) == ["most bytes come by loads of 2 where 16 fit"]


def test_audit_finds_spills_and_slow_products():
    row = dict(
        target="sm_90", spills=1, loads={16: 1}, tma=False, dot16=True, matrix="HMMA", aligned=16,
        shared=0, occupancy=0.5,
    )  # fmt: skip
    assert audit.problems(row) == ["spills", "a 16-bit matrix product without HGMMA"]
    assert audit.problems({**row, "target": "sm_80"}) == ["spills"]
    assert not audit.problems({**row, "spills": 0, "matrix": "HGMMA"})


def test_chunk_views_are_loaded_whole():
    """Every chunk of one projection keeps 16-byte loads, whatever its place."""
    mod = torch.empty(2, 6 * 1152, dtype=torch.bfloat16)
    x = torch.empty(2, 64, 1152, dtype=torch.bfloat16)
    keys = set()
    for shift, scale in itertools.pairwise(mod.chunk(6, dim=-1)):
        with offline.recorded() as launches:
            ops.adaln(x, shift, scale, backend="triton")
        keys.add(launches[0].key("sm_90"))
    assert len(keys) == 1


def key_of(x: torch.Tensor, **options: object) -> str:
    with offline.recorded() as launches:
        ops.adaln(x, backend="triton", **options)
    return launches[0].key("sm_90")


def test_key_of_a_binary():
    """It changes with all that a binary depends on and the repository decides, and with nothing else."""
    x = torch.empty(2, 64, 1152, dtype=torch.bfloat16)
    key = key_of(x)
    assert key == key_of(torch.empty(1, 999, 1152, dtype=torch.bfloat16))
    others = {
        key_of(x.float()), key_of(x, norm="rms"), key_of(x, rounding="eager"), key_of(x[..., :1024]),
        key_of(torch.empty(2, 64, 1153, dtype=torch.bfloat16)[..., 1:]),
    }  # fmt: skip
    assert len(others | {key}) == 6


def test_key_follows_the_code(monkeypatch):
    """The kernel's and that of what it calls, but not its comments."""
    from dit_kernels.ops.adaln import triton_backward as kernels

    with offline.recorded() as launches:
        gated(2, 64)
    launch = launches[1]

    def key() -> str:
        offline._code.cache_clear()
        return launch.key("sm_90")

    before = key()
    source = kernels.adaln_bwd_kernel.raw_src
    monkeypatch.setattr(kernels.adaln_bwd_kernel, "raw_src", [*source, "    # a remark\n"])
    assert key() == before
    monkeypatch.setattr(kernels.adaln_bwd_kernel, "raw_src", [*source, "    x = 1\n"])
    assert key() != before
    monkeypatch.setattr(kernels.adaln_bwd_kernel, "raw_src", source)
    called = next(
        used
        for name, used in vars(kernels).items()
        if name in kernels.adaln_bwd_kernel.fn.__code__.co_names and hasattr(used, "raw_src")
    )
    monkeypatch.setattr(called, "raw_src", [*called.raw_src, "    x = 1\n"])
    assert key() != before
    monkeypatch.undo()
    assert key() == before


class Audited:
    """`python -m benchmarks.audit OP` with given figures in place of compiled binaries."""

    def __init__(self, folder, monkeypatch, capsys) -> None:
        self.folder, self.monkeypatch, self.capsys = folder, monkeypatch, capsys
        self.op = "unpatchify"
        self.compiled: list[str] = []
        self.figures = dict(
            tile="", warps=4, registers=32, spills=0, shared=0, occupancy=1.0, loads={16: 1}, stores={16: 1},
            matrix="", tma=False, dot16=False, aligned=16,
        )  # fmt: skip
        monkeypatch.setattr(audit, "HERE", folder)
        monkeypatch.setattr(audit, "inspect", self.inspect)

    def inspect(self, launch: offline.Launch, target: str) -> dict[str, object]:
        self.compiled.append(launch.name)
        return dict(self.figures)

    def __call__(self, *arguments: str) -> tuple[int, str]:
        """Exit status and last line."""
        self.compiled.clear()
        self.monkeypatch.setattr("sys.argv", ["audit", self.op, *arguments])
        return audit.main(), self.capsys.readouterr().out.splitlines()[-1]

    @property
    def store(self) -> Path:
        return self.folder / "audit.json"

    @property
    def table(self) -> Path:
        return self.folder / "audit.md"


@pytest.fixture
def audited(tmp_path, monkeypatch, capsys) -> Audited:
    return Audited(tmp_path, monkeypatch, capsys)


def test_check_compiles_what_changed_and_fails(audited):
    assert audited("--target", "sm_90")[0] == 0
    assert set(audited.compiled) == {"unpatchify"}
    count = len(audited.compiled)
    # the other targets are named in the table, and not asked for
    assert (
        "unpatchify has not been compiled for sm_80, sm_100, gfx942 yet."
        in audited.table.read_text()
    )
    assert audited("--check") == (0, f"{count} binaries: no spill, no narrow load")
    assert not audited.compiled
    lines = audited.store.read_text().splitlines()
    audited.store.write_text("\n".join([*lines[:1], *lines[2:]]))
    assert audited("--check")[0] == 0
    assert audited.compiled == ["unpatchify"]
    audited.figures["registers"] = 33
    status, last = audited("--check")
    assert (status, last) == (1, "benchmarks/audit.md is not of this source: run `make audit` and commit it")  # fmt: skip


@pytest.mark.parametrize(
    ("planted", "problem"),
    [
        (dict(spills=1), "spills"),
        (dict(occupancy=0.0), "a block does not fit: 0 bytes of shared memory"),
        (dict(shared=240_000), "a block does not fit: 240000 bytes of shared memory"),
        (dict(loads={4: 9, 16: 2}), "most bytes come by loads of 4 where 16 fit"),
        (dict(dot16=True, matrix="HMMA"), "a 16-bit matrix product without HGMMA"),
        (dict(dot16=True, matrix=""), "a 16-bit matrix product without HGMMA"),
    ],
)
@pytest.mark.parametrize("how", ["committed", "compiled"])
def test_check_fails_on_a_planted_row(audited, planted, problem, how):
    """One bad row: in the table and its store, where nothing is compiled, or from the compiler."""
    assert audited("--target", "sm_90")[0] == 0
    rows = json.loads(audited.store.read_text())
    bad = next(iter(rows))
    failure = f"unpatchify: {rows[bad]['call']} unpatchify sm_90: {problem}"
    if how == "compiled":
        audited.figures |= planted
        del rows[bad]
        audit.save(audited.store, rows)
        assert audited("--target", "sm_90") == (1, failure)
        assert audited.compiled == ["unpatchify"]
    else:
        rows[bad] |= planted
        audit.save(audited.store, rows)
        audited.table.write_text(audit.render(list(json.loads(audited.store.read_text()).values())))
    assert audited("--check") == (1, failure)
    assert not audited.compiled


def test_candidates_of_the_tuner_are_compiled_and_may_spill(audited):
    """Asked for once, they stay in the table, apart from the defaults; only a default must be good."""
    monkeypatch = audited.monkeypatch
    tiles = [feed_forward._DEFAULT, feed_forward._DEFAULT._replace(block_m=16)]
    for kernel in ("feed_forward.forward", "feed_forward.backward"):
        monkeypatch.setitem(triton_tuning.CANDIDATES, kernel, lambda key, default: tiles)
    audited.op = "feed_forward"
    assert audited("--target", "sm_90")[0] == 0
    defaults = set(json.loads(audited.store.read_text()))
    audited.figures["spills"] = 1
    assert audited("--target", "sm_90", "--candidates")[0] == 0
    rows = json.loads(audited.store.read_text())
    new = {key: row for key, row in rows.items() if key not in defaults}
    assert set(audited.compiled) == {"feed_forward_fwd", "feed_forward_bwd"}
    assert len(new) == len(audited.compiled)
    assert all(row["candidate"] == (key in new) for key, row in rows.items())
    above, below = audited.table.read_text().split("What the tuner tries beside the defaults:")
    assert (above.count("| 1 | 0 | 100% |"), below.count("| 1 | 0 | 100% |")) == (0, len(new))
    assert audited("--check")[0] == 0
    assert not audited.compiled


def test_the_committed_table_has_every_op_on_every_target():
    """`--check` holds what is in the table against the source; here, that nothing is left out of it."""
    ops_of_triton = [op for op, found in backends.TABLE.items() if "triton" in found]
    rows = json.loads((Path(audit.__file__).parent / "audit.json").read_text()).values()
    there = {(row["op"], row["target"]) for row in rows}
    assert there == set(itertools.product(ops_of_triton, offline.TARGETS))


def test_ops_that_share_a_kernel_each_have_its_row(audited):
    """Whichever was compiled first; the table is the same however it came to be."""
    tables = []
    for order in (("patch_embed", "final_layer", "patch_embed"), ("final_layer", "patch_embed")):
        audited.store.unlink(missing_ok=True)
        for op in order:
            audited.op = op
            assert audited("--target", "sm_90")[0] == 0
        compiled = len(audited.compiled)
        rows = json.loads(audited.store.read_text())
        assert compiled < len([row for row in rows.values() if row["op"] == order[-1]])
        assert all(key.startswith(f"{row['op']} ") for key, row in rows.items())
        tables.append(audited.table.read_text())
    assert tables[0] == tables[1]
    assert audited("--check")[0] == 0
