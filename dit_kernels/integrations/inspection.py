"""What `patch` would do to a model, from its configuration alone, and the table of what it knows."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dit_kernels.integrations.patching import PatchReport, patch

# family -> (class of diffusers, changes to its default configuration)
MATRIX: dict[str, tuple[str, dict[str, Any]]] = {
    "DiT": ("DiTTransformer2DModel", dict(num_embeds_ada_norm=1000, norm_type="ada_norm_zero", norm_elementwise_affine=False)),
    "PixArt": ("PixArtTransformer2DModel", dict(caption_channels=4096)),
    "SD3": ("SD3Transformer2DModel", {}),
    "SD3.5": ("SD3Transformer2DModel", dict(qk_norm="rms_norm", dual_attention_layers=(0,))),
    "Flux": ("FluxTransformer2DModel", {}),
    "Flux 2": ("Flux2Transformer2DModel", {}),
    "Qwen-Image": ("QwenImageTransformer2DModel", {}),
    "CogVideoX": ("CogVideoXTransformer3DModel", dict(use_rotary_positional_embeddings=True)),
    "HunyuanVideo": ("HunyuanVideoTransformer3DModel", {}),
    "HunyuanVideo I2V": ("HunyuanVideoTransformer3DModel", dict(image_condition_type="token_replace")),
    "HunyuanVideo 1.5": ("HunyuanVideo15Transformer3DModel", {}),
    "Wan 2.1, 2.2": ("WanTransformer3DModel", {}),
    "LTX-Video": ("LTXVideoTransformer3DModel", {}),
    "LTX-2": ("LTX2VideoTransformer3DModel", {}),
    "Mochi": ("MochiTransformer3DModel", {}),
    "Lumina 2": ("Lumina2Transformer2DModel", {}),
    "Z-Image": ("ZImageTransformer2DModel", {}),
    "Cosmos": ("CosmosTransformer3DModel", {}),
    "Sana-Video": ("SanaVideoTransformer3DModel", {}),
    "Kandinsky 5": ("Kandinsky5Transformer3DModel", {}),
    "Allegro": ("AllegroTransformer3DModel", {}),
}  # fmt: skip
COLUMNS = (
    "adaln", "gated_adaln", "gated_residual", "qk_norm_rope", "patch_embed", "gelu_bias", "swiglu",
)  # fmt: skip
DEPTHS = (
    "num_layers", "num_single_layers", "num_refiner_layers", "n_layers", "n_refiner_layers",
    "num_text_blocks", "num_visual_blocks",
)  # fmt: skip


def report_of_config(source: str | Path) -> PatchReport:
    """The report for a config.json, or for a folder of a model or pipeline; no weights are read or made.

    Raises:
        ValueError: there is no configuration of a diffusers model.
    """
    import diffusers

    path = Path(source)
    if path.is_dir():
        found = [path / "config.json", *sorted(path.glob("transformer*/config.json"))]
        path = next((candidate for candidate in found if candidate.is_file()), path / "config.json")
    if not path.is_file():
        raise ValueError(f"{source} is no config.json and no folder of a diffusers model")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    name = config.get("_class_name", "") if isinstance(config, dict) else ""
    kind = getattr(diffusers, name, None) if name else None
    if kind is None:
        raise ValueError(
            f"{path} does not name a model class that diffusers {diffusers.__version__} has"
        )
    if not (isinstance(kind, type) and issubclass(kind, torch.nn.Module)):
        raise ValueError(
            f"{path} is of a {name}, which is no model; give a model's config.json or folder"
        )
    try:
        with _meta():
            model = kind.from_config(config)  # type: ignore[attr-defined]
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is no configuration of a {name}: {error}") from error
    return patch(model, check=False)


def matrix() -> str:
    """A Markdown table: family by op, the op calls that replace something in one of each kind of block."""
    lines = [
        "| family | diffusers class | " + " | ".join(COLUMNS) + " | left |",
        "|---|---|" + "--:|" * (len(COLUMNS) + 1),
    ]
    for family, (name, changes) in MATRIX.items():
        report = patch(shallow(name, changes), check=False)
        counts = Counter(op for _, op in report.replaced)
        cells = [str(counts[op]) if counts[op] else "" for op in COLUMNS]
        lines.append(f"| {family} | `{name}` | {' | '.join(cells)} | {len(report.left)} |")
    return "\n".join(lines)


def shallow(name: str, changes: dict[str, Any] | None = None) -> Any:
    """A model of a class of diffusers on the meta device, with one layer of each kind."""
    import inspect

    import diffusers

    kind = getattr(diffusers, name)
    accepted = inspect.signature(kind.__init__).parameters
    config = {depth: 1 for depth in DEPTHS if depth in accepted} | (changes or {})
    with _meta():
        return kind(**config)


@contextlib.contextmanager
def _meta() -> Iterator[None]:
    with torch.device("meta"):
        yield


if __name__ == "__main__":
    print(matrix())
