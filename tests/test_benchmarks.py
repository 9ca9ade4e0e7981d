"""The benchmark suite, dry: what it counts, how it fails, and that a run on this machine works."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.figure
import pytest
import torch

from benchmarks import (
    accuracy,
    bench,
    fastest,
    gpu,
    host_cost,
    machine,
    plots,
    report,
    runs,
    targets,
    timing,
    warm,
)
from benchmarks.baselines import Baseline, baselines
from benchmarks.cases import CASES, cases_for
from benchmarks.shapes import SHAPES, SWEEPS, Shape
from benchmarks.timing import timed
from dit_kernels import backends, measured, ops, testing

ROOT = Path(__file__).parent.parent


def test_every_op_has_a_case():
    assert {case.op for case in CASES} == set(backends.TABLE)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_case_fits_its_shape(shape):
    for case in cases_for(SHAPES[shape]):
        costs = case.cost(SHAPES[shape], torch.bfloat16)
        assert costs["forward"][1] > 0
        assert costs["backward"][1] > 0


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_small_form_of_a_case_runs(case):
    """What accuracy is asserted on."""
    shapes = [SHAPES["wan-1.3b-480p"], SHAPES["dit-s-256"], SWEEPS["packed"].points[8]]
    shape = next(shape for shape in shapes if case in cases_for(shape))
    small = case.arguments(shape.small(), torch.bfloat16, "cpu", 0)
    assert all(out.isfinite().all() for out in testing.run(case.function, small).all().values())


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


def test_sweeps_span_what_they_promise():
    sizes = {name: sorted(sweep.points) for name, sweep in SWEEPS.items()}
    assert (sizes["tokens"][0], sizes["tokens"][-1]) == (256, 131072)
    assert (sizes["channels"][0], sizes["channels"][-1]) == (384, 8192)
    assert all(shape.tokens == n for n, shape in SWEEPS["tokens"].points.items())
    assert all(shape.channels == c for c, shape in SWEEPS["channels"].points.items())
    for share, shape in SWEEPS["window"].points.items():
        assert math.prod(shape.window) / shape.patches == share
    packed = SWEEPS["packed"].points
    assert {shape.tokens for shape in packed.values()} == {
        16384
    }  # one size of batch, cut differently
    assert all(len(shape.lengths) == n for n, shape in packed.items())
    for sweep in SWEEPS.values():
        for shape in sweep.points.values():
            assert {case.name for case in cases_for(shape)} >= set(sweep.cases)


def test_a_packed_batch_costs_what_its_sequences_cost():
    shape = SWEEPS["packed"].points[8]
    (case,) = cases_for(shape, ("attention-packed",))
    pairs = sum(length**2 for length in shape.lengths) * shape.channels
    assert case.cost(shape, torch.bfloat16)["forward"][0] == 4 * pairs


def only(monkeypatch, *names: str) -> None:
    """Runs of these implementations only."""
    found = {baseline.name: baseline for baseline in baselines("cpu")}
    monkeypatch.setattr(bench, "baselines", lambda device: [found[name] for name in names])


def rows_of(cases: list[str], shape: str, dtype: torch.dtype, **options) -> list[bench.Row]:
    rows = bench.run("cpu", bench.points(cases, [shape], [], "cpu"), dtype, **options)
    return [row for row in rows if "begun" not in row]


def test_a_run_writes_what_it_measured(tmp_path, capsys):
    code = bench.main(
        ["gelu", "--shape", "tiny-image", "--dtype", "float32", "--out", str(tmp_path)]
    )
    result = json.loads((tmp_path / "ops.json").read_text())
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert {"date", "commit", "device", "torch", "triton"} <= set(result["machine"])
    assert all(value > 0 for value in result["ceilings"].values())
    measured = [row for row in result["rows"] if "ms" in row]
    assert {"eager", "compile", "reference"} <= {row["implementation"] for row in measured}
    assert {row["direction"] for row in measured} == {"forward", "backward", "both"}
    assert all(row["ms"] > 0 and row["accurate"] for row in measured)
    assert {row["timed_by"] for row in measured} == {"clock"}
    assert all("absent" in row for row in result["rows"] if row not in measured)
    # the forward of a gelu without a bias reads x and writes y; it keeps x
    ours = {row["direction"]: row for row in measured if row["implementation"] == "reference"}
    assert 2 * ours["both"]["saved_bytes"] == ours["forward"]["bytes"]
    assert ours["forward"]["saved_bytes"] is None
    assert min(result["host_us"].values()) > 0
    assert set(result["host_us"]) == {"F.layer_norm of a row", "gelu"}
    assert f"## {result['machine']['device']}\n\nA CPU run shows that" in printed


def test_the_hosts_cost_is_of_every_op(monkeypatch):
    monkeypatch.setattr(host_cost, "microseconds", lambda call: 1.0 if call() is not None else 0.0)
    found = dict(host_cost.costs())
    assert {case.op for case in CASES if case.name in found} == set(backends.TABLE)
    assert set(found.values()) == {1.0}


def test_a_run_out_of_time_says_what_is_missing(tmp_path, monkeypatch, capsys):
    only(monkeypatch, "eager")
    monkeypatch.setattr(machine, "ceilings", lambda device: CEILINGS)
    monkeypatch.setattr(bench, "_host_cost", lambda wanted: {})
    code = bench.main(["gelu", "swiglu", "--seconds", "0", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "ops.json").read_text())
    assert code == 0
    assert (result["rows"], result["unfinished"]) == ([], 4)
    assert "out of time: 4 not begun" in capsys.readouterr().out


def test_sweeps_stay_small_on_a_cpu():
    wanted = bench.points([], [], list(SWEEPS), "cpu")
    assert max(point.shape.batch * point.shape.tokens for point in wanted) == bench.CPU_TOKENS
    assert {point.tags["sweep"] for point in wanted} == {"tokens", "batch"}
    assert {point.case.name for point in wanted if point.tags["sweep"] == "tokens"} == {
        "adaln", "gated_adaln", "qk_norm_rope", "attention"
    }  # fmt: skip


def test_what_takes_long_to_prepare_comes_last(monkeypatch):
    """A run that is cut off has timed ours against eager everywhere before anything is tuned."""

    def made(name: str, preparation: int) -> Baseline:
        options = {"preparation": preparation}
        return Baseline(name, lambda case: True, lambda *_: "absent", lambda *_: None, **options)

    found = [made("tuned", 2), made("compiled", 1), made("ours", 0)]
    monkeypatch.setattr(bench, "baselines", lambda device: found)
    rows = rows_of(["gelu", "swiglu"], "tiny-image", torch.float32)
    names = [row["implementation"] for row in rows]
    assert names == ["ours", "ours", "compiled", "compiled", "tuned", "tuned"]


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    from dit_kernels.ops.feed_forward import reference

    right = reference.forward

    def wrong(x, bias, act, stats):
        (y,) = right(x, bias, act, stats)
        return [y if x.dtype == torch.float64 else y + 1]

    monkeypatch.setattr(reference, "forward", wrong)
    only(monkeypatch, "reference")
    (failed,) = rows_of(["gelu"], "tiny-image", torch.bfloat16)
    assert "out0 is off by" in failed["failed"]
    assert "ms" not in failed


VIDEO = Shape(1, (3, 5, 6), 64, 2, 32, text=4, window=(2, 3, 4))
MIXED = SWEEPS["packed"].points[8].small()


@pytest.mark.parametrize(
    ("name", "shape"),
    [("attention", VIDEO), ("attention-window", VIDEO), ("attention-packed", MIXED)],
)
def test_rows_of_attention_are_held_against_the_oracle(monkeypatch, name, shape):
    """What is compared of a video, whose N x N scores fit nowhere in float64."""
    monkeypatch.setattr(accuracy, "ROWS", 24)
    (case,) = (case for case in CASES if case.name == name)
    arguments = case.arguments(shape, torch.bfloat16, "cpu", 0)
    with testing.plain_torch():
        right = accuracy.compared_rows(arguments, ops.attention3d, backward=True)
    assert [a.tensor for a in right] == ["out0", "dq", "dk", "dv"]
    assert all(a.ok and a.allowed > 0 for a in right)

    def without_the_last_key(q, k, v, **options):
        k = torch.cat((k[:, :-1], k[:, :1]), dim=1)
        return ops.attention3d(q, k, v, backend="reference", **options)

    wrong = accuracy.compared_rows(arguments, without_the_last_key, backward=True)
    assert not all(a.ok for a in wrong)


def test_rows_tell_a_gradient_of_other_rows():
    case = next(case for case in CASES if case.name == "attention")
    shape = Shape(1, (1, 16, 16), 64, 2, 32)
    arguments = case.arguments(shape, torch.float32, "cpu", 0)

    def leaking(q, k, v):
        mean = q.mean(1, keepdim=True)
        return ops.attention3d(q + (mean - mean.detach()), k, v)

    found = {a.tensor: a for a in accuracy.compared_rows(arguments, leaking, backward=True)}
    assert found["out0"].ok
    assert not found["dq"].ok


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("gated_adaln", "dit-xl-256", "all"), ("attention", "dit-xl-256", "all"),
        ("attention", "dit-xl-1024", "all"), ("attention", "wan-1.3b-480p", "rows"),
        ("attention-window", "wan-1.3b-480p", "rows"), ("gated_adaln", "wan-14b-720p", "small form"),
    ],
)  # fmt: skip
def test_what_is_compared_fits_a_gpu(name, shape, expected):
    (case,) = (case for case in CASES if case.name == name)
    assert accuracy.reach(case, SHAPES[shape], "cuda") == expected


def test_what_is_compared_is_what_is_timed():
    """With a gradient of the rotation's tables torch.compile would compile another backward."""
    case = next(case for case in CASES if case.name == "qk_norm_rope")
    arguments = case.arguments(SHAPES["tiny-video"], torch.bfloat16, "cpu", 0)
    (reference,) = (b for b in baselines("cpu") if b.name == "reference")
    found = accuracy.compared(case, arguments, reference, reference.call(case, arguments))
    assert {a.tensor for a in found} == {"out0", "out1", "dq", "dk", "dq_weight", "dk_weight"}
    assert all(a.ok and a.allowed > 0 for a in found)


