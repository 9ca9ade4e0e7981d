"""The benchmark suite, dry: what it counts, how it fails, and that a run on this machine works."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import (
    accuracy,
    bench,
    host_cost,
    machine,
    record,
    timing,
)
from benchmarks.baselines import Baseline, baselines
from benchmarks.cases import CASES, cases_for
from benchmarks.shapes import SHAPES, SWEEPS, Shape
from benchmarks.timing import timed
from dit_kernels import backends, ops, testing

ROOT = Path(__file__).parent.parent
CEILINGS = {"copy_gbps": 4000.0, "matmul_tflops": 800.0, "launch_us": 4.0, "graph_launch_us": 1.5}


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


def rows_of(cases: list[str], shape: str, dtype: torch.dtype, **options) -> list[record.Row]:
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
    monkeypatch.chdir(tmp_path)  # where a CPU's results go, wherever the repository is
    code = bench.main(["gelu", "swiglu", "--seconds", "0"])
    result = json.loads((tmp_path / "runs" / "bench" / "ops.json").read_text())
    assert code == 0
    assert (result["rows"], result["unfinished"]) == ([], 4)
    printed = capsys.readouterr().out
    assert printed.startswith("results go to runs/bench/ops.json\n")
    assert "out of time: 4 not begun" in printed


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
    path, save = tmp_path / "ops.json", record.save

    class Crash(BaseException):
        pass

    def crashing(path, result):
        save(path, result)
        if result.get("begun", {}).get("case") == "swiglu":
            raise Crash

    monkeypatch.setattr(record, "save", crashing)
    with pytest.raises(Crash):
        bench.main(arguments)
    cut_off = json.loads(path.read_text())
    assert cut_off["begun"]["case"] == "swiglu"
    assert len(cut_off["rows"]) == 3
    monkeypatch.setattr(record, "save", save)
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
        "import threading; from benchmarks.guarded import ended_after\n"
        "with ended_after(0.5, 'cuda'): threading.Event().wait()"
    )
    run = subprocess.run(
        (sys.executable, "-c", code),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
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
    models, ops = record.compare(tmp_path / "a", tmp_path / "b")
    assert models == " +50.0%  1.0000 -> 1.5000 ms  DiT train throughput ours"
    assert ops == " +50.0%  1.0000 -> 1.5000 ms  adaln s triton bfloat16 forward"
    assert record.compare(tmp_path / "a", tmp_path / "c") == [
        "device: H100 -> H200", "none of 2 measured in both moved by more than the runs' spread"
    ]  # fmt: skip
    failed = {"machine": {"device": "H100"}, "rows": [{**key, "failed": "RuntimeError: no"}]}
    (tmp_path / "d").write_text(json.dumps(failed))
    assert record.compare(tmp_path / "a", tmp_path / "d") == [
        "   gone  adaln s triton bfloat16 forward: RuntimeError: no",
        f"not compared: 1 measured in {tmp_path / 'a'} only",
    ]


def test_models_that_now_fill_the_machine_with_another_batch_are_compared_by_the_sample(tmp_path):
    key = {"model": "DiT", "mode": "train", "measure": "throughput", "implementation": "ours"}
    for name, batch, ms in (("a", 8, 8.0), ("b", 16, 8.0), ("c", 16, 16.0)):
        row = {**key, "batch": batch, "ms": ms, "ms_quartiles": [ms - 0.1, ms, ms + 0.1]}
        (tmp_path / name).write_text(json.dumps({"machine": {}, "rows": [row]}))
    (line,) = record.compare(tmp_path / "a", tmp_path / "b")
    assert line == (
        " -50.0%  1.0000 -> 0.5000 ms a sample, batch 8 -> 16,  DiT train throughput ours"
    )
    (line,) = record.compare(tmp_path / "a", tmp_path / "c")
    assert line == "none of 1 measured in both moved by more than the runs' spread"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--bogus", "dit-kernels bench: unrecognized arguments: --bogus"),
        (
            "--shape tiny",
            "dit-kernels bench: argument --shape: invalid choice: 'tiny' (choose from",
        ),
        (
            "--seconds -1",
            "dit-kernels bench: argument --seconds: must be a number of at least 0; got '-1'",
        ),
        ("--seconds nan", "must be a number of at least 0; got 'nan'"),
        ("models --mode fly", "dit-kernels bench models: argument --mode: invalid choice: 'fly'"),
    ],
)
def test_wrong_options_are_one_line_and_exit_code_2(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_:
        bench.main(arguments.split())
    assert exit_.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("dit-kernels bench")
    assert said.err.count("\n") == 1
    assert message in said.err


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


def test_the_cases_run_under_pytest_benchmark():
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks", "-k",
         "gelu-tiny-video-eager and forward", "--benchmark-max-time=0.01", "--benchmark-min-rounds=2"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert "benchmark 'gelu forward': 1 tests" in run.stdout
