"""Whole pipelines, patched and unpatched."""

from __future__ import annotations

import diffusers
import pytest
import torch

import dit_kernels
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
