"""`make gpu`, dry: what its stages need, how they share the time, and that a cut-off one loses little."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import (
    bench,
    gpu,
    machine,
    warm,
)
from benchmarks.baselines import Baseline
from dit_kernels import backends

ROOT = Path(__file__).parent.parent


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
import os, sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
ABSENT = {"safetensors", "typer", "rich", "diffusers", "av", "PIL", "sklearn", "matplotlib",
          "pytest_benchmark", "transformers"}
def found(cls, name, *args):
    return None if name.partition(".")[0] in ABSENT else find(name, *args)
PathFinder.find_spec = classmethod(found)
import torch
from benchmarks import audit, audit_cuda, bench, bench_models, gpu, models, peers, report, tune, warm
from dit_kernels.models import DiT
DiT(hidden_size=64, depth=1, num_heads=2, input_size=(1, 8, 8))
assert models.no_diffusers() == "diffusers is not installed"
import pytest
torch.cuda.is_available = lambda: True
del os.environ["DIT_KERNELS_EMULATE"]  # the audit's
collect = ["-q", "-p", "no:cacheprovider", "--collect-only", "tests/gpu", "tests/kernels"]
sys.exit(pytest.main(collect))
"""


def test_what_a_bare_gpu_machine_runs_needs_torch_triton_numpy_and_pytest_only():
    run = subprocess.run(
        python(BARE), cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    assert "test_training_step.py::test_replays" in run.stdout
    assert "test_adaln_kernels.py::test_odd_sizes[triton-" in run.stdout
    assert "test_adaln_kernels.py::test_odd_sizes[cuda-" in run.stdout


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
        "no stage 'tuna'; there are peers build clock test matrix memcheck racecheck"
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
