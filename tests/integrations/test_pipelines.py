"""Whole pipelines, patched and unpatched."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import torch

import dit_kernels
from dit_kernels import cli
from dit_kernels.integrations import pipelines


@pytest.mark.parametrize("name", pipelines.PIPELINES)
def test_a_patched_pipeline_generates_the_same_in_float32(name: str) -> None:
    (found,) = pipelines.compare((name,), (torch.float32,), steps=2)
    assert found.put_back == 0
    assert found.replaced > 10
    assert found.steps == 2
    pipeline, arguments = pipelines.PIPELINES[name](torch.float32)
    own = pipelines.latents(pipeline, arguments, 2)
    # by the accuracy rule with the latents of the unpatched run as the oracle, at float16's eps
    assert found.difference <= 2 * torch.finfo(torch.float16).eps * float(own.abs().max())


def test_every_transformer_of_a_pipeline_is_patched() -> None:
    pipeline, _ = pipelines.PIPELINES["Wan"](torch.float32)
    second, _ = pipelines.PIPELINES["Wan"](torch.float32)
    both = diffusers.WanPipeline(
        None, None, None, pipeline.scheduler, transformer=pipeline.transformer,
        transformer_2=second.transformer,
    )  # fmt: skip
    report = dit_kernels.patch(both)
    assert report.model == "WanPipeline"
    assert {site.split(".")[0] for site, _ in report.replaced} == {"transformer", "transformer_2"}
    dit_kernels.unpatch(both)
    assert not [m for m in both.transformer_2.modules() if "forward" in m.__dict__]


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    config = tmp_path / "config.json"
    config.write_text('{"_class_name": "SD3Transformer2DModel", "num_layers": 2}')
    shown = CliRunner().invoke(cli.app, ["patch-report", str(config)])
    assert shown.exit_code == 0, shown.output
    assert "transformer_blocks.*.norm2" in shown.output
    assert "it has no QK-norm" in shown.output

    row = pipelines.Comparison("Wan", "float32", 18, 0, 4, 0.0, float("inf"))
    monkeypatch.setattr(pipelines, "compare", lambda: iter([row]))
    shown = CliRunner().invoke(cli.app, ["check", "--diffusers"])
    assert shown.exit_code == 0, shown.output
    assert "equal" in shown.output
    off = pipelines.Comparison("Flux", "bfloat16", 18, 2, 4, 0.1, 40.0)
    monkeypatch.setattr(pipelines, "compare", lambda: iter([row, off]))
    shown = CliRunner().invoke(cli.app, ["check", "--diffusers"])
    assert shown.exit_code == 1
    assert "2 put back" in shown.output
