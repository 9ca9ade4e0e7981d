"""What the benchmarks' clock needs of a GPU."""

from __future__ import annotations

import pytest
import torch

from benchmarks import bench, machine, timing
from benchmarks.baselines import baselines


def test_a_backward_is_captured():
    """Else its time would count the gaps between launches, and a forward's would not."""
    x = torch.randn(64, 256, device="cuda")
    for direction in ("forward", "backward"):
        (once,) = bench.calls(lambda x: x.tanh() * x, [{"x": x}], direction, "cuda")
        once()
        assert timing.captured(once) is not None, direction


def test_the_peak_is_that_of_one_call():
    x = torch.randn(1 << 20, device="cuda")
    bytes_of_x = x.numel() * x.element_size()
    assert bench._peak(lambda x: x.exp(), {"x": x}, "forward") == bytes_of_x
    # the output, which exp saves, the gradient that comes in and the one that goes out
    assert bench._peak(lambda x: x.exp(), {"x": x}, "backward") == 3 * bytes_of_x


@pytest.mark.parametrize(
    "wait",
    [lambda x: x.sum().item(), lambda x: torch.cuda.synchronize()],
    ids=["which torch knows", "which only the capture finds"],
)
def test_a_wait_is_not_captured_and_harms_nothing(wait):
    x = torch.randn(64, device="cuda")
    stream = torch.cuda.current_stream()
    assert timing.captured(lambda: wait(x)) is None
    assert torch.cuda.current_stream() == stream
    assert torch.randn(8, device="cuda").isfinite().all()
    assert timing.captured(lambda: x.exp()) is not None


def test_ours_is_measured_from_a_graph(monkeypatch):
    """Accuracy, time, memory: all that a row has, of a kernel and of what it is compared with."""
    found = [b for b in baselines("cuda") if b.name in ("triton", "eager", "sdpa-flash")]
    monkeypatch.setattr(bench, "baselines", lambda device: found)
    wanted = bench.points(
        ["gated_adaln", "attention", "attention-window"], ["tiny-video"], [], "cuda"
    )
    rows = [r for r in bench.run("cuda", wanted, torch.bfloat16) if "begun" not in r]
    assert not [row for row in rows if "ms" not in row]
    assert {(r["case"], r["implementation"]) for r in rows} == {
        ("gated_adaln", "triton"), ("gated_adaln", "eager"), ("attention", "triton"),
        ("attention", "eager"), ("attention", "sdpa-flash"), ("attention-window", "triton"),
        ("attention-window", "eager"),
    }  # fmt: skip
    for row in rows:
        assert row["timed_by"] == "graph", row
        assert row["accurate"], row
        assert row["ms"] > 0
        assert row["peak_bytes"] > 0


def test_the_ceilings_are_a_gpus():
    found = machine.ceilings("cuda")
    assert found["copy_gbps"] > 100
    assert found["matmul_tflops"] > 10
    assert 0 < found["graph_launch_us"] < found["launch_us"] < 1000
