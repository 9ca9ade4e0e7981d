"""Pieces that many models share: adaLN layers, norms, feed-forwards and patch embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dit_kernels import ops
from dit_kernels.integrations.fused import Fused, is_hooked, keeps_dtype, norm_of
from dit_kernels.integrations.recognition import STRUCTURES, Adapter, Row, adapts
from dit_kernels.ops.arguments import autocast_dtype


def norm_rows(*rows: str | Row) -> Callable[[nn.Module], Sequence[Row] | str]:
    """The rows, or the reason why not: each child called norm... must be one that the ops know.

    A name alone is the one norm of an adaLN layer, whose site is the layer itself.
    """

    def found(module: nn.Module) -> Sequence[Row] | str:
        result = []
        for row in rows:
            name, op = row if isinstance(row, tuple) else (row, "adaln")
            child = getattr(module, name, None)
            if "norm" in name and norm_of(child) is None:
                return (
                    f"its {name} is a {type(child).__name__}, which the fused norm does not replace"
                )
            result.append((name if isinstance(row, tuple) else "", op))
        return result

    return found


@adapts("AdaLayerNormZero", "7dde3fd90697", kind="adaln", rows=norm_rows("norm"), covers=("norm",))
def ada_layer_norm_zero(
    fused: Fused,
    self: Any,
    x: Tensor,
    timestep: Any = None,
    class_labels: Any = None,
    hidden_dtype: Any = None,
    emb: Any = None,
) -> Any:
    if self.emb is not None:
        emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
    emb = self.linear(self.silu(emb))
    if not keeps_dtype(x, emb):
        return NotImplemented
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = emb.chunk(6, dim=1)
    return fused.adaln(self.norm, x, shift, scale), gate, shift_mlp, scale_mlp, gate_mlp


@adapts(
    "AdaLayerNormZeroSingle", "3f0808610908", kind="adaln", rows=norm_rows("norm"), covers=("norm",)
)
def ada_layer_norm_zero_single(fused: Fused, self: Any, x: Tensor, emb: Any = None) -> Any:
    shift, scale, gate = self.linear(self.silu(emb)).chunk(3, dim=1)
    if not keeps_dtype(x, shift):
        return NotImplemented
    return fused.adaln(self.norm, x, shift, scale), gate


@adapts(
    "AdaLayerNormContinuous", "98e1fd5ac357", kind="adaln", rows=norm_rows("norm"), covers=("norm",)
)
def ada_layer_norm_continuous(
    fused: Fused, self: Any, x: Tensor, conditioning_embedding: Tensor
) -> Any:
    emb = self.linear(self.silu(conditioning_embedding).to(x.dtype))
    if not keeps_dtype(x, emb):
        return NotImplemented
    scale, shift = emb.chunk(2, dim=1)  # scale first, unlike the others
    return fused.adaln(self.norm, x, shift, scale)


def ada_layer_norm_rows(module: Any) -> Sequence[Row] | str:
    if module.chunk_dim != 1:
        return "its modulation is not a row a sample"
    return norm_rows("norm")(module)


@adapts("AdaLayerNorm", "38863becb00f", kind="adaln", rows=ada_layer_norm_rows, covers=("norm",))
def ada_layer_norm(
    fused: Fused, self: Any, x: Tensor, timestep: Any = None, temb: Any = None
) -> Any:
    if self.emb is not None:
        temb = self.emb(timestep)
    temb = self.linear(self.silu(temb))
    if not keeps_dtype(x, temb) or x.dim() != 3:
        return NotImplemented
    shift, scale = temb.chunk(2, dim=1)
    return fused.adaln(self.norm, x, shift, scale)


@adapts(
    "SD35AdaLayerNormZeroX", "2e14fc1cc904", kind="adaln", rows=norm_rows("norm"), covers=("norm",)
)
def sd35_ada_layer_norm_zero_x(
    fused: Fused, self: Any, hidden_states: Tensor, emb: Any = None
) -> Any:
    emb = self.linear(self.silu(emb))
    if not keeps_dtype(hidden_states, emb):
        return NotImplemented
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp, shift2, scale2, gate2 = emb.chunk(9, dim=1)
    y, y2 = fused.adaln(
        self.norm, hidden_states, shift, scale, shift2=shift2, scale2=scale2
    )  # two outputs of one norm
    return y, gate, shift_mlp, scale_mlp, gate_mlp, y2, gate2


@adapts(
    "CogView3PlusAdaLayerNormZeroTextImage",
    "3ac78ab7149d",
    kind="adaln",
    rows=norm_rows(("norm_x", "adaln"), ("norm_c", "adaln")),
    covers=("norm_x", "norm_c"),
)
def cogview3_plus_norm(fused: Fused, self: Any, x: Tensor, context: Tensor, emb: Any = None) -> Any:
    emb = self.linear(self.silu(emb))
    if not (keeps_dtype(x, emb) and keeps_dtype(context, emb)):
        return NotImplemented
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp, *text = emb.chunk(12, dim=1)
    c_shift, c_scale, c_gate, c_shift_mlp, c_scale_mlp, c_gate_mlp = text
    x = fused.adaln(self.norm_x, x, shift, scale)
    context = fused.adaln(self.norm_c, context, c_shift, c_scale)
    return (x, gate, shift_mlp, scale_mlp, gate_mlp, context, c_gate, c_shift_mlp, c_scale_mlp,
            c_gate_mlp)  # fmt: skip


@adapts("LuminaRMSNormZero", "a4f07c1d61b5", kind="adaln", rows=norm_rows("norm"), covers=("norm",))
def lumina_rms_norm_zero(fused: Fused, self: Any, x: Tensor, emb: Any = None) -> Any:
    scale, gate, scale_mlp, gate_mlp = self.linear(self.silu(emb)).chunk(4, dim=1)
    if not keeps_dtype(x, scale, self.norm.weight):
        return NotImplemented
    return fused.adaln(self.norm, x, None, scale), gate, scale_mlp, gate_mlp


@adapts(
    "LuminaLayerNormContinuous",
    "6c4f5f0c8aac",
    kind="adaln",
    rows=norm_rows("norm"),
    covers=("norm",),
)
def lumina_layer_norm_continuous(
    fused: Fused, self: Any, x: Tensor, conditioning_embedding: Tensor
) -> Any:
    scale = self.linear_1(self.silu(conditioning_embedding).to(x.dtype))
    if not keeps_dtype(x, scale):
        return NotImplemented
    x = fused.adaln(self.norm, x, None, scale)
    return x if self.linear_2 is None else self.linear_2(x)


def qk_rows(*names: str) -> Callable[[nn.Module], Sequence[Row] | str]:
    """One qk_norm_rope a pair of norms; the first pair may be missing where the rotation remains."""

    def found(attn: nn.Module) -> Sequence[Row] | str:
        norms = [getattr(attn, name, None) for name in names]
        present = [norm for norm in norms if norm is not None]
        if not present:
            return "it has no QK-norm"
        if not all(norm_of(norm) for norm in present):
            return "its norms are not those that the fused norm replaces"
        return [("", "qk_norm_rope")] * (len(present) // 2)

    return found


def itself_rows(module: nn.Module) -> Sequence[Row] | str:
    if norm_of(module) is None:
        return "it is not over the last dimension alone"
    return [("", "adaln")]


@adapts("RMSNorm", "ae09ce5e224c", "8486c8e24319", "62c6e606eee3", kind="adaln", rows=itself_rows)
def rms_norm(fused: Fused, self: Any, hidden_states: Tensor) -> Any:
    """Diffusers' RMSNorm and MochiRMSNorm, four kernels each; torch's own RMSNorm is one already."""
    weight = self.weight
    if weight is not None and weight.dtype != hidden_states.dtype:
        return NotImplemented
    return norm_alone(fused, self, hidden_states)


@adapts("FP32LayerNorm", "d790ecdfc2e2", kind="adaln", rows=itself_rows)
def fp32_layer_norm(fused: Fused, self: Any, inputs: Tensor) -> Any:
    """Without the casts to float32 and back."""
    return norm_alone(fused, self, inputs, rounding="once")


def norm_alone(fused: Fused, norm: Any, x: Tensor, **more: Any) -> Any:
    if x.dim() == 4:  # heads, as [B, N, H, D] or as a view [B, H, N, D]
        turned = x.stride(1) < x.stride(2)
        heads = x.transpose(1, 2) if turned else x
        y = fused.adaln(norm, heads.flatten(0, 1), **more).unflatten(0, heads.shape[:2])
        return y.transpose(1, 2) if turned else y
    return fused.adaln(norm, x, **more) if x.dim() in (2, 3) else NotImplemented


def feed_forward_rows(module: Any) -> Sequence[Row] | str:
    act = _activation(module)
    if act is None:
        return f"its activation {type(module.net[0]).__name__} is not one that the op has"
    return [("", "gelu_bias" if act.startswith("gelu") else "swiglu")]


def _activation(module: Any) -> str | None:
    first = module.net[0]
    if type(first).__name__ == "GELU" and first.approximate in ("tanh", "none"):
        return f"gelu-{first.approximate}"
    silu = type(first).__name__ == "SwiGLU" and type(first.activation) is nn.SiLU
    return "swiglu-second" if silu else None


@adapts("FeedForward", "f2758cc90b58", kind="feed_forward", rows=feed_forward_rows)
def feed_forward(fused: Fused, self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Linear, activation, dropout, Linear; the pre-activation alone is kept for the backward."""
    first, dropout, linear, *rest = self.net
    act = _activation(self)
    if args or kwargs or act is None or type(dropout) is not nn.Dropout:
        return NotImplemented
    skipped = (first, dropout, *(part for part in first.children() if part is not first.proj))
    if (self.training and dropout.p) or any(is_hooked(part) for part in skipped):
        return NotImplemented
    hidden_states = fused.feed_forward(first.proj(hidden_states), act, linear)
    for module in rest:
        hidden_states = module(hidden_states)
    return hidden_states


