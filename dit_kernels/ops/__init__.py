"""The fused ops. Each is a folder: public function and checks, reference, and one file a backend."""

from dit_kernels.ops.adaln import adaln, gated_adaln, gated_residual
from dit_kernels.ops.attention3d import attention3d
from dit_kernels.ops.feed_forward import gelu_bias, swiglu
from dit_kernels.ops.final_layer import final_layer
from dit_kernels.ops.patch_embed import patch_embed
from dit_kernels.ops.qk_norm_rope import qk_norm_rope, rope_3d
from dit_kernels.ops.unpatchify import unpatchify

__all__ = [
    "adaln",
    "attention3d",
    "final_layer",
    "gated_adaln",
    "gated_residual",
    "gelu_bias",
    "patch_embed",
    "qk_norm_rope",
    "rope_3d",
    "swiglu",
    "unpatchify",
]
