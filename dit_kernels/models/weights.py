"""Weights of the DiT: files (safetensors only), the original DiT's naming, diffusers' naming."""

from __future__ import annotations

import inspect
import json
import os
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dit_kernels.models.dit import DiT

# safetensors is imported where a file is: a bare GPU machine has torch and triton only


def save(model: DiT, path: str | Path) -> None:
    """Write a model's weights and configuration to one safetensors file, whole or not at all.

    Its folder is made if missing.

    Raises:
        TypeError: the model is no DiT.
        IsADirectoryError: the path is a folder.
    """
    from safetensors.torch import save_file

    if not isinstance(model, DiT):
        raise TypeError(f"save: model must be a DiT; got {type(model).__name__}")
    path = Path(path)
    _refuse_folder("save", path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(tensors, temporary, metadata={"config": json.dumps(model.config)})
    os.replace(temporary, path)


def load(path: str | Path, device: str | torch.device = "cpu", **changes: Any) -> DiT:
    """Read a model that `save` wrote; `changes` replace entries of its configuration.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no such file, or it is a folder.
        ValueError: the file is none that `save` wrote, or its weights don't fit the changes.
        TypeError: a change is no argument of DiT.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    path = Path(path)
    _refuse_folder("load", path)
    if not path.is_file():
        raise FileNotFoundError(f"load: no such file: {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        config = json.loads(metadata.get("config", "null"))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"load: {path} is not a safetensors file of `save`: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"load: {path} has no DiT configuration in its metadata")
    known = inspect.signature(DiT).parameters
    if unknown := [name for name in changes if name not in known]:
        raise TypeError(f"load: DiT has no argument {', '.join(map(repr, unknown))}")
    if unknown := [name for name in config if name not in known]:
        raise ValueError(
            f"load: {path} has settings that this version does not know: {', '.join(unknown)}"
        )
    model = DiT(**{**config, **changes})
    try:
        model.load_state_dict(load_file(path))
    except RuntimeError as error:
        _, first, *_ = str(error).splitlines()  # the first says for which class
        given = f" with the changes {changes}" if changes else ""
        raise ValueError(
            f"load: the weights in {path} don't fit its configuration{given}:"
            f" {textwrap.shorten(first, 200, placeholder=' ...')}"
        ) from error
    return model.to(device)


def _refuse_folder(caller: str, path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(
            f"{caller}: {path} is a folder; give the path of a .safetensors file"
        )


def load_original(state_dict: dict[str, Any]) -> dict[str, Tensor]:
    """The original DiT's state dict (facebookresearch/DiT), ready for `DiT.load_state_dict`.

    Training checkpoints are opened ({"ema": ..., "model": ...}: the EMA weights), and the patch
    embedding's Conv2d weight [C, Cin, p, p] becomes [C, Cin, 1, p, p].

    Raises:
        TypeError: it is no state dict.
        ValueError: it is another model's.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"load_original: state_dict must be a dict of tensors, as torch.load gives it;"
            f" got {type(state_dict).__name__}"
        )
    for name in ("ema", "model"):
        if isinstance(state_dict.get(name), dict):
            state_dict = state_dict[name]
            break
    state_dict = dict(state_dict)
    weight = state_dict.get("x_embedder.proj.weight")
    if not isinstance(weight, Tensor):
        raise ValueError(
            "load_original: state_dict must be the original DiT's, with x_embedder.proj.weight;"
            f" got {len(state_dict)} entries without it"
        )
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
