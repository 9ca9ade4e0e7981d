"""Checks on what a DiT is made of and called with: each failure is one sentence, expected against got."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dit_kernels.nn.attention import QK_NORMS
from dit_kernels.nn.block import DiTBlock
from dit_kernels.nn.checks import NORMS
from dit_kernels.ops.arguments import FLOATS, autocast_dtype, check_choice, check_eps, triple

if TYPE_CHECKING:
    from dit_kernels.models.dit import DiT

NAME = "DiT"


def check_config(config: dict[str, Any]) -> None:
    """The arguments of a DiT, whose sizes are triples already.

    Raises:
        TypeError: a number is of another type.
        ValueError: a value is none that there is, or two don't go together.
    """
    for name, choices in (
        ("pos_embed", ("sincos", "rope")), ("text_mode", ("pooled", "cross", "joint")),
        ("norm", NORMS), ("qk_norm", QK_NORMS),
    ):  # fmt: skip
        check_choice(NAME, name, config[name], choices)
    for name, least in (
        ("in_channels", 1), ("hidden_size", 1), ("depth", 0), ("num_heads", 1), ("window_every", 1),
        ("num_classes", 1), ("text_dim", 1),
    ):  # fmt: skip
        number, optional = config[name], name in ("num_classes", "text_dim")
        if number is None and optional:
            continue
        try:
            operator.index(number)
        except TypeError:
            raise TypeError(f"{NAME}: {name} must be an int; got {number!r}") from None
        if number < least:
            none = ", or None for none" * optional
            raise ValueError(f"{NAME}: {name} must be at least {least}{none}; got {number}")
    check_eps(NAME, config["norm2_eps"])
    if not 0 <= config["class_dropout_prob"] <= 1:
        raise ValueError(
            f"{NAME}: class_dropout_prob must lie in [0, 1]; got {config['class_dropout_prob']}"
        )
    hidden, heads, pos_embed = config["hidden_size"], config["num_heads"], config["pos_embed"]
    if not config["mlp_ratio"] * hidden >= 1:
        raise ValueError(
            f"{NAME}: mlp_ratio must give the feed-forward a width of at least 1;"
            f" got {config['mlp_ratio']} of hidden_size {hidden}"
        )
    if hidden % heads:
        raise ValueError(f"{NAME}: num_heads must divide hidden_size; got {heads} and {hidden}")
    if pos_embed == "rope":
        _check_rope(hidden // heads, config)
    else:
        video = config["input_size"][0] != config["patch_size"][0]
        if hidden % (parts := 16 if video else 4):
            raise ValueError(
                f"{NAME}: hidden_size must be a multiple of {parts} for the sincos table of"
                f" {'a video' if video else 'an image'}; got {hidden} (pos_embed='rope' has no table)"
            )
    window, stride = config["window_size"], config["stride"]
    if window is None:
        if stride is not None:
            raise ValueError(f"{NAME}: stride needs window_size; got stride {stride} alone")
        if config["window_every"] != 1:
            raise ValueError(
                f"{NAME}: window_every needs window_size; got window_every {config['window_every']} alone"
            )
    elif stride is not None and any(s > w for s, w in zip(stride, window, strict=True)):
        raise ValueError(
            f"{NAME}: stride must be at most window_size {window} on each axis; got {stride}"
        )
    if config["text_dim"] is None and config["text_mode"] != "pooled":
        raise ValueError(
            f"{NAME}: text_mode {config['text_mode']!r} needs text_dim, the width of the prompt's tokens"
        )


def _check_rope(head_dim: int, config: dict[str, Any]) -> None:
    if head_dim % 2:
        raise ValueError(
            f"{NAME}: rope turns pairs of channels, so that a head must have an even number;"
            f" got hidden_size {config['hidden_size']} and num_heads {config['num_heads']}"
        )
    if not config["rope_theta"] > 0:
        raise ValueError(f"{NAME}: rope_theta must be more than 0; got {config['rope_theta']}")
    if config["rope_dims"] is not None:
        dims = triple(NAME, "rope_dims", config["rope_dims"], least=0)
        if any(d % 2 for d in dims) or not 0 < sum(dims) <= head_dim:
            raise ValueError(
                f"{NAME}: rope_dims must be even, and at most {head_dim} together, the channels of a head;"
                f" got {dims}"
            )


def check_inputs(model: DiT, x: Any, t: Any, y: Any, text: Any, text_mask: Any) -> None:
    """What `DiT.forward` is called with; its docstring has the errors."""
    _check_video(model, "x", x, "B")
    _check_wanted(model, y, text)
    samples, frames = (
        x.shape[0],
        model.grid(x.shape[-3:] if x.dim() == 5 else (1, *x.shape[-2:]))[0],
    )
    _check_tensor("t", t, "[B] or [B, Gt]", x)
    if tuple(t.shape) not in ((samples,), (samples, frames)):
        raise ValueError(
            f"{NAME}: t must be [B] or [B, Gt = {frames}], a time a frame of patches, for B = {samples};"
            f" got {list(t.shape)}"
        )
    _check_real("t", t)
    _check_labels(y, x, samples, "B")
    if text is None:
        _check_no_mask(text_mask)
    else:
        width = model.config["text_dim"]
        _check_tensor("text", text, "[B, L, text_dim]", x)
        if text.dim() != 3 or (text.shape[0], text.shape[2]) != (samples, width):
            raise ValueError(
                f"{NAME}: text must be [B = {samples}, L, text_dim = {width}]; got {list(text.shape)}"
            )
        _check_float("text", text)
        _check_mask(text_mask, text.shape[:2], x, "B")
        _check_dtype("text", text, _takes_text(model))
    _check_dtype("x", x, _takes_video(model))


def check_packed_inputs(model: DiT, xs: Any, t: Any, y: Any, text: Any, text_mask: Any) -> None:
    """What `DiT.forward_packed` is called with; its docstring has the errors."""
    if isinstance(xs, Tensor) or not isinstance(xs, Sequence):
        got = f"a tensor {list(xs.shape)}" if isinstance(xs, Tensor) else type(xs).__name__
        raise TypeError(
            f"{NAME}: xs must be a list of videos [{model.in_channels}, F, Y, X], each of its own size;"
            f" got {got}"
        )
    if not xs:
        return
    for x in xs:
        _check_video(model, "each of xs", x, "")
        _check_dtype("each of xs", x, _takes_video(model))
    _check_wanted(model, y, text)
    _check_entries("t", t, len(xs))
    for x, time in zip(xs, t, strict=True):
        _check_tensor("each t", time, "[] or [Gt]", xs[0])
        frames = model.grid(x.shape[1:] if x.dim() == 4 else (1, *x.shape[1:]))[0]
        if time.numel() not in (1, frames):
            raise ValueError(
                f"{NAME}: each t must be [] or [Gt = {frames}], a time a frame of patches;"
                f" got {list(time.shape)}"
            )
        _check_real("each t", time)
    _check_labels(y, xs[0], len(xs), "S")
    if text is None:
        _check_no_mask(text_mask)
        return
    width, lengths = model.config["text_dim"], set()
    _check_entries("text", text, len(xs))
    for prompt in text:
        _check_tensor("each text", prompt, "[L, text_dim]", xs[0])
        if prompt.dim() != 2 or prompt.shape[1] != width:
            raise ValueError(
                f"{NAME}: each text must be [L, text_dim = {width}]; got {list(prompt.shape)}"
            )
        _check_float("each text", prompt)
        _check_dtype("each text", prompt, _takes_text(model))
        lengths.add(len(prompt))
    if text_mask is not None and len(lengths) > 1:
        raise ValueError(
            f"{NAME}: text_mask is for prompts of one length; got lengths {sorted(lengths)}"
        )
    _check_mask(text_mask, (len(xs), *lengths), xs[0], "S")


def _check_video(model: DiT, name: str, x: Any, batch: str) -> None:
    """`batch` is the letter before the channels, if any."""
    weight: Any = model.x_embedder.proj.weight
    letters, axes = (f"{batch}, " if batch else ""), len(batch)
    form = f"[{letters}{model.in_channels}, F, Y, X]"
    if not isinstance(x, Tensor):
        raise TypeError(f"{NAME}: {name} must be a tensor {form}; got {type(x).__name__}")
    if x.dim() not in (axes + 3, axes + 4) or x.shape[axes] != model.in_channels:
        raise ValueError(
            f"{NAME}: {name} must be {form} or [{letters}{model.in_channels}, Y, X]; got {list(x.shape)}"
        )
    if x.device != weight.device and not weight.is_meta:  # of an offloaded model, they come later
        raise ValueError(
            f"{NAME}: {name} must be on {weight.device}, where the weights are; got {x.device}"
        )
    _check_float(name, x)


def _check_wanted(model: DiT, y: object, text: object) -> None:
    """What the model was made for is given, and nothing else."""
    for name, given, wanted, argument in (
        ("y", y is not None, model.y_embedder is not None, "num_classes"),
        ("text", text is not None, model.text_mode is not None, "text_dim"),
    ):
        if given and not wanted:
            raise ValueError(
                f"{NAME}: {name} is not an input of this model, which was made without {argument}"
            )
        if wanted and not given:
            raise ValueError(
                f"{NAME}: {name} must be given to this model, which was made with {argument}"
            )


def _check_tensor(name: str, value: object, form: str, x: Tensor) -> None:
    """`form` is the shape in letters, as the message shows it."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{NAME}: {name} must be a tensor {form}; got {type(value).__name__}")
    if value.device != x.device:
        raise ValueError(f"{NAME}: {name} must be on {x.device}, where x is; got {value.device}")