def test_an_oracle_that_does_not_fit_is_of_the_small_form(monkeypatch):
    compared = bench.compared

    def full(case, arguments, *others):
        if arguments["x"].shape[1] == SHAPES["tiny-image"].tokens:
            raise torch.OutOfMemoryError
        return compared(case, arguments, *others)

    monkeypatch.setattr(bench, "compared", full)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    only(monkeypatch, "reference")
    rows = rows_of(["gelu"], "tiny-image", torch.float32)
    assert {row["compared"] for row in rows} == {"small form"}
    assert all(row["accurate"] for row in rows)


def test_every_case_of_attention_has_an_oracle_of_rows():
    """At the sizes of the sweeps, up to 131072 tokens, no other oracle fits."""
    for case in CASES:
        if case.op == "attention3d":
            shape = MIXED if case.name.endswith("-packed") else VIDEO
            arguments = case.arguments(shape, torch.float32, "cpu", 0)
            with testing.plain_torch():
                found = accuracy.compared_rows(arguments, ops.attention3d, backward=False)
            assert [a.tensor for a in found] == ["out0"]


def test_a_wrong_other_is_timed_and_marked(monkeypatch):
    def call(case, arguments):
        return lambda x: torch.nn.functional.gelu(x, approximate="tanh") + 1

    wrong = Baseline(
        "other", lambda case: True, lambda *_: None, call, has_backward=lambda case: False
    )
    monkeypatch.setattr(bench, "baselines", lambda device: [wrong])
    (row,) = rows_of(["gelu"], "tiny-image", torch.float32)
    assert (row["direction"], row["accurate"], row["saved_bytes"]) == ("forward", False, None)
    assert "INACCURATE" in bench.describe(row, {"copy_gbps": 1.0, "matmul_tflops": 1.0})


class TritonError(Exception):
    """As Triton's out-of-resources and compilation errors: a plain Exception, perhaps without a message."""


@pytest.mark.parametrize(
    "error", [TritonError("out of resource: shared memory\nRequired"), TritonError()]
)
def test_a_kernel_that_fails_to_build_does_not_stop_the_run(monkeypatch, error):
    from dit_kernels.ops.feed_forward import reference

    right = reference.forward

    def broken(x, *args):
        if x.dtype == torch.float64:  # the oracle
            return right(x, *args)
        raise error

    monkeypatch.setattr(reference, "forward", broken)
    only(monkeypatch, "reference", "eager")
    failed, *others = rows_of(["gelu"], "tiny-image", torch.float32)
    message = "out of resource: shared memory" if error.args else "no message"
    assert failed["failed"] == f"TritonError: {message}"
    assert {row["implementation"] for row in others if "ms" in row} == {"eager"}


