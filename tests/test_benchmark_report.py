"""From results to pages: tables, targets, plots, and what `auto` learns; nothing committed is out of date."""

from __future__ import annotations

import json

import matplotlib.figure
import pytest
import torch

from benchmarks import (
    fastest,
    plots,
    record,
    report,
    runs,
    targets,
)
from benchmarks.cases import CASES, cases_for
from benchmarks.shapes import SHAPES
from dit_kernels import backends, measured, ops


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
) -> list[record.Row]:
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
    def row(op: str, flops: int, direction: str = "forward") -> record.Row:
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
