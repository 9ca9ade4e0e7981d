"""Whole models in the benchmarks: what is counted, compared and searched."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import bench_models as suite
from benchmarks import machine
from dit_kernels import backends
from dit_kernels.models import DiT_models

EAGER, OURS = suite.IMPLEMENTATIONS[:2]
MODELS = {model.name: model for model in suite.MODELS["cpu"]}
TINY = MODELS["tiny-image"]


def test_flops_of_the_dit_are_the_papers():
    """118.64 Gflops, Peebles & Xie table 4, which counts a multiply-add as one."""
    found = suite.flops(suite.MODELS["cuda"][0], "forward")
    assert found == pytest.approx(2 * 118.64e9, rel=1e-3)


def test_a_training_step_takes_three_forwards_and_a_guided_step_two():
    forward = suite.flops(TINY, "forward")
    # the first Linear of a model needs no gradient of its input
    assert 2.9 * forward < suite.flops(TINY, "train") <= 3.1 * forward
    assert suite.flops(TINY, "generate") == 2 * TINY.steps * forward


def test_a_unet_of_equal_flops_stands_beside_the_dit():
    dit, _, beside = suite.MODELS["cuda"]
    assert suite.flops(beside, "forward") == pytest.approx(suite.flops(dit, "forward"), rel=0.05)
    small = MODELS["U-Net"]
    inputs = small.inputs(2, "cpu", torch.float32)
    assert small.make()(**inputs).shape == inputs["x"].shape


@pytest.mark.parametrize("name", ["tiny-image", "tiny-video"])
@pytest.mark.parametrize("mode", suite.MODES)
def test_what_is_timed_computes_the_same_with_either_set_of_kernels(name, mode):
    model = MODELS[name]
    dtype = torch.float32 if mode == "train" else torch.bfloat16
    results = []
    for implementation in (EAGER, OURS):
        net = suite.prepared(model, mode, implementation, "cpu")
        torch.manual_seed(0)
        inputs = model.inputs(2, "cpu", dtype)
        torch.manual_seed(0)
        results.append(suite.call(model, mode, net, inputs, implementation)())
    eager, ours = results
    assert ours.isfinite().all()
    assert ours.shape == (() if mode == "train" else eager.shape)
    if mode == "generate":
        assert ours.shape == inputs["x"].shape
        assert not torch.equal(ours, inputs["x"])


@pytest.mark.parametrize("mode", ["forward", "train"])
def test_accuracy_is_of_the_output_and_in_training_of_a_gradient(mode):
    found = suite.accuracy(TINY, mode, OURS, "cpu")
    assert [a.tensor for a in found] == (["output", "dx"] if mode == "train" else ["output"])
    assert all(a.ok and a.allowed > 0 for a in found)


def test_a_wrong_model_is_not_timed(monkeypatch):
    from dit_kernels.ops.feed_forward import reference

    right = reference.forward

    def wrong(x, *args):
        (y,) = right(x, *args)
        return [y if x.dtype == torch.float64 else y + 1]

    monkeypatch.setattr(reference, "forward", wrong)
    begun, row = suite.run([suite.Task(TINY, "forward", "latency", OURS)], "cpu")
    assert begun["begun"]["implementation"] == "ours"
    assert "output is off by" in row["failed"]


def test_eager_is_plain_torch_with_torchs_attention(monkeypatch):
    """Else the baseline would be too easy: people don't write N x N scores."""
    seen = []
    right = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        suite.F, "scaled_dot_product_attention", lambda *a, **k: seen.append(1) or right(*a, **k)
    )
    reference = backends.load("attention3d", "reference")
    own = reference.eager
    model = MODELS["tiny-video"]
    net = suite.prepared(model, "forward", EAGER, "cpu")
    suite.call(model, "forward", net, model.inputs(1, "cpu", torch.bfloat16), EAGER)()
    assert len(seen) == 4  # two blocks, each to itself and to the prompt
    assert reference.eager is own
    ours = suite.prepared(model, "forward", OURS, "cpu")
    suite.call(model, "forward", ours, model.inputs(1, "cpu", torch.bfloat16), OURS)()
    assert len(seen) == 4


