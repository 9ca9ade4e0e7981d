"""What the benchmarks' clock needs of a GPU."""

from __future__ import annotations

import torch

from benchmarks import bench, timing


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