def patch_embed(fused: Fused, self: Any, video: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A convolution over whole patches. The result has the tokens' memory order, so that the
    flatten and transpose that follow in every model are views."""
    patch = self.kernel_size
    size = video.shape[2:]
    if args or kwargs or video.dim() != 2 + len(patch) or video.dtype != self.weight.dtype:
        return NotImplemented
    if any(length % p for length, p in zip(size, patch, strict=True)):
        return NotImplemented
    if autocast_dtype(video) not in (None, video.dtype) and video.dtype != torch.float32:
        return NotImplemented  # two roundings where the convolution has one
    tokens = ops.patch_embed(video, self.weight, self.bias)
    grid = [length // p for length, p in zip(size, patch, strict=True)]
    tokens = tokens.to(autocast_dtype(video) or video.dtype)
    return tokens.transpose(1, 2).unflatten(2, grid)


_PATCH_EMBED = Adapter(
    "Conv2d and Conv3d over patches",
    "patch_embed",
    patch_embed,
    lambda module: [("", "patch_embed")],
    replay=False,
)


def patch_convolution(module: Any) -> Adapter | None:
    if type(module) not in (nn.Conv2d, nn.Conv3d):
        return None
    whole = module.stride == module.kernel_size and max(module.kernel_size) > 1
    plain = module.groups == 1 and not any(module.padding) and set(module.dilation) == {1}
    return _PATCH_EMBED if whole and plain else None


STRUCTURES.append(patch_convolution)
