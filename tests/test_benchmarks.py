"""The benchmark suite, dry: what it counts, how it fails, and that a run on this machine works."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import bench, gpu, machine, report
from benchmarks.baselines import baselines
from benchmarks.cases import CASES, cases_for
from benchmarks.shapes import SHAPES
from benchmarks.timing import timed
from dit_kernels import backends, testing

ROOT = Path(__file__).parent.parent


def test_every_op_has_a_case():
    assert {case.op for case in CASES} == set(backends.TABLE)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_case_fits_its_shape(shape):
    """The arguments are accepted, and so are those of the small form that accuracy is asserted on."""
    for case in cases_for(SHAPES[shape]):
        costs = case.cost(SHAPES[shape], torch.bfloat16)
        assert costs["forward"][1] > 0
        assert costs["backward"][1] > 0
        small = case.arguments(SHAPES[shape].small(), torch.bfloat16, "cpu", 0)
        testing.run(case.function, small, backward=False)


def test_costs_are_those_of_the_floors():
    """X = 2 B N C bytes; attention 4 B N^2 C and 10 B N^2 C FLOPs."""
    shape = SHAPES["dit-xl-1024"]
    x = 2 * shape.batch * shape.tokens * shape.channels
    pairs = shape.batch * shape.tokens**2 * shape.channels
    found = {case.name: case.cost(shape, torch.bfloat16) for case in cases_for(shape)}
    assert found["adaln"]["forward"] == (0, 2 * x)
    assert found["gated_adaln"]["forward"] == (0, 4 * x)
    assert found["gated_adaln"]["backward"] == (0, 6 * x)
    assert found["attention"]["forward"] == (4 * pairs, 4 * x)
    assert found["attention"]["backward"] == (10 * pairs, 8 * x)
    wan = SHAPES["wan-1.3b-480p"]
    found = {case.name: case.cost(wan, torch.bfloat16) for case in cases_for(wan)}
    kept = (6 * 8 * 8) / wan.patches
    assert found["attention-window"]["forward"][0] == pytest.approx(
        kept * found["attention"]["forward"][0], rel=1e-6
    )


def test_a_run_writes_what_it_measured(tmp_path, capsys):
    code = bench.main(
        ["adaln", "--shape", "tiny-image", "--dtype", "float32", "--out", str(tmp_path)]
    )
    result = json.loads((tmp_path / "ops.json").read_text())
    assert code == 0, capsys.readouterr().out
    assert {"date", "commit", "device", "torch", "triton"} <= set(result["machine"])
    assert all(value > 0 for value in result["ceilings"].values())
    measured = [row for row in result["rows"] if "ms" in row]
    assert {"eager", "compile"} <= {row["implementation"] for row in measured}
    assert {row["direction"] for row in measured} == {"forward", "backward"}
    assert all(row["ms"] > 0 and row["accurate"] for row in measured)
    assert all("absent" in row for row in result["rows"] if row not in measured)


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    from dit_kernels.ops.feed_forward import reference

    right = reference.forward

    def wrong(x, bias, act, stats):
        (y,) = right(x, bias, act, stats)
        return [y if x.dtype == torch.float64 else y + 1]

    monkeypatch.setattr(reference, "forward", wrong)
    rows = list(bench.run("cpu", ["gelu"], ["tiny-image"], torch.bfloat16))
    (failed,) = (row for row in rows if row["implementation"] == "reference")
    assert "out0 is off by" in failed["failed"]


class TritonError(Exception):
    """As Triton's out-of-resources and compilation errors: a plain Exception, perhaps without a message."""


@pytest.mark.parametrize(
    "error", [TritonError("out of resource: shared memory\nRequired"), TritonError()]
)
def test_a_kernel_that_fails_to_build_does_not_stop_the_run(monkeypatch, error):
    from dit_kernels.ops.feed_forward import reference

    def broken(*args):
        raise error

    monkeypatch.setattr(reference, "forward", broken)
    rows = list(bench.run("cpu", ["gelu"], ["tiny-image"], torch.float32))
    (failed,) = (row for row in rows if row["implementation"] == "reference")
    message = "out of resource: shared memory" if error.args else "no message"
    assert failed["failed"] == f"TritonError: {message}"
    assert {row["implementation"] for row in rows} >= {"reference", "eager", "compile"}