def test_nothing_in_a_timed_model_is_zero():
    net = suite.prepared(TINY, "forward", OURS, "cpu")
    assert all(parameter.any() for parameter in net.parameters())


@pytest.mark.parametrize(
    ("fits", "saturates", "expected"), [(100, 10**9, 64), (10**9, 16, 16), (1, 10**9, 1)]
)
def test_the_filling_batch_is_the_last_that_fits_or_gains(fits, saturates, expected):
    def seconds(batch: int) -> float:
        if batch > fits:
            raise torch.OutOfMemoryError
        return max(batch / saturates, 1.0)

    assert suite.filling_batch(seconds, most=4096) == expected


def test_a_model_that_does_not_fit_at_all_says_so():
    def seconds(batch: int) -> float:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        suite.filling_batch(seconds)


def test_every_model_mode_and_measure_has_its_rows():
    tasks = suite.tasks("cuda", [], suite.MODES)
    found = {(t.model.name, t.mode, t.measure, t.implementation.name) for t in tasks}
    assert len(found) == len(tasks)
    for model in ("DiT-XL/2", "video-XL"):
        assert model in DiT_models
        for mode in suite.MODES:
            rows = {(m, i) for name, kind, m, i in found if (name, kind) == (model, mode)}
            measures = ("latency", "throughput")
            assert rows == {(m, i.name) for m in measures for i in suite.IMPLEMENTATIONS}
    unets = {i for name, _, _, i in found if name == "U-Net"}
    assert unets == {"eager", "compile", "compile-cudnn"}


def test_what_a_cpu_does_not_run_is_absent_with_the_reason():
    wanted = [t for t in suite.tasks("cpu", [], ["forward"]) if t.implementation.compiled]
    wanted = [t for t in wanted if t.implementation.attention or t.model.name == "U-Net"]
    rows = [row for row in suite.run(wanted, "cpu") if "begun" not in row]
    assert {(row["model"], row["implementation"]): row["absent"] for row in rows} == {
        ("tiny-image", "compile-cudnn"): "needs a GPU",
        ("tiny-video", "compile-cudnn"): "needs a GPU",
        ("U-Net", "compile-cudnn"): "needs a GPU",
        ("U-Net", "compile"): "a whole U-Net compiles for minutes on a CPU",
    }


def test_rows_are_written_as_they_come_and_compiled_ones_are_right(tmp_path, monkeypatch, capsys):
    """One compiled block, shared by the layers, serves a whole model."""
    compiled = [i for i in suite.IMPLEMENTATIONS if i.name == "ours-compile-graph"]
    monkeypatch.setattr(suite, "IMPLEMENTATIONS", (EAGER, *compiled))
    ceilings = {"matmul_tflops": 1.0, "copy_gbps": 1.0, "launch_us": 1.0, "graph_launch_us": 1.0}
    monkeypatch.setattr(machine, "ceilings", lambda device: ceilings)
    arguments = ["models", "tiny-image", "--mode", "forward", "--out", str(tmp_path)]
    from benchmarks import bench

    monkeypatch.setattr(
        suite, "tasks",
        lambda *args: [suite.Task(TINY, "forward", "latency", i) for i in suite.IMPLEMENTATIONS],
    )  # fmt: skip
    assert bench.main(arguments) == 0, capsys.readouterr().out
    rows = json.loads((tmp_path / "models.json").read_text())["rows"]
    assert [row["implementation"] for row in rows] == ["eager", "ours-compile-graph"]
    for row in rows:
        assert row["accurate"]
        assert row["per_second"] == pytest.approx(1e3 / row["ms"])
        assert row["flops"] == suite.flops(TINY, "forward")
    assert "of the matrix product's rate" in capsys.readouterr().out
