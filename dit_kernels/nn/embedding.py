"""What becomes tokens or conditioning: patches, timesteps, labels, prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._guards import detect_fake_mode

from dit_kernels import debug, ops
from dit_kernels.nn.checks import check_heads, check_least
from dit_kernels.ops.arguments import triple


class PatchEmbed3D(nn.Module):
    """Video to tokens; the parameters of a Conv3d whose stride is its kernel, under `proj`.

    Args:
        patch_size: (pt, ph, pw).
        in_channels: Cin.
        hidden_size: C.
        bias: of the projection.
    """

    def __init__(
        self,
        patch_size: Sequence[int] = (1, 2, 2),
        in_channels: int = 4,
        hidden_size: int = 1152,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.patch_size = patch = triple("PatchEmbed3D", "patch_size", patch_size)
        self.proj = nn.Conv3d(in_channels, hidden_size, patch, patch, bias=bias)
        self.register_load_state_dict_pre_hook(_image_weight_to_video)

    def forward(self, video: Tensor, pos_embed: Tensor | None = None) -> Tensor:
        """video [B, Cin, F, Y, X] -> tokens [B, N, C]"""
        return ops.patch_embed(video, self.proj.weight, self.proj.bias, pos_embed=pos_embed)


class TimestepEmbedder(nn.Module):
    """Sinusoidal embedding of the time, through a two-layer MLP.

        f_i = max_period^(-i / (F / 2 - frequency_shift));  [cos(t f), sin(t f)] -> mlp

    Args:
        hidden_size: C.
        frequency_embedding_size: F, even.
        max_period: of the slowest wave.
        frequency_shift: 0 as the original DiT, 1 as diffusers' DiTTransformer2DModel.
    """

    def __init__(
        self,
        hidden_size: int,
        frequency_embedding_size: int = 256,
        max_period: float = 10000.0,
        frequency_shift: float = 0.0,
    ) -> None:
        super().__init__()
        if not frequency_shift < frequency_embedding_size // 2:
            raise ValueError(
                "TimestepEmbedder: frequency_shift must be less than half of frequency_embedding_size;"
                f" got {frequency_shift} and {frequency_embedding_size}"
            )
        self.frequency_embedding_size = frequency_embedding_size
        self.max_period, self.frequency_shift = max_period, frequency_shift
        self.mlp = nn.Sequential(
            nn.Linear(frequency_embedding_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )  # fmt: skip

    def forward(self, t: Tensor) -> Tensor:
        """t [...], any real numbers -> [..., C]"""
        wave = timestep_embedding(
            t, self.frequency_embedding_size, self.max_period, self.frequency_shift
        )
        return self.mlp(wave.to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """Class labels to vectors; in training some are replaced by the class of no label.

    Args:
        num_classes: labels are 0 to num_classes - 1; num_classes itself means no label.
        hidden_size: C.
        dropout_prob: how often a label is dropped in training, for classifier-free guidance.
    """

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float) -> None:
        super().__init__()
        check_least("LabelEmbedder", "num_classes", num_classes)
        if not 0 <= dropout_prob <= 1:
            raise ValueError(f"LabelEmbedder: dropout_prob must lie in [0, 1]; got {dropout_prob}")
        self.num_classes, self.dropout_prob = num_classes, dropout_prob
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)

    def forward(self, labels: Tensor) -> Tensor:
        """int64 [B] -> [B, C]

        Labels out of range are found on a CPU, and elsewhere under DIT_KERNELS_DEBUG=1.
        """
        if labels.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"LabelEmbedder: class labels must be int64; got {labels.dtype}")
        if debug() or _readable(labels):
            low, high = (int(labels.min()), int(labels.max())) if labels.numel() else (0, 0)
            last = self.embedding_table.num_embeddings - 1
            if low < 0 or high > last:
                raise ValueError(
                    f"LabelEmbedder: class labels must lie in [0, {last}];"
                    f" got values from {low} to {high}"
                )
        if self.training and self.dropout_prob > 0:
            drop = torch.rand(labels.shape, device=labels.device) < self.dropout_prob
            labels = torch.where(drop, self.num_classes, labels)
        return self.embedding_table(labels)


class TimestepLabelEmbeddings(nn.Module):
    """diffusers' CombinedTimestepLabelEmbeddings, under its parameter names."""

    def __init__(
        self, num_classes: int, embedding_dim: int, class_dropout_prob: float = 0.1
    ) -> None:
        super().__init__()
        self.timestep_embedder = nn.Module()
        self.timestep_embedder.linear_1 = nn.Linear(256, embedding_dim)
        self.timestep_embedder.linear_2 = nn.Linear(embedding_dim, embedding_dim)
        self.class_embedder = LabelEmbedder(num_classes, embedding_dim, class_dropout_prob)

    def forward(
        self, timestep: Tensor, labels: Tensor, hidden_dtype: torch.dtype | None = None
    ) -> Tensor:
        mlp: Any = self.timestep_embedder
        wave = timestep_embedding(timestep, 256, frequency_shift=1.0)
        temb = mlp.linear_2(F.silu(mlp.linear_1(wave.to(hidden_dtype or wave.dtype))))
        return temb + self.class_embedder(labels)