def test_compare_shows_what_moved_by_more_than_the_spread(tmp_path):
    key = {
        "case": "adaln",
        "shape": "s",
        "implementation": "triton",
        "direction": "forward",
        "dtype": "bfloat16",
    }
    for name, ms in (("a", 1.0), ("b", 1.5), ("c", 1.01)):
        row = {**key, "ms": ms, "ms_quartiles": [ms - 0.01, ms, ms + 0.01]}
        (tmp_path / name).write_text(json.dumps({"rows": [row, {**key, "absent": "no"}]}))
    (line,) = bench.compare(tmp_path / "a", tmp_path / "b")
    assert line.startswith(" +50.0%  1.0000 -> 1.5000 ms  adaln s triton")
    assert bench.compare(tmp_path / "a", tmp_path / "c") == []


def test_wrong_words_are_one_line_and_exit_code_2(tmp_path, capsys):
    assert bench.main(["adalm"]) == 2
    assert "no case 'adalm'; there are adaln," in capsys.readouterr().err
    assert bench.main(["--compare", str(tmp_path / "x"), str(tmp_path / "y")]) == 2
    assert "no such file" in capsys.readouterr().err


def test_absent_baselines_have_a_reason():
    shape = SHAPES["tiny-video"]
    for case in cases_for(shape):
        arguments = case.arguments(shape, torch.float32, "cpu", 0)
        for baseline in baselines("cpu"):
            if baseline.applies(case):
                reason = baseline.missing(case, arguments)
                assert reason is None or len(reason) > 5


def test_timing_counts_one_call():
    calls = []
    samples = timed([lambda: calls.append(1)] * 3, "cpu", seconds=0.0, least=4)
    assert len(samples) == 4
    assert len(calls) == 3 * (2 + 4)


def test_gpu_stages_are_skipped_by_name_without_a_gpu(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "test", "bench-adaln"],
        cwd=ROOT, env={"OUT": str(tmp_path), "PATH": "", "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "test             skipped: there is no GPU" in run.stdout
    assert "bench-adaln      skipped: there is no GPU" in run.stdout
    assert "bench-rest" not in run.stdout
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "tune"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 2
    assert "no stage 'tune'" in run.stderr


def test_a_stage_has_a_time_limit_and_does_not_stop_the_next(tmp_path, monkeypatch, capsys):
    stages = (
        gpu.Stage("slow", (sys.executable, "-c", "import time; time.sleep(60)"), 1),
        gpu.Stage("broken", (sys.executable, "-c", "raise SystemExit(3)"), 20),
        gpu.Stage("fine", (sys.executable, "-c", "print('all is well')"), 20),
    )
    monkeypatch.setattr(gpu, "STAGES", stages)
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu.main([]) == 1
    printed = capsys.readouterr().out
    assert "slow             FAILED (over its 1 s)" in printed
    assert "broken           FAILED (3)" in printed
    assert "fine             ok in" in printed
    assert "all is well" in (tmp_path / "gpu.log").read_text()


def test_stages_fit_in_ten_minutes():
    assert sum(stage.limit for stage in gpu.STAGES) <= 590


@pytest.mark.parametrize(
    ("name", "folder"),
    [("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-40GB", "a100")],
)
def test_results_folder_is_named_after_the_card(monkeypatch, name, folder):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: name)
    assert machine.folder("cuda") == folder


def test_the_committed_page_is_what_the_committed_results_give():
    assert report.PAGE.read_text().startswith(report.page(report.read_runs()))


def test_the_report_shows_losses_and_what_was_not_measured(tmp_path):
    key = {
        "op": "adaln",
        "case": "adaln",
        "shape": "s",
        "dtype": "bfloat16",
        "flops": 0,
        "bytes": 10**9,
    }
    rate = {"gbps": 1000.0, "tflops": 0.0}
    rows = [
        {**key, **rate, "implementation": name, "direction": "forward", "ms": ms}
        for name, ms in (("triton", 1.0), ("compile", 0.5))
    ]
    rows += [{**key, **rate, "implementation": "eager", "direction": "backward", "ms": 3.0}]
    rows += [{**key, "implementation": "cuda", "absent": "not built"}]
    rows += [{**key, "implementation": "flex", "failed": "RuntimeError: no"}]
    ceilings = {"copy_gbps": 4000.0, "matmul_tflops": 800.0, "launch_us": 2.0}
    run = {"machine": {"device": "NVIDIA H200"}, "ceilings": ceilings, "rows": rows}
    text = report.page({"h200": [run]})
    assert "| adaln | s | forward | 1.0000 | 0.5000 | - | 25.0% | 0.50x |" in text
    assert "| adaln | s | backward | - | - | 3.0000 | not measured | - |" in text
    assert "- cuda: not built" in text
    assert "- flex in adaln s: RuntimeError: no" in text
    assert "Not measured on a GPU yet" not in text
    assert "Not measured on a GPU yet" in report.page({})
    report.roofline([run], tmp_path / "roofline")
    assert (tmp_path / "roofline.svg").stat().st_size > 1000