def test_a_run_that_was_cut_off_goes_on(tmp_path, monkeypatch, capsys):
    """What crashed the process is a failure, what was measured stays, the rest is measured."""
    only(monkeypatch, "eager")
    monkeypatch.setattr(machine, "ceilings", lambda device: CEILINGS)
    monkeypatch.setattr(bench, "_host_cost", lambda wanted: {})
    arguments = ["gelu", "swiglu", "--shape", "tiny-image", "--out", str(tmp_path)]
    path, save = tmp_path / "ops.json", bench.save

    class Crash(BaseException):
        pass

    def crashing(path, result):
        save(path, result)
        if result.get("begun", {}).get("case") == "swiglu":
            raise Crash

    monkeypatch.setattr(bench, "save", crashing)
    with pytest.raises(Crash):
        bench.main(arguments)
    cut_off = json.loads(path.read_text())
    assert cut_off["begun"]["case"] == "swiglu"
    assert len(cut_off["rows"]) == 3
    monkeypatch.setattr(bench, "save", save)
    monkeypatch.setenv("COMMIT", "0123abc")
    bench.main([*arguments, "--shape", "tiny-video", "--resume"])
    result = json.loads(path.read_text())
    assert "begun" not in result
    assert result["machine"]["commit"] == f"{cut_off['machine']['commit']}, 0123abc"
    assert result["rows"][:3] == cut_off["rows"]
    crashed, *others = result["rows"][3:]
    assert crashed["case"] == "swiglu"
    assert "it crashed, hung or was killed" in crashed["failed"]
    assert {(row["case"], row["shape"]) for row in others} == {
        ("gelu", "tiny-video"), ("swiglu", "tiny-video")
    }  # fmt: skip
    assert "failed" not in str(others)


def test_an_interrupted_run_shows_what_it_has(tmp_path, monkeypatch, capsys):
    only(monkeypatch, "eager")
    monkeypatch.setattr(machine, "ceilings", lambda device: CEILINGS)
    measured = bench._measured

    def interrupted(point, *args):
        yield from measured(point, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "_measured", interrupted)
    arguments = ["gelu", "swiglu", "--shape", "tiny-image", "--out", str(tmp_path)]
    assert bench.main(arguments) == 130
    printed = capsys.readouterr().out
    assert "interrupted; --resume goes on" in printed
    assert "| tiny-image | forward |" in printed
    assert "3 rows, 0 failed" in printed.splitlines()[-1]
    assert json.loads((tmp_path / "ops.json").read_text())["begun"]["case"] == "gelu"


def test_a_lost_context_ends_the_run_and_says_so(tmp_path, monkeypatch, capsys):
    only(monkeypatch, "eager")
    monkeypatch.setattr(machine, "ceilings", lambda device: CEILINGS)
    monkeypatch.setattr(bench, "_host_cost", lambda wanted: {})
    monkeypatch.setattr(bench, "lost", lambda device: True)
    bench.main(["gelu", "swiglu", "--shape", "tiny-image", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "ops.json").read_text())
    assert {row["case"] for row in result["rows"]} == {"gelu"}
    assert (result["unfinished"], result["begun"]) == (1, {})
    assert "the GPU's context is lost; --resume goes on: 1 not begun" in capsys.readouterr().out