def _check_entries(name: str, value: object, count: int) -> None:
    if not isinstance(value, Tensor | Sequence) or (isinstance(value, Tensor) and not value.dim()):
        got = "a tensor []" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{NAME}: {name} must be a tensor or a list, an entry a video; got {got}")
    if len(value) != count:
        raise ValueError(
            f"{NAME}: {name} must have an entry for each of the {count} videos; got {len(value)}"
        )


def _check_float(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATS:
        raise TypeError(
            f"{NAME}: {name} must be float32, bfloat16, float16 or float64; got {tensor.dtype}"
        )


def _check_real(name: str, tensor: Tensor) -> None:
    if tensor.dtype.is_complex or tensor.dtype == torch.bool:
        raise TypeError(f"{NAME}: {name} must be real numbers; got {tensor.dtype}")


def _check_labels(y: Any, x: Tensor, count: int, letter: str) -> None:
    if y is None:
        return
    _check_tensor("y", y, f"[{letter}]", x)
    if tuple(y.shape) != (count,):
        raise ValueError(f"{NAME}: y must be [{letter} = {count}]; got {list(y.shape)}")
    if y.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{NAME}: y must be int64; got {y.dtype}")


def _check_no_mask(mask: object) -> None:
    if mask is not None:
        raise ValueError(f"{NAME}: text_mask is given, and no text that it could be of")


def _check_mask(mask: Any, shape: Sequence[int], x: Tensor, letter: str) -> None:
    if mask is None:
        return
    _check_tensor("text_mask", mask, f"[{letter}, L]", x)
    if tuple(mask.shape) != tuple(shape):
        raise ValueError(
            f"{NAME}: text_mask must be [{letter}, L] = {list(shape)}; got {list(mask.shape)}"
        )
    if mask.dtype != torch.bool:
        raise TypeError(f"{NAME}: text_mask must be bool; got {mask.dtype}")


def _takes_video(model: DiT) -> list[nn.Module]:
    """The Linear that meets the tokens of a video first, then the modules around it."""
    block: Any = model.blocks[0] if len(model.blocks) else None
    if type(block) is not DiTBlock:  # wrapped, to be sharded or recomputed
        return []
    return [block.attn.qkv, block.attn, block, model.x_embedder]


def _takes_text(model: DiT) -> list[nn.Module]:
    """The same of a prompt."""
    if model.text_mode == "pooled":
        return [model.text_pool.kv, model.text_pool]
    if model.text_mode == "joint":
        return [model.text_embedder]
    block: Any = model.blocks[0] if len(model.blocks) else None
    if type(block) is not DiTBlock:
        return []
    return [block.cross_attn.kv, block.cross_attn, block]


def _check_dtype(name: str, tensor: Tensor, modules: Sequence[nn.Module]) -> None:
    """The dtype of the weights, or autocast's; not where something may yet cast either: a hook, a
    forward that was replaced, a weight of another class."""
    if not modules or torch.compiler.is_compiling() or autocast_dtype(tensor) is not None:
        return
    if any(
        module._forward_pre_hooks or module._forward_hooks or "forward" in vars(module)
        for module in modules
    ):
        return
    weight: Any = modules[0].weight if type(modules[0]) is nn.Linear else None
    if type(weight) is nn.Parameter and weight.dtype in FLOATS and weight.dtype != tensor.dtype:
        raise TypeError(
            f"{NAME}: {name} must be {weight.dtype} as the weights, outside of autocast;"
            f" got {tensor.dtype}"
        )
