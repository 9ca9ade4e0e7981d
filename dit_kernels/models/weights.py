"""Weights of the DiT: files (safetensors only), the original DiT's naming, diffusers' naming."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dit_kernels.models.dit import DiT

# safetensors is imported where a file is: a bare GPU machine has torch and triton only


def save(model: DiT, path: str | Path) -> None:
    """Write a model's weights and configuration to one safetensors file, whole or not at all."""
    from safetensors.torch import save_file

    path = Path(path)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(tensors, temporary, metadata={"config": json.dumps(model.config)})
    os.replace(temporary, path)


def load(path: str | Path, device: str | torch.device = "cpu", **changes: Any) -> DiT:
    """Read a model that `save` wrote; `changes` replace entries of its configuration.

    Raises:
        ValueError: the file holds no DiT configuration.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    if "config" not in metadata:
        raise ValueError(f"load: {path} has no DiT configuration in its metadata")
    model = DiT(**{**json.loads(metadata["config"]), **changes})
    model.load_state_dict(load_file(path))
    return model.to(device)


def load_original(state_dict: dict[str, Any]) -> dict[str, Tensor]:
    """The original DiT's state dict (facebookresearch/DiT), ready for `DiT.load_state_dict`.

    Training checkpoints are opened ({"ema": ..., "model": ...}: the EMA weights), and the patch
    embedding's Conv2d weight [C, Cin, p, p] becomes [C, Cin, 1, p, p].
    """
    for name in ("ema", "model"):
        if isinstance(state_dict.get(name), dict):
            state_dict = state_dict[name]
            break
    state_dict = dict(state_dict)
    weight = state_dict["x_embedder.proj.weight"]
    if weight.dim() == 4:
        state_dict["x_embedder.proj.weight"] = weight.unsqueeze(2)
    return state_dict


def from_diffusers(module: nn.Module) -> DiT:
    """A DiT with the weights of diffusers' DiTTransformer2DModel, and equal outputs.

    Raises:
        TypeError: the module is another class.
        ValueError: its blocks embed time and class each in their own way (checkpoints hold one embedder,
            repeated), or its configuration is none that this DiT has.
    """
    if type(module).__name__ != "DiTTransformer2DModel":
        raise TypeError(
            f"from_diffusers: module must be a DiTTransformer2DModel; got {type(module).__name__}"
        )
    config: Any = module.config
    source: dict[str, Tensor] = module.state_dict()
    out_channels = config.out_channels or config.in_channels
    unknown = None
    if out_channels not in (config.in_channels, 2 * config.in_channels):
        unknown = f"out_channels {out_channels}"
    elif config.activation_fn != "gelu-approximate":
        unknown = f"activation_fn {config.activation_fn!r}"
    elif config.norm_elementwise_affine or not config.attention_bias:
        unknown = "norm_elementwise_affine or attention_bias=False"
    if unknown:
        raise ValueError(f"from_diffusers: {unknown} has no counterpart in this DiT")
    depth = config.num_layers
    embedder = "transformer_blocks.{}.norm1.emb."
    shared = {n[len(embedder.format(0)) :] for n in source if n.startswith(embedder.format(0))}
    for i in range(1, depth):
        for name in shared:
            if not torch.equal(
                source[embedder.format(i) + name], source[embedder.format(0) + name]
            ):
                raise ValueError(
                    f"from_diffusers: block {i} must embed time and class as block 0 does; {name} differs"
                )
    classes = config.num_embeds_ada_norm
    model = DiT(
        input_size=(1, config.sample_size, config.sample_size),
        patch_size=(1, config.patch_size, config.patch_size),
        in_channels=config.in_channels,
        hidden_size=config.num_attention_heads * config.attention_head_dim,
        depth=depth,
        num_heads=config.num_attention_heads,
        num_classes=classes,
        learn_sigma=out_channels != config.in_channels,
        frequency_shift=1.0,
        norm2_eps=config.norm_eps,
    )
    target: dict[str, Any] = {"pos_embed": model.pos_embed}
    for ours, theirs in (
        ("x_embedder.proj", "pos_embed.proj"),
        ("t_embedder.mlp.0", embedder.format(0) + "timestep_embedder.linear_1"),
        ("t_embedder.mlp.2", embedder.format(0) + "timestep_embedder.linear_2"),
        ("final_layer.adaLN_modulation.1", "proj_out_1"),
        ("final_layer.linear", "proj_out_2"),
        *(
            (f"blocks.{i}.{ours}", f"transformer_blocks.{i}.{theirs}")
            for i in range(depth)
            for ours, theirs in (
                ("attn.proj", "attn1.to_out.0"),
                ("mlp.fc1", "ff.net.0.proj"),
                ("mlp.fc2", "ff.net.2"),
                ("adaLN_modulation.1", "norm1.linear"),
            )
        ),
    ):
        for part in ("weight", "bias"):
            target[f"{ours}.{part}"] = source[f"{theirs}.{part}"]
    target["y_embedder.embedding_table.weight"] = source[
        embedder.format(0) + "class_embedder.embedding_table.weight"
    ]
    for i in range(depth):
        for part in ("weight", "bias"):
            target[f"blocks.{i}.attn.qkv.{part}"] = torch.cat(
                [source[f"transformer_blocks.{i}.attn1.to_{x}.{part}"] for x in "qkv"]
            )
    model.load_state_dict(target)
    weight = source["proj_out_2.weight"]
    return model.to(weight.device, weight.dtype).train(module.training)