class AttentionPool(nn.Module):
    """Prompt tokens to one vector: a learned query attends to them.

        pooled = proj(attention(query, kv(text)))

    Args:
        text_dim: width of the prompt's tokens.
        hidden_size: C of the result.
        num_heads: heads of the attention.
    """

    def __init__(self, text_dim: int, hidden_size: int, num_heads: int = 8) -> None:
        super().__init__()
        check_heads("AttentionPool", "hidden_size", hidden_size, num_heads)
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.randn(hidden_size) / hidden_size**0.5)
        self.norm = nn.LayerNorm(text_dim)
        self.kv = nn.Linear(text_dim, 2 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, text: Tensor, text_mask: Tensor | None = None) -> Tensor:
        """text [B, L, text_dim], text_mask bool [B, L], True for real tokens -> [B, C]

        A prompt of no tokens at all gives proj's bias.
        """
        text, text_mask = real_first(text, text_mask)
        norm = self.norm
        y = ops.adaln(text, weight=norm.weight, bias=norm.bias, eps=norm.eps)
        k, v = self.kv(y).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        q = self.query.to(k.dtype).view(1, 1, self.num_heads, -1).expand(text.shape[0], -1, -1, -1)
        out = ops.attention3d(q, k, v, kv_lens=prefix_lengths(text_mask))
        return self.proj(out.flatten(1))  # type: ignore[union-attr]


def timestep_embedding(
    t: Tensor, dim: int, max_period: float = 10000.0, frequency_shift: float = 0.0
) -> Tensor:
    """[cos(t f_i), sin(t f_i)] for t [...], float32 [..., dim]; see `TimestepEmbedder`."""
    half = dim // 2
    exponent = -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device)
    angle = t[..., None].float() * torch.exp(exponent / (half - frequency_shift))
    wave = torch.cat((angle.cos(), angle.sin()), dim=-1)
    return F.pad(wave, (0, 1)) if dim % 2 else wave


def real_first(text: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Prompts [B, L, C] with their real tokens first, in the order they had, and the mask of that.

    Attention to a prompt knows no positions: tokens behind a gap or left padding may as well stand first.
    """
    if mask is None:
        return text, None
    order = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)
    samples = torch.arange(text.shape[0], device=text.device)[:, None]
    return text[samples, order], mask[samples, order]


def prefix_lengths(mask: Tensor | None) -> Tensor | None:
    """bool [B, L], True first and then False, as `real_first` makes it -> int32 [B]"""
    return None if mask is None else mask.sum(-1, dtype=torch.int32)


def _readable(tensor: Tensor) -> bool:
    """Its values are there to look at, without waiting for a device, and not for a tracer."""
    return (
        tensor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and detect_fake_mode() is None
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def _image_weight_to_video(
    module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object
) -> None:
    """A Conv2d's weight [C, Cin, ph, pw] is that of a patch one frame long."""
    weight = state_dict.get(f"{prefix}proj.weight")
    if weight is not None and weight.dim() == 4:
        state_dict[f"{prefix}proj.weight"] = weight.unsqueeze(2)
