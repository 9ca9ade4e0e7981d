"""Drop-in layers: parameters under the names of the plain layer each replaces, plus a call of the fused op.

| layer                             | replaces                                                   |
|-----------------------------------|------------------------------------------------------------|
| AdaLayerNorm, AdaLayerNormZero    | diffusers' layers of these names                           |
| AdaLayerNormSingle                | `scale_shift_table + temb` and its norm in PixArt, Wan, LTX |
| QKNormRoPE                        | norm_q, norm_k and the rotary embedding after them         |
| Attention3D, FeedForward          | timm's Attention and Mlp, as the original DiT uses them    |
| PatchEmbed3D                      | timm's PatchEmbed, with time                               |
| TimestepEmbedder, LabelEmbedder   | the original DiT's                                         |
| FinalLayer, DiTBlock              | the original DiT's                                         |
| AttentionPool, CrossAttention     | -                                                          |
"""

from dit_kernels.nn.attention import Attention3D, CrossAttention, QKNormRoPE
from dit_kernels.nn.block import DiTBlock, FeedForward, FinalLayer
from dit_kernels.nn.embedding import (
    AttentionPool,
    LabelEmbedder,
    PatchEmbed3D,
    TimestepEmbedder,
    timestep_embedding,
)
from dit_kernels.nn.modulation import AdaLayerNorm, AdaLayerNormSingle, AdaLayerNormZero

__all__ = [
    "AdaLayerNorm",
    "AdaLayerNormSingle",
    "AdaLayerNormZero",
    "Attention3D",
    "AttentionPool",
    "CrossAttention",
    "DiTBlock",
    "FeedForward",
    "FinalLayer",
    "LabelEmbedder",
    "PatchEmbed3D",
    "QKNormRoPE",
    "TimestepEmbedder",
    "timestep_embedding",
]