def test_what_never_ends_is_ended(tmp_path):
    """No exception can be raised in a thread that waits for the GPU."""
    code = (
        "import threading; from benchmarks.bench import ended_after\n"
        "with ended_after(0.5, 'cuda'): threading.Event().wait()"
    )
    run = subprocess.run(
        python(code), cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert run.returncode == 1
    assert "Timeout" in run.stderr


def test_compare_shows_what_moved_by_more_than_the_spread(tmp_path):
    key = {
        "case": "adaln", "shape": "s", "implementation": "triton", "direction": "forward", "dtype": "bfloat16"
    }  # fmt: skip
    model = {
        "model": "DiT", "mode": "train", "measure": "throughput", "batch": 8, "implementation": "ours"
    }  # fmt: skip
    for name, ms, device in (("a", 1.0, "H100"), ("b", 1.5, "H100"), ("c", 1.01, "H200")):
        rows = [{**k, "ms": ms, "ms_quartiles": [ms - 0.01, ms, ms + 0.01]} for k in (key, model)]
        text = json.dumps({"machine": {"device": device}, "rows": [*rows, {**key, "absent": "no"}]})
        (tmp_path / name).write_text(text)
    models, ops = bench.compare(tmp_path / "a", tmp_path / "b")
    assert models == " +50.0%  1.0000 -> 1.5000 ms  DiT train throughput ours"
    assert ops == " +50.0%  1.0000 -> 1.5000 ms  adaln s triton bfloat16 forward"
    assert bench.compare(tmp_path / "a", tmp_path / "c") == [
        "device: H100 -> H200", "none of 2 measured in both moved by more than the runs' spread"
    ]  # fmt: skip
    failed = {"machine": {"device": "H100"}, "rows": [{**key, "failed": "RuntimeError: no"}]}
    (tmp_path / "d").write_text(json.dumps(failed))
    assert bench.compare(tmp_path / "a", tmp_path / "d") == [
        "   gone  adaln s triton bfloat16 forward: RuntimeError: no",
        f"not compared: 1 measured in {tmp_path / 'a'} only",
    ]


def test_models_that_now_fill_the_machine_with_another_batch_are_compared_by_the_sample(tmp_path):
    key = {"model": "DiT", "mode": "train", "measure": "throughput", "implementation": "ours"}
    for name, batch, ms in (("a", 8, 8.0), ("b", 16, 8.0), ("c", 16, 16.0)):
        row = {**key, "batch": batch, "ms": ms, "ms_quartiles": [ms - 0.1, ms, ms + 0.1]}
        (tmp_path / name).write_text(json.dumps({"machine": {}, "rows": [row]}))
    (line,) = bench.compare(tmp_path / "a", tmp_path / "b")
    assert line == (
        " -50.0%  1.0000 -> 0.5000 ms a sample, batch 8 -> 16,  DiT train throughput ours"
    )
    (line,) = bench.compare(tmp_path / "a", tmp_path / "c")
    assert line == "none of 1 measured in both moved by more than the runs' spread"


def test_wrong_words_are_one_line_and_exit_code_2(tmp_path, capsys):
    assert bench.main(["adalm"]) == 2
    assert "no case 'adalm'; there are adaln," in capsys.readouterr().err
    wrong = {"absent": "is no file", "broken": "is not JSON: Expecting", "other": "has no rows"}
    (tmp_path / "broken").write_text("{")
    (tmp_path / "other").write_text('{"tiles": {}}')
    (tmp_path / "ops.json").write_text('{"tiles": {}}')
    for words in (["gelu"], ["models", "--name", "ops"]):
        assert bench.main([*words, "--resume", "--out", str(tmp_path)]) == 2
        assert "ops.json is not of a benchmark: it has" in capsys.readouterr().err
        assert bench.main([*words, "--out", str(tmp_path / "broken")]) == 2
        assert f"File exists: '{tmp_path / 'broken'}'" in capsys.readouterr().err
    for name, reason in wrong.items():
        assert bench.main(["--compare", str(tmp_path / name), str(tmp_path / name)]) == 2
        assert reason in capsys.readouterr().err
    assert bench.main(["attention-window", "--shape", "dit-xl-256"]) == 2
    assert "none of these cases has one of these shapes" in capsys.readouterr().err
    assert bench.main(["models", "DiT-XXL"]) == 2
    assert "no model 'DiT-XXL' on a CPU; there are tiny-image," in capsys.readouterr().err
    assert bench.main(["--quick", "models"]) == 2
    assert "`dit-kernels bench models`, then options" in capsys.readouterr().err


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
    found = timed([lambda: calls.append(1)] * 3, "cpu", seconds=0.0, least=4)
    assert len(found.samples) == 4
    assert found.columns["timed_by"] == "clock"
    assert found.columns["ms"] == 1e3 * found.median
    assert len(calls) == 3 * (2 + 4)


@pytest.mark.parametrize(("graph", "seconds"), [(True, 3e-6), (False, 23e-6)])
def test_a_sample_on_a_gpu_is_long_and_counts_one_call(monkeypatch, graph, seconds):
    """A call of 3 us that Python takes 20 us to launch: many to a sample, else events and launch count."""
    clock, launch, durations = [0.0], [20e-6], []

    def call() -> None:
        clock[0] += 3e-6 + launch[0]

    def captured(run):
        def replay() -> None:
            launch[0] = 0.0
            run()
            launch[0] = 20e-6

        return replay if graph else None

    def sample(run, device: str) -> float:
        start = clock[0]
        run()
        durations.append(clock[0] - start)
        return durations[-1]

    monkeypatch.setattr(timing, "captured", captured)
    monkeypatch.setattr(timing, "_sample", sample)
    found = timing.timed([call] * 5, "cuda")
    assert found.by == ("graph" if graph else "events")
    assert found.median == pytest.approx(seconds)
    assert min(durations[-len(found.samples) :]) >= timing.SAMPLE
    assert sum(durations) < 0.2


def test_outputs_are_kept_to_the_end_of_a_pass():
    """Else each call would write where the last one did, which is in the cache."""
    places = []

    def call() -> torch.Tensor:
        out = torch.empty(1 << 20)
        places.append(out.data_ptr())
        return out

    timed([call] * 3, "cpu", seconds=0.0, least=1)
    for i in range(0, len(places), 3):
        assert len(set(places[i : i + 3])) == 3


def test_make_gpu_runs_dry_without_a_gpu(tmp_path):
    """Every stage that needs a GPU is skipped by its name, with the reason; what needs none would run."""
    run = subprocess.run(
        ["make", "-s", "gpu", f"PYTHON={sys.executable}"],
        cwd=ROOT, env={"OUT": str(tmp_path), "PATH": os.environ["PATH"], "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = dict(
        line.split(maxsplit=1) for line in run.stdout.split("results in")[1].splitlines()[1:]
    )
    assert list(lines) == [stage.name for stage in gpu.STAGES]
    for name, line in lines.items():
        if name not in ("peers", "build"):
            assert line == "skipped: there is no GPU"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.log"]


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


BARE = """
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
ABSENT = {"safetensors", "typer", "rich", "diffusers", "av", "PIL", "sklearn", "matplotlib",
          "pytest_benchmark", "transformers", "numpy"}
def found(cls, name, *args):
    return None if name.partition(".")[0] in ABSENT else find(name, *args)
PathFinder.find_spec = classmethod(found)
import torch
from benchmarks import audit, audit_cuda, bench, bench_models, gpu, peers, report, tune, warm
from dit_kernels.models import DiT
DiT(hidden_size=64, depth=1, num_heads=2, input_size=(1, 8, 8))
assert bench_models._no_diffusers() == "diffusers is not installed"
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "--collect-only", "tests/gpu"]))
"""


def test_what_a_bare_gpu_machine_runs_needs_torch_triton_and_pytest_only():
    run = subprocess.run(
        python(BARE), cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert "test_training_step.py::test_replays" in run.stdout


def test_stages_are_picked_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu.main(["test", "bench-adaln"]) == 0
    printed = capsys.readouterr().out
    assert "test             skipped: there is no GPU" in printed
    assert "bench-rest" not in printed
    with pytest.raises(SystemExit) as stopped:
        gpu.main(["tuna"])
    assert stopped.value.code == 2
    assert (
        "no stage 'tuna'; there are peers build clock test memcheck racecheck"
        in capsys.readouterr().err
    )


def test_a_stage_has_a_time_limit_and_does_not_stop_the_next(tmp_path, monkeypatch, capsys):
    """Also what a stage started ends with it, and time that is left over goes to the later stages."""
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    stages = (
        gpu.Stage("slow", python(child), 1),
        gpu.Stage("absent", python(""), 1000, lambda: "not here"),
        gpu.Stage("broken", python("raise SystemExit(3)"), 5),
        gpu.Stage("fine", python("print('all is well', {seconds})"), 5),
    )
    monkeypatch.setattr(gpu, "STAGES", stages)
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu.main(["--seconds", "33"]) == 1
    printed = capsys.readouterr().out
    assert "slow             FAILED (over its 3 s) in 3 s" in printed
    assert "absent           skipped: not here" in printed
    assert "broken           FAILED (3)" in printed
    assert "fine             ok in" in printed
    log = (tmp_path / "gpu.log").read_text()
    seconds = log.split("all is well ")[-1].split()[0]
    assert int(seconds) > 15  # of 33 s
    last = log.rstrip().splitlines()[-1]
    assert last.startswith("fine             ok in")
    assert last.endswith(f"s: all is well {seconds}")
    asleep = subprocess.run(["pgrep", "-f", "time.sleep(600)"], capture_output=True, text=True)
    assert not asleep.stdout


def test_one_that_is_over_its_time_says_what_failed_before(tmp_path):
    """pytest prints failures at its end: a kill alone would lose them."""
    tests = tmp_path / "test_it.py"
    tests.write_text("import time\ndef test_a(): assert 1 == 7\ndef test_b(): time.sleep(600)\n")
    log = tmp_path / "log"
    log.touch()
    command = (*gpu.PYTEST, "-c", os.devnull, "--rootdir", str(tmp_path), str(tests))
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    assert gpu._ended(command, environment, log, 30.0, grace=20.0) == "over its 30 s"
    assert "assert 1 == 7" in log.read_text()
    assert "1 failed" in log.read_text()


STAGE = """
import json, pathlib, sys, time
result = pathlib.Path(sys.argv[1]) / "one.json"
result.with_suffix(".part").touch()
if "--resume" in sys.argv:
    result.write_text(json.dumps(dict(rows=[1, 2])))
    print("all there")
else:
    result.write_text(json.dumps(dict(rows=[1], begun=dict(case="adaln"))))
    sys.exit(1)
"""


def test_a_stage_without_time_is_skipped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "STAGES", (gpu.Stage("one", python("print(1)"), 1),))
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu.main(["--seconds", "0"]) == 0
    assert "one              skipped: no time is left" in capsys.readouterr().out


def test_a_benchmark_that_was_cut_off_is_begun_again(tmp_path, monkeypatch, capsys):
    command = (*python(STAGE), "{out}")
    monkeypatch.setattr(gpu, "STAGES", (gpu.Stage("one", command, 1, result="one.json"),))
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu.main(["--seconds", "60"]) == 0
    assert "ok in" in (printed := capsys.readouterr().out)
    assert printed.rstrip().endswith("s: all there")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.log", "one.json"]


def test_an_interrupted_make_gpu_leaves_nothing_running(tmp_path):
    code = (
        "import sys; from benchmarks import gpu\n"
        "inner = 'import os, time; print(\"pid\", os.getpid()); time.sleep(600)'\n"
        "gpu.STAGES = (gpu.Stage('slow', (sys.executable, '-c', inner), 1),)\n"
        "gpu.main([])"
    )
    process = subprocess.Popen(
        python(code), cwd=ROOT, env={**os.environ, "OUT": str(tmp_path)},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=gpu.listens,
    )  # fmt: skip
    log = tmp_path / "gpu.log"
    deadline = time.monotonic() + 60
    while not (log.is_file() and "\npid " in log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    pid = int(log.read_text().split("\npid ")[1].split()[0])
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) != 0
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_stages_write_eight_files_at_most():
    """The log, the tuned tiles, and one JSON a benchmark."""
    writers = [stage for stage in gpu.STAGES if any("{out}" in word for word in stage.command)]
    assert 2 + len(writers) <= 8


def test_a_benchmark_s_file_is_the_one_that_is_looked_into():
    for stage in gpu.STAGES:
        if "benchmarks.bench" in stage.command:
            parser = [
                word
                for word in stage.command
                if word in ("adaln", "attention", "rest", "sweeps", "models")
            ]
            assert stage.result.removesuffix(".json") in parser


def test_tiles_that_were_committed_are_used(tmp_path, monkeypatch):
    """A later run on the machine picks its stages: without them it would time other tiles."""
    committed = tmp_path / "results"
    committed.mkdir()
    (committed / "tuned.json").write_text("{}")
    monkeypatch.setattr(machine, "results", lambda device: committed)
    monkeypatch.setattr(gpu, "STAGES", (gpu.Stage("one", python("print(1)"), 1),))
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    gpu.main([])
    assert (tmp_path / "out" / "tuned.json").read_text() == "{}"


def test_stages_share_the_tuned_tiles_and_the_path(tmp_path, monkeypatch, capsys):
    code = "import os; print('tiles at', os.environ['DIT_KERNELS_TUNED']); import benchmarks"
    monkeypatch.setattr(gpu, "STAGES", (gpu.Stage("one", python(code), 1),))
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.delenv("DIT_KERNELS_TUNED", raising=False)
    assert gpu.main([]) == 0
    assert f"tiles at {tmp_path / 'tuned.json'}" in capsys.readouterr().out


def test_what_is_compiled_ahead_is_ours_and_torch_compiles():
    """No max-autotune: it measures, and the GPU is shared meanwhile."""
    points = bench.points(["gelu", "attention-window"], ["wan-1.3b-480p"], [], "cuda")
    found = [(point.case.name, baseline.name) for point, baseline in warm.pairs(points, "cuda")]
    assert sorted(found) == [
        ("attention-window", "compile"), ("attention-window", "flex"), ("attention-window", "triton"),
        ("gelu", "compile"), ("gelu", "cuda"), ("gelu", "triton"),
    ]  # fmt: skip


def test_what_fails_to_compile_does_not_stop_the_others(capsys):
    def made(name: str, call) -> Baseline:
        return Baseline(name, lambda case: True, lambda *_: None, lambda *_: call)

    seen = []

    def right(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.requires_grad)
        return x.tanh()

    def wrong(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such tile\nmore")

    (point,) = bench.points(["gelu"], ["tiny-image"], [], "cpu")
    warm.job([(point, made("wrong", wrong)), (point, made("right", right))], "cpu")
    printed = capsys.readouterr().out
    assert "gelu tiny-image wrong: RuntimeError: no such tile\n" in printed
    assert "gelu tiny-image right: compiled\n" in printed
    assert {True, False} == set(seen)  # with a gradient and without one: two graphs


def test_compilers_that_are_out_of_time_are_ended():
    jobs = [subprocess.Popen(python(f"import time; time.sleep({n})")) for n in (0, 600)]
    assert warm.ended(jobs, time.monotonic() + 5) == "2 processes, 0 failed, 1 ended by the time"
    assert all(process.poll() is not None for process in jobs)


def test_choices_made_on_a_busy_gpu_are_forgotten(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    (tmp_path / "ab").mkdir()
    (tmp_path / "ab" / "kernel.best_config").touch()
    (tmp_path / "ab" / "kernel.py").touch()
    assert warm.forget_choices() == 1
    assert [path.name for path in tmp_path.rglob("kernel.*")] == ["kernel.py"]


def test_the_audit_is_of_a_target_it_has():
    from benchmarks import offline

    assert gpu.target() in offline.TARGETS
    from benchmarks import audit_cuda

    assert gpu.arch() in audit_cuda.ARCHS
    (audit,) = (stage for stage in gpu.STAGES if stage.name == "audit")
    assert "benchmarks.audit --target {target}" in audit.command[-1]
    assert "benchmarks.audit_cuda --archs {arch}" in audit.command[-1]


def test_every_op_has_a_stage():
    words = [
        word for stage in gpu.STAGES if stage.name.startswith("bench-") for word in stage.command
    ]
    assert {op for op in backends.TABLE if op in words} == set(backends.TABLE)


def test_what_is_timed_is_tested_alone():
    commands = {stage.name: stage.command for stage in gpu.STAGES}
    assert commands["clock"] == (*gpu.PYTEST, gpu.CLOCK)
    assert f"--ignore={gpu.CLOCK}" in commands["test"]
    assert (ROOT / gpu.CLOCK).is_file()


def test_a_sanitizer_that_finds_something_fails_its_stage():
    for stage in gpu.STAGES:
        if stage.name in ("memcheck", "racecheck"):
            assert stage.command[1:5] == ("--tool", stage.name, "--error-exitcode", "86")
            assert (ROOT / stage.command[-1]).is_file()
            # torch's own questions to CUDA may fail, and are no findings; racecheck has no such option
            assert ("--report-api-errors" in stage.command) == (stage.name == "memcheck")


def test_cudas_tools_are_found_beside_nvcc(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "no_gpu", lambda: None)
    monkeypatch.setattr(gpu, "search_path", lambda: str(tmp_path))
    assert gpu.no_sanitizer() == "there is no compute-sanitizer, on PATH or beside nvcc"
    assert gpu.no_build() == "there is no nvcc"
    monkeypatch.undo()
    monkeypatch.setattr(gpu, "no_gpu", lambda: None)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    (tmp_path / "bin").mkdir()
    for tool in ("nvcc", "compute-sanitizer"):
        (tmp_path / "bin" / tool).write_text("#!/bin/sh\necho found by the stage\n")
        (tmp_path / "bin" / tool).chmod(0o755)
    assert gpu.no_build() is gpu.no_sanitizer() is None
    stage = gpu.Stage("one", ("compute-sanitizer",), 1)
    monkeypatch.setattr(gpu, "STAGES", (stage,))
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu.main([]) == 0
    assert "found by the stage" in capsys.readouterr().out


def test_the_log_of_all_stages_is_kept_when_some_are_run_again(tmp_path, monkeypatch):
    stages = tuple(gpu.Stage(name, python(f"print('of {name}')"), 1) for name in ("one", "two"))
    monkeypatch.setattr(gpu, "STAGES", stages)
    monkeypatch.setenv("OUT", str(tmp_path))
    gpu.main([])
    gpu.main(["two"])
    log = (tmp_path / "gpu.log").read_text()
    assert (log.count("\nof one\n"), log.count("\nof two\n")) == (1, 2)
    gpu.main([])
    log = (tmp_path / "gpu.log").read_text()
    assert (log.count("\nof one\n"), log.count("\nof two\n")) == (1, 1)


@pytest.mark.parametrize(
    ("name", "folder"),
    [("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-40GB", "a100")],
)
def test_results_folder_is_named_after_the_card(monkeypatch, name, folder):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: name)
    assert machine.folder("cuda") == folder


def test_results_name_their_commit(monkeypatch):
    monkeypatch.delenv("COMMIT", raising=False)
    run = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if run.returncode == 0:
        assert machine.describe("cpu")["commit"].split("-")[0] == run.stdout[:12]
    else:
        assert machine.describe("cpu")["commit"] == "unknown"
    monkeypatch.setenv("COMMIT", "0123abc")
    assert machine.describe("cpu")["commit"] == "0123abc"


def test_the_committed_pages_are_what_the_committed_results_give():
    committed = runs.read_runs()
    assert report.PAGE.read_text() == report.page(committed)
    found = fastest.fastest(runs.on_gpus(committed))
    assert measured.FILE.read_text() == measured.text(found)
    for path, tiles in report.tuned().items():
        assert path.read_text() == tiles
    readme = report.README.read_text()
    assert report.with_readme_lines(readme, report.readme_lines(committed)) == readme
    for device, found in committed.items():
        for _, name in plots.pictures(device, found):
            for suffix in (".png", ".svg"):
                assert (report.IMAGES / f"{name}{suffix}").is_file()


MACHINE = {"device": "NVIDIA H200", "commit": "abc"}
CEILINGS = {"copy_gbps": 4000.0, "matmul_tflops": 800.0, "launch_us": 4.0, "graph_launch_us": 1.5}


def op_run() -> runs.Run:
    """adaln at one shape and in a sweep: triton loses forward, wins backward, and some are not there."""
    key = {"op": "adaln", "case": "adaln", "shape": "s", "dtype": "bfloat16"}
    rows = []
    for tags in (
        {},
        {"shape": "tokens 256", "sweep": "tokens", "x": 256},
        {"shape": "tokens 512", "sweep": "tokens", "x": 512},
    ):
        for name, forward, backward in (
            ("triton", 1.0, 2.0),
            ("compile", 0.5, 3.0),
            ("eager", 4.0, 5.0),
        ):
            for direction, ms in (("forward", forward), ("backward", backward)):
                rows.append({
                    **key, **tags, "implementation": name, "direction": direction, "ms": ms,
                    "accurate": True, "timed_by": "events" if name == "eager" else "graph", "flops": 0,
                    "bytes": 10**9, "gbps": 1e3 / ms, "tflops": 0.0, "peak_bytes": 3 << 20,
                    "saved_bytes": None if direction == "forward" else 2 << 20,
                })  # fmt: skip
    sage = {**rows[0], "implementation": "sage", "accurate": False, "ms": 0.1}
    rows += [sage, {**key, "implementation": "cuda", "absent": "not built"}]
    rows += [{**key, "implementation": "flex", "failed": "RuntimeError: no"}]
    return {"machine": MACHINE, "ceilings": CEILINGS, "rows": rows, "unfinished": 3}


def model_run() -> runs.Run:
    key = {"model": "DiT-XL/2", "mode": "train", "measure": "throughput", "accurate": True}
    rows = [
        {**key, "implementation": name, "batch": 64, "ms": ms, "per_second": 64e3 / ms, "tflops": 80.0,
         "peak_bytes": 3 << 30, "timed_by": "events"}
        for name, ms in (("eager", 200.0), ("ours-compile-graph", 100.0))
    ]  # fmt: skip
    unet = {
        **key,
        "model": "U-Net",
        "implementation": "eager",
        "absent": "diffusers is not installed",
    }
    return {"machine": MACHINE, "ceilings": CEILINGS, "rows": [*rows, unet]}


def of_both(
    case: str, shape: str, channels: int, times: dict[str, tuple[float, float]]
) -> list[bench.Row]:
    """Rows of our backends: forward, and forward and backward, in milliseconds."""
    call = {"op": "adaln", "form": "-x", "itemsize": 2, "channels": channels, "size": 27}
    return [
        {"op": "adaln", "case": case, "shape": shape, "dtype": "bfloat16", "implementation": name,
         "direction": direction, "ms": ms, "class": call, "accurate": True}
        for name, both in times.items() for direction, ms in zip(("forward", "both"), both, strict=True)
    ]  # fmt: skip


def test_tiles_among_the_committed_results_ship(tmp_path, monkeypatch):
    (tmp_path / "h200").mkdir()
    tiles = json.dumps({"version": {"gpu": "NVIDIA H200"}, "tiles": {}})
    (tmp_path / "h200" / "tuned.json").write_text(tiles)
    monkeypatch.setattr(report, "FOLDER", tmp_path)
    ((path, text),) = report.tuned().items()
    assert path.relative_to(report.ROOT).as_posix() == "dit_kernels/tuned/NVIDIA-H200.json"
    assert text == tiles


def at_a_shape(shape: str) -> runs.Run:
    """The run of adaln at a named shape: 10^9 bytes, of 4000 GB/s."""
    run = op_run()
    return {**run, "rows": [{**row, "shape": shape} for row in run["rows"] if "sweep" not in row]}


def test_the_report_says_which_targets_are_missed():
    text = report.section(at_a_shape("dit-xl-256"))
    assert "| dit-xl-256 | forward | 1000 GB/s | 25.0% | 95% | 0.50x |" in text
    assert "0 of 2 targets reached." in text
    assert (
        "- triton in adaln dit-xl-256 forward: 25.0% of the ceiling, not 95%; 0.50x against the best other, not 1.00x"
        in text
    )
    assert (
        "- triton in adaln dit-xl-256 backward: 12.5% of the ceiling, not 90%; 1.50x against compile, not 1.80x"
        in text
    )
    assert "targets reached" not in report.section(op_run())  # at no named shape


def test_a_target_is_of_work_that_is_large_enough():
    row = {"case": "adaln", "shape": "dit-xl-256", "direction": "forward"}
    sizes = (63e6, 64e6, 256e6)
    found = [targets.target({**row, "bytes": size}) for size in sizes]
    assert [aim and aim.ceiling for aim in found] == [None, 90, 95]
    attention = {**row, "case": "attention", "bytes": 0}
    by_shape = {"dit-xl-256": 75, "dit-xl-1024": 51, "wan-1.3b-480p": 87, "flux-1024": None}
    for shape, percent in by_shape.items():
        aim = targets.target({**attention, "shape": shape})
        assert (aim and round(aim.ceiling)) == percent
    assert all(set(aim.cases) <= {case.name for case in CASES} for aim in targets.TARGETS)


def test_a_reached_target_is_not_listed():
    cells = {
        "triton": {"case": "gated_adaln", "shape": "dit-xl-256", "direction": "backward", "ms": 0.27,
                   "bytes": 10**9, "flops": 0, "gbps": 3700.0, "tflops": 0.0, "accurate": True},
    }  # fmt: skip
    cells["compile"] = {**cells["triton"], "ms": 0.5}
    assert targets.missed(cells, cells["triton"], CEILINGS) == []
    cells["compile"]["ms"] = 0.48
    assert targets.missed(cells, cells["triton"], CEILINGS) == ["1.78x against compile, not 1.80x"]


def test_auto_learns_the_fastest_of_each_class_from_the_results():
    """Two shapes of one class: by the geometric mean; one backend alone is no comparison."""
    rows = [
        *of_both("adaln", "a", 1152, {"triton": (1.0, 4.0), "cuda": (1.5, 2.0)}),
        *of_both("adaln", "b", 1152, {"triton": (1.0, 3.0), "cuda": (0.9, 1.0)}),
        *of_both("adaln", "c", 3072, {"triton": (2.0, 1.0), "cuda": (1.0, 2.0)}),
        *of_both("adaln", "d", 5120, {"triton": (2.0, 1.0)}),
    ]
    found = fastest.fastest({"h200": [{"machine": MACHINE, "rows": rows}]})
    assert {row.call.channels: row[1:] for row in found["NVIDIA H200"]} == {
        1152: ("triton", "cuda"), 3072: ("cuda", "triton"),
    }  # fmt: skip
    assert fastest.table([{"machine": MACHINE, "rows": rows}]) == [
        ["adaln", "a", "triton (1.50x)", "cuda (2.00x)"],
        ["adaln", "b", "triton (0.90x)", "cuda (3.00x)"],
        ["adaln", "c", "cuda (2.00x)", "triton (2.00x)"],
    ]
    assert fastest.fastest({"h200": [op_run()]}) == {}


def test_a_row_of_ours_has_the_class_that_auto_looks_up(monkeypatch):
    """The same by the benchmark, from the case on meta tensors, and by a call of the case."""
    seen = []
    order = measured.order

    def watched(op, candidates, args, **options):
        seen.append(measured.call_class(op, args))
        return order(op, candidates, args, **options)

    monkeypatch.setattr(measured, "order", watched)
    for case in cases_for(SHAPES["tiny-video"]):
        if len(backends.TABLE[case.op]) == 1:
            continue
        arguments = case.arguments(SHAPES["tiny-video"], torch.bfloat16, "cpu", 0)
        getattr(ops, case.function)(**arguments)
        assert seen.pop() == case.call_class(SHAPES["tiny-video"], torch.bfloat16)


def test_the_report_shows_losses_and_what_was_not_measured():
    text = report.page({"h200": [op_run(), model_run()]})
    # 10^9 bytes in 1 ms: 1000 GB/s of 4000; the inaccurate one does not count as the best other
    assert (
        "| s | forward | 1000 GB/s | 25.0% | - | 0.50x | 3 | 1.0000 | 4.0000† (4.00x) | 0.5000 (0.50x) |"
        " 0.1000* (0.10x) |" in text
    )
    assert "| s | backward | 500 GB/s | 12.5% | - | 1.50x | 3 | 2.0000 |" in text
    assert "Saved for the backward, MiB. s: triton 2, eager 2, compile 2; tokens 256:" in text
    assert "- cuda: not built (adaln s)" in text
    assert "### sweeps over tokens" in text
    assert "- flex in adaln s: RuntimeError: no" in text
    assert "Out of time with 3 measurements not begun." in text
    four = [{**op_run()["rows"][-2], "shape": f"s{i}"} for i in range(4)]
    assert "- cuda: not built (all 4 times it was asked for)" in report.section(
        {**op_run(), "rows": [*op_run()["rows"][:1], *four]}
    )
    cut_off = {"begun": {"case": "adaln", "shape": "s", "implementation": "cuda"}}
    assert "Cut off in cuda in adaln s." in report.section({**op_run(), **cut_off})
    assert (
        "| DiT-XL/2 | train, throughput | ours-compile-graph | 64 | 100.00† | 640.00 | 2.00x | 10.0% | 3.0 |"
        in text
    )
    assert "- eager: diffusers is not installed (U-Net train)" in text
    assert (
        "| `adaln` | `ops.adaln` | liger-kernel, quack-kernels, apex, nvidia-cudnn-frontend | measured |"
        in text
    )
    assert "| `swiglu` | `ops.swiglu` | liger-kernel | not measured |" in text
    assert "Not measured on a GPU yet" not in text
    on_cpu = {**op_run(), "machine": {**MACHINE, "device": "CPU (x86_64)"}}
    nothing = report.page({"cpu": [{**on_cpu, "host_us": {"adaln": 27.84}}]})
    assert "Not measured on a GPU yet" in nothing
    assert "| adaln | 27.8 |" in nothing
    assert "| measured |" not in nothing
    assert "A CPU run shows that the suite works, and nothing about the kernels." in nothing


def test_a_folder_of_runs_has_its_own_report(tmp_path, capsys):
    """A CPU's too, marked as one."""
    run = op_run()
    run["machine"] = {**MACHINE, "device": "CPU (x86_64)"}
    run["rows"] = [row for row in run["rows"] if "sweep" not in row]
    (tmp_path / "ops.json").write_text(json.dumps(run))
    assert report.main([str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("## CPU (x86_64)\n\nA CPU run shows that")
    assert "| s | forward | 1000 GB/s |" in text
    for line in text.splitlines():
        if line.startswith("!["):
            assert (tmp_path / line.partition("](")[2].rstrip(")")).is_file()
    assert "images/roofline-cpu.png" in text
    assert report.main([str(tmp_path / "images")]) == 2
    assert "no run in" in capsys.readouterr().err
    (tmp_path / "broken.json").write_text("{")
    assert report.main([str(tmp_path)]) == 2
    assert "broken.json is not JSON: Expecting" in capsys.readouterr().err


def test_only_runs_are_read(tmp_path):
    (tmp_path / "h200").mkdir()
    (tmp_path / "h200" / "adaln.json").write_text(json.dumps(op_run()))
    (tmp_path / "h200" / "tuned.json").write_text(json.dumps({"version": {}, "rows": []}))
    assert runs.read_runs(tmp_path) == {"h200": [op_run()]}


def test_plots_are_drawn_from_the_results_and_are_the_same_again(tmp_path):
    drawn_from = [op_run(), model_run()]
    names = [name for _, name in plots.pictures("h200", drawn_from)]
    assert names == [
        "speedup-h200", "roofline-h200", "speedup-h200-adaln", "scaling-h200-tokens", "models-h200"
    ]  # fmt: skip
    first, second = tmp_path / "first", tmp_path / "second"
    assert plots.draw("h200", drawn_from, first) == names
    plots.draw("h200", drawn_from, second)
    for name in names:
        for suffix in (".png", ".svg"):
            drawn = (first / f"{name}{suffix}").read_bytes()
            assert len(drawn) > 1000
            assert drawn == (second / f"{name}{suffix}").read_bytes()


def test_every_model_in_the_plot_has_its_name():
    """Also one with a single bar, at the end."""
    run = model_run()
    eager = next(row for row in run["rows"] if row["implementation"] == "eager")
    figure = matplotlib.figure.Figure()
    plots._draw_models(figure, [*run["rows"][:2], {**eager, "model": "U-Net"}])
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "DiT-XL/2 train throughput", "U-Net train throughput"
    ]  # fmt: skip
    bottom, top = axes.get_ylim()
    assert all(top < tick < bottom for tick in axes.get_yticks())
    for bar in axes.patches:
        assert top < bar.get_y() < bar.get_y() + bar.get_height() < bottom


def test_a_bar_stands_beside_its_name_in_the_panel_of_its_direction():
    key = {"op": "adaln", "shape": "s"}
    bars = [
        {**key, "case": "adaln", "direction": "forward", "ratios": {"eager": 4.0, "compile": 0.5}},
        {**key, "case": "gated", "direction": "forward", "ratios": {"eager": 2.0}},
        {**key, "case": "gated", "direction": "backward", "ratios": {"eager": 3.0}},
    ]
    figure = matplotlib.figure.Figure()
    plots._draw_bars(figure, bars)
    forward, backward = figure.axes
    assert (forward.get_title(), backward.get_title()) == ("forward", "backward")
    assert [label.get_text() for label in forward.get_yticklabels()] == ["adaln s", "gated s"]
    drawn = [
        {(round(bar.get_y() + 0.125), bar.get_x() + bar.get_width()) for bar in axes.patches if bar.get_width()}
        for axes in (forward, backward)
    ]  # fmt: skip
    assert drawn == [{(0, 4.0), (0, 0.5), (1, 2.0)}, {(1, 3.0)}]


def test_a_point_of_the_roofline_is_as_far_below_the_roof_as_its_kernel():
    def row(op: str, flops: int, direction: str = "forward") -> bench.Row:
        return {"op": op, "flops": flops, "bytes": 10**9, "ms": 2.0, "direction": direction}

    rows = [row("adaln", 0), row("gelu", 0), row("attention3d", 10**12, "backward")]
    points = plots.roofline_points([*rows, row("adaln", 0, "both")])
    assert sum(map(len, points.values())) == 3
    assert points["attention3d", "backward"] == [(1000.0, 500.0)]
    ((ours, rate), (others, other)) = points["adaln", "forward"] + points["gelu", "forward"]
    assert ours != others
    # both reach 500 GB/s
    assert rate / ours == pytest.approx(other / others) == pytest.approx(0.5)


def test_the_readme_shows_a_plot_once_there_is_one():
    readme = f"before\n{report.MARKS[0]}\nold\n{report.MARKS[1]}\nafter\n"
    text = report.with_readme_lines(readme, report.readme_lines({"h200": [op_run()]}))
    assert "(docs/images/speedup-h200.png)" in text
    assert "old" not in text
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    text = report.with_readme_lines(text, report.readme_lines({"cpu": [op_run()]}))
    assert "No speed has been measured on a GPU yet" in text
    assert "speedup" not in text


def test_the_cases_run_under_pytest_benchmark():
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks", "-k",
         "gelu-tiny-video-eager and forward", "--benchmark-max-time=0.01", "--benchmark-min-rounds=2"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert "benchmark 'gelu forward': 1 tests" in run.stdout
