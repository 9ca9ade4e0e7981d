"""Every transformer class that diffusers exports, built shallow on the meta device: patch and unpatch."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import diffusers
import pytest
import torch
from small_models import SMALL

import dit_kernels
from dit_kernels.integrations import inspection, sites

CLASSES = sorted(
    name
    for name in dir(diffusers)
    if "Transformer" in name and name.endswith(("Model", "Transformer"))
)
CHANGES = {"WanVACETransformer3DModel": {"vace_layers": [0]}}
# the defaults of their constructors make no model
NOT_BUILT = {
    "DreamLiteTransformer2DModel",
    "EasyAnimateTransformer3DModel",
    "HiDreamImageTransformer2DModel",
    "LatteTransformer3DModel",
    "OmniGenTransformer2DModel",
    "Transformer2DModel",
    "TransformerTemporalModel",
}


def build(name: str) -> torch.nn.Module | None:
    try:
        return inspection.shallow(name, CHANGES.get(name))
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, ZeroDivisionError):
        return None


@pytest.mark.parametrize("name", CLASSES)
def test_patch_and_unpatch_leave_a_class_as_it_was(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = build(name)
    assert (model is None) == (name in NOT_BUILT)
    if model is None:
        return
    names = [n for n, _ in model.named_modules()]
    keys = list(model.state_dict())
    before = {n: dict(m.__dict__) for n, m in model.named_modules()}
    report = dit_kernels.patch(model, check=False)
    assert [n for n, _ in model.named_modules()] == names
    assert list(model.state_dict()) == keys
    modules = set(names)
    for site, _ in report.replaced:
        assert site in modules
    dit_kernels.unpatch(model)
    assert sites.sites(model) == []
    for n, m in model.named_modules():
        assert m.__dict__.keys() == before[n].keys(), n


def test_the_support_matrix_is_what_the_command_makes() -> None:
    text = (Path(__file__).parents[2] / "docs" / "diffusers.md").read_text()
    found = re.search(r"<!-- matrix -->\n(.*?)\n<!-- /matrix -->", text, re.DOTALL)
    assert found is not None
    assert found[1] == inspection.matrix()
    assert f"diffusers {diffusers.__version__}" in text


def test_the_report_of_a_config(tmp_path: Path) -> None:
    config = tmp_path / "transformer" / "config.json"
    config.parent.mkdir()
    config.write_text('{"_class_name": "FluxTransformer2DModel", "num_layers": 2}')
    report = inspection.report_of_config(config)
    assert report.replaced == inspection.report_of_config(tmp_path).replaced
    assert ("transformer_blocks.1.norm2", "gated_adaln") in report.replaced
    assert len(report.replaced) == 2 * 10 + 38 * 3 + 1
    config.write_text('{"_class_name": "NoSuchModel"}')
    with pytest.raises(ValueError, match="does not name a model class that diffusers"):
        inspection.report_of_config(config)
    for text, reason in (
        ('{"_class_name": "FluxPipeline"}', "is of a FluxPipeline, which is no model"),
        ('{"_class_name": "DDIMScheduler"}', "is of a DDIMScheduler, which is no model"),
        (
            '{"_class_name": "FluxTransformer2DModel", "num_layers": "x"}',
            "is no configuration of a Flux",
        ),
        ("{", r"config.json is not JSON: Expecting"),
    ):
        config.write_text(text)
        with pytest.raises(ValueError, match=reason):
            inspection.report_of_config(config)
    with pytest.raises(ValueError, match=r"is no config.json and no folder of a diffusers model"):
        inspection.report_of_config(tmp_path / "nothing")


def test_every_family_of_the_support_matrix_is_tested_small() -> None:
    assert {small.kind for small in SMALL.values()} >= {
        name for name, _ in inspection.MATRIX.values()
    }
