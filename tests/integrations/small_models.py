"""Small random models of every family that diffusers has, and inputs for them.

Every weight is random, also those that training starts at zero (gates, last layers) or one (norms).
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro
from torch import Tensor, nn

import dit_kernels
from dit_kernels import testing
from dit_kernels.integrations import checking


@dataclass(frozen=True)
class Small:
    """A transformer class, its configuration and what it is called with."""

    kind: str
    config: dict[str, Any]
    inputs: Callable[[Callable[..., Tensor]], dict[str, Any]]
    rows: dict[str, int] = field(default_factory=dict)  # op -> calls in one forward


def build(small: Small, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = getattr(diffusers, small.kind)(**small.config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fan = parameter[0].numel() if parameter.dim() > 1 else 4
            value = torch.randn(parameter.shape, generator=generator) / max(fan, 1) ** 0.5
            parameter.copy_(value + ("norm" in name and parameter.dim() == 1))
    # not model.to: some families keep modules in float32, as from_pretrained does
    keep = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not any(word in name for word in keep):
            tensor.data = tensor.data.to(dtype)
    return model.eval()


def inputs(small: Small, dtype: torch.dtype = torch.float32, seed: int = 1) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return small.inputs(randn)


def output(model: nn.Module, given: dict[str, Any]) -> Tensor:
    out = model(**given, return_dict=False)
    if isinstance(out, tuple) and len(out) == 1:
        out = out[0]
    # video and audio; or a batch of images of different sizes
    return torch.cat([o.flatten() for o in out]) if isinstance(out, (tuple, list)) else out


def double(value: object) -> object:
    """The same inputs in float64, for the oracle."""
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.double()
    if isinstance(value, (tuple, list)):
        return type(value)(double(v) for v in value)
    return {k: double(v) for k, v in value.items()} if isinstance(value, dict) else value


def assert_patched_is_accurate(small: Small, dtype: torch.dtype, check: bool = True) -> None:
    """The patched model's result and all its gradients, by the accuracy rule."""
    model, given = build(small, dtype), inputs(small, dtype)
    oracle_model = copy.deepcopy(model).double()
    patched = copy.deepcopy(model)
    report = dit_kernels.patch(patched, check=check)
    assert Counter(op for _, op in report.replaced) == small.rows

    def run(one: torch.nn.Module, values: dict) -> dict[str, torch.Tensor]:
        out = output(one, values)
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
        out.backward(cotangent.to(out.dtype))
        grads = {name: p.grad for name, p in one.named_parameters() if p.grad is not None}
        return {"output": out.detach(), **grads}

    with checking.InFloat64():
        oracle = run(oracle_model, double(given))
    eager, actual = run(model, given), run(patched, given)
    assert actual.keys() == eager.keys() == oracle.keys()
    testing.assert_accurate(actual["output"], oracle["output"], eager["output"])

    # what is left of a gradient that is zero by its formula has no scale
    scales = {name: float(grad.abs().max()) for name, grad in oracle.items()}
    compared = [name for name, scale in scales.items() if scale > 1e-12 * max(scales.values())]

    def together(of: dict[str, torch.Tensor]) -> torch.Tensor:
        """All gradients, each in parts of its largest value."""
        return torch.cat([(of[name].double() / scales[name]).flatten() for name in compared])

    sides = (together(actual), together(oracle), together(eager))
    testing.assert_accurate(*sides, "gradients", dtype=dtype)
    assert not [reason for _, reason in report.left if "put back" in reason]


def image_ids(height: int, width: int) -> Tensor:
    ids = torch.zeros(height, width, 3)
    ids[..., 1] += torch.arange(height)[:, None]
    ids[..., 2] += torch.arange(width)[None]
    return ids.flatten(0, 1)


def _ltx2(randn: Callable[..., Tensor]) -> dict[str, Any]:
    return {
        "hidden_states": randn(2, 12, 4), "audio_hidden_states": randn(2, 7, 6),
        "encoder_hidden_states": randn(2, 5, 10), "audio_encoder_hidden_states": randn(2, 5, 10),
        "timestep": torch.tensor([700.0, 20.0]), "sigma": torch.tensor([0.7, 0.02]),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
        "num_frames": 2, "height": 2, "width": 3, "audio_num_frames": 7,
    }  # fmt: skip


def _flux(randn: Callable[..., Tensor]) -> dict[str, Any]:
    return {
        "hidden_states": randn(2, 12, 4), "encoder_hidden_states": randn(2, 5, 16),
        "pooled_projections": randn(2, 8), "timestep": torch.tensor([0.7, 0.1]),
        "img_ids": image_ids(3, 4), "txt_ids": torch.zeros(5, 3),
    }  # fmt: skip


def _wan(randn: Callable[..., Tensor]) -> dict[str, Any]:
    return {
        "hidden_states": randn(2, 4, 3, 6, 4), "timestep": torch.tensor([700.0, 20.0]),
        "encoder_hidden_states": randn(2, 5, 16),
    }  # fmt: skip


_WAN = dict(
    num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
    freq_dim=8, ffn_dim=40, num_layers=2, rope_max_seq_len=16,
)  # fmt: skip
_SD3 = dict(
    sample_size=8, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8,
    num_attention_heads=3, joint_attention_dim=16, caption_projection_dim=24,
    pooled_projection_dim=12, out_channels=4, pos_embed_max_size=6,
)  # fmt: skip
_COG = dict(
    num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
    text_embed_dim=10, num_layers=2, sample_width=8, sample_height=6, sample_frames=5,
    max_text_seq_length=5, patch_size=2,
)  # fmt: skip


def _sd3(randn: Callable[..., Tensor]) -> dict[str, Any]:
    return {
        "hidden_states": randn(2, 4, 8, 6), "encoder_hidden_states": randn(2, 5, 16),
        "pooled_projections": randn(2, 12), "timestep": torch.tensor([700.0, 20.0]),
    }  # fmt: skip


def _cogvideox(randn: Callable[..., Tensor]) -> dict[str, Any]:
    return {
        "hidden_states": randn(2, 2, 4, 6, 8), "encoder_hidden_states": randn(2, 5, 10),
        "timestep": torch.tensor([700, 20]),
    }  # fmt: skip


def _cogvideox_rope(randn: Callable[..., Tensor]) -> dict[str, Any]:
    angles = torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
    doubled = angles.repeat_interleave(2, dim=1)
    return _cogvideox(randn) | {"image_rotary_emb": (doubled.cos(), doubled.sin())}


def _ltx(randn: Callable[..., Tensor]) -> dict[str, Any]:
    return {
        "hidden_states": randn(2, 12, 4), "encoder_hidden_states": randn(2, 5, 10),
        "timestep": torch.tensor([700, 20]), "encoder_attention_mask": torch.tensor(
            [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
        "num_frames": 2, "height": 2, "width": 3,
    }  # fmt: skip


def _hunyuan_video(randn: Callable[..., Tensor]) -> dict[str, Any]:
    return {
        "hidden_states": randn(2, 4, 2, 4, 6), "timestep": torch.tensor([700, 20]),
        "encoder_hidden_states": randn(2, 5, 10), "pooled_projections": randn(2, 8),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
        "guidance": torch.tensor([6000.0, 6000.0]),
    }  # fmt: skip


def _dit(randn: Callable[..., Tensor]) -> dict[str, Any]:
    return {
        "hidden_states": randn(2, 4, 8, 8), "timestep": torch.tensor([700, 20]),
        "class_labels": torch.tensor([1, 3]),
    }  # fmt: skip


def _pixart(randn: Callable[..., Tensor]) -> dict[str, Any]:
    return {
        "hidden_states": randn(2, 4, 8, 8), "timestep": torch.tensor([700, 20]),
        "encoder_hidden_states": randn(2, 5, 24),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }  # fmt: skip


def _qwen(randn: Callable[..., Tensor]) -> dict[str, Any]:
    return {
        "hidden_states": randn(2, 12, 4), "encoder_hidden_states": randn(2, 5, 10),
        "encoder_hidden_states_mask": torch.tensor([[True] * 5, [True] * 3 + [False] * 2]),
        "timestep": torch.tensor([0.7, 0.1]), "img_shapes": [[(1, 3, 4)]] * 2,
    }  # fmt: skip


def _mochi(randn: Callable[..., Tensor]) -> dict[str, Any]:
    return {
        "hidden_states": randn(2, 4, 2, 4, 6), "encoder_hidden_states": randn(2, 5, 16),
        "timestep": torch.tensor([700, 20]),
        "encoder_attention_mask": torch.tensor([[True] * 5, [True] * 3 + [False] * 2]),
    }  # fmt: skip


def _lumina2(randn: Callable[..., Tensor]) -> dict[str, Any]:
    return {
        "hidden_states": randn(2, 4, 8, 6), "timestep": torch.tensor([0.7, 0.1]),
        "encoder_hidden_states": randn(2, 5, 10),
        "encoder_attention_mask": torch.tensor([[True] * 5, [True] * 3 + [False] * 2]),
    }  # fmt: skip


def _z_image(randn: Callable[..., Tensor]) -> dict[str, Any]:
    return {
        "x": [randn(4, 1, 8, 6), randn(4, 1, 4, 6)], "t": torch.tensor([0.7, 0.1]),
        "cap_feats": [randn(5, 10), randn(3, 10)],
    }  # fmt: skip


def _flux2(randn: Callable[..., Tensor]) -> dict[str, Any]:
    ids = torch.zeros(12, 4)
    ids[:, 1:3] = image_ids(3, 4)[:, 1:]
    text = torch.zeros(5, 4)
    text[:, 3] = torch.arange(5)
    return {
        "hidden_states": randn(2, 12, 4), "encoder_hidden_states": randn(2, 5, 10),
        "timestep": torch.tensor([0.7, 0.1]), "guidance": torch.tensor([4.0, 4.0]),
        "img_ids": ids, "txt_ids": text,
    }  # fmt: skip


def _cosmos(randn: Callable[..., Tensor]) -> dict[str, Any]:
    return {
        "hidden_states": randn(1, 4, 2, 6, 4), "timestep": torch.tensor([0.7]),
        "encoder_hidden_states": randn(1, 5, 10), "fps": 24,
    }  # fmt: skip


def _hunyuan15(randn: Callable[..., Tensor]) -> dict[str, Any]:
    return {
        "hidden_states": randn(1, 4, 2, 3, 4), "timestep": 700 + randn(1),
        "encoder_hidden_states": randn(1, 5, 10), "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 0]]),
        "encoder_hidden_states_2": randn(1, 3, 12),
        "encoder_attention_mask_2": torch.tensor([[1, 1, 0]]), "image_embeds": randn(1, 2, 14),
    }  # fmt: skip


def _sana_video(randn: Callable[..., Tensor]) -> dict[str, Any]:
    return {
        "hidden_states": randn(2, 4, 2, 4, 6), "timestep": torch.tensor([700, 20]),
        "encoder_hidden_states": randn(2, 5, 10),
    }  # fmt: skip


def _kandinsky5(randn: Callable[..., Tensor]) -> dict[str, Any]:
    return {
        "hidden_states": randn(1, 2, 4, 6, 4), "encoder_hidden_states": randn(1, 5, 10),
        "timestep": torch.tensor([700.0]), "pooled_projections": randn(1, 8),
        "visual_rope_pos": [torch.arange(2), torch.arange(2), torch.arange(3)],
        "text_rope_pos": torch.arange(5),
    }  # fmt: skip


def _allegro(randn: Callable[..., Tensor]) -> dict[str, Any]:
    *freqs, grid_t, grid_h, grid_w = get_3d_rotary_pos_embed_allegro(
        embed_dim=24, crops_coords=((0, 0), (2, 3)), grid_size=(2, 3), temporal_size=2,
        interpolation_scale=(1.0, 1.0, 1.0), device=torch.device("cpu"),
    )  # fmt: skip
    positions = torch.cartesian_prod(grid_t, grid_h, grid_w).long().T[:, None]  # [3, 1, N]
    return {
        "hidden_states": randn(2, 4, 2, 4, 6), "encoder_hidden_states": randn(2, 1, 5, 10),
        "timestep": torch.tensor([700, 20]), "attention_mask": torch.ones(2, 2, 4, 6),
        "encoder_attention_mask": torch.tensor([[[1, 1, 1, 1, 1]], [[1, 1, 1, 0, 0]]]).to(
            randn(1).dtype),
        "image_rotary_emb": (tuple(freqs), tuple(positions)),
    }  # fmt: skip


_HUNYUAN: dict[str, Any] = dict(
    in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1,
    num_single_layers=1, num_refiner_layers=1, patch_size=2, patch_size_t=1, guidance_embeds=True,
    text_embed_dim=10, pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
)  # fmt: skip
_HUNYUAN_ROWS = dict(
    adaln=4, gated_adaln=3, gated_residual=4, gelu_bias=2, patch_embed=1, qk_norm_rope=3
)

_LTX2: dict[str, Any] = dict(
    in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, cross_attention_dim=24,
    audio_in_channels=6, audio_out_channels=6, audio_num_attention_heads=2, audio_attention_head_dim=8,
    audio_cross_attention_dim=16, num_layers=1, caption_channels=10,
)  # fmt: skip
_LTX2_ROWS = dict(adaln=2, gated_adaln=6, gated_residual=2, gelu_bias=2, qk_norm_rope=12)

SMALL: dict[str, Small] = {
    "wan": Small("WanTransformer3DModel", _WAN, _wan, dict(
        adaln=3, gated_adaln=4, gated_residual=2, qk_norm_rope=6, gelu_bias=2, patch_embed=1)),
    "wan-tokens": Small("WanTransformer3DModel", _WAN, lambda randn: _wan(randn) | {
        "timestep": torch.linspace(0, 900, 36).view(2, 18)}, dict(
        adaln=3, gated_adaln=4, gated_residual=2, qk_norm_rope=6, gelu_bias=2, patch_embed=1)),
    "wan-image": Small(
        "WanTransformer3DModel", _WAN | dict(image_dim=10, added_kv_proj_dim=24, num_layers=1),
        lambda randn: _wan(randn) | {
            "encoder_hidden_states": randn(2, 512, 16), "encoder_hidden_states_image": randn(2, 3, 10)},
        dict(adaln=4, gated_adaln=2, gated_residual=1, qk_norm_rope=4, gelu_bias=2, patch_embed=1)),
    "flux": Small("FluxTransformer2DModel", dict(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=8, axes_dims_rope=(4, 6, 6)), _flux, dict(
        adaln=4, gated_adaln=2, gated_residual=3, qk_norm_rope=3, gelu_bias=2)),
    "sd3": Small("SD3Transformer2DModel", _SD3, _sd3, dict(
        adaln=7, gated_adaln=5, gated_residual=5, gelu_bias=5, patch_embed=1)),
    "sd3.5": Small("SD3Transformer2DModel", _SD3 | dict(
        qk_norm="rms_norm", dual_attention_layers=(0,)), _sd3, dict(
        adaln=7, gated_adaln=5, gated_residual=6, qk_norm_rope=7, gelu_bias=5, patch_embed=1)),
    "cogvideox": Small("CogVideoXTransformer3DModel", _COG, _cogvideox, dict(
        adaln=5, gated_adaln=4, gated_residual=4, qk_norm_rope=2, gelu_bias=2, patch_embed=1)),
    "cogvideox-5b": Small(
        "CogVideoXTransformer3DModel", _COG | dict(use_rotary_positional_embeddings=True),
        _cogvideox_rope, dict(
        adaln=5, gated_adaln=4, gated_residual=4, qk_norm_rope=2, gelu_bias=2, patch_embed=1)),
    "ltx": Small("LTXVideoTransformer3DModel", dict(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        num_layers=2, caption_channels=10), _ltx, dict(adaln=2, gated_adaln=2, gated_residual=4, gelu_bias=2, qk_norm_rope=4)),
    "ltx2": Small("LTX2VideoTransformer3DModel", _LTX2, _ltx2, _LTX2_ROWS),
    "ltx2.3": Small("LTX2VideoTransformer3DModel", _LTX2 | dict(
        rope_type="split", gated_attn=True, audio_gated_attn=True, cross_attn_mod=True,
        audio_cross_attn_mod=True), _ltx2, _LTX2_ROWS),
    "hunyuan-video": Small(
        "HunyuanVideoTransformer3DModel", _HUNYUAN, _hunyuan_video, _HUNYUAN_ROWS),
    "hunyuan-video-i2v": Small("HunyuanVideoTransformer3DModel", _HUNYUAN | dict(
        image_condition_type="token_replace"), _hunyuan_video, _HUNYUAN_ROWS),
    "dit": Small("DiTTransformer2DModel", dict(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=2,
        attention_bias=True, sample_size=8, patch_size=2, activation_fn="gelu-approximate",
        num_embeds_ada_norm=10, norm_type="ada_norm_zero", norm_elementwise_affine=False), _dit, dict(adaln=2, gated_adaln=2, gated_residual=2, gelu_bias=2, patch_embed=1)),
    "pixart": Small("PixArtTransformer2DModel", dict(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=2,
        cross_attention_dim=24, sample_size=8, patch_size=2, caption_channels=24,
        use_additional_conditions=False), _pixart, dict(adaln=2, gated_adaln=2, gated_residual=4, gelu_bias=2, patch_embed=1)),
    "qwen-image": Small("QwenImageTransformer2DModel", dict(
        in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=10, axes_dims_rope=(4, 6, 6)), _qwen, dict(adaln=6, gated_adaln=4, gated_residual=4, gelu_bias=4, qk_norm_rope=4)),
    "mochi": Small("MochiTransformer3DModel", dict(
        patch_size=2, num_attention_heads=2, attention_head_dim=12, num_layers=2,
        pooled_projection_dim=16, in_channels=4, text_embed_dim=16, time_embed_dim=8,
        max_sequence_length=5), _mochi, dict(adaln=5, gated_adaln=3, gated_residual=3, patch_embed=1, qk_norm_rope=4, swiglu=3)),
    "lumina2": Small("Lumina2Transformer2DModel", dict(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=32, num_layers=2, num_refiner_layers=1,
        num_attention_heads=4, num_kv_heads=2, multiple_of=8, cap_feat_dim=10,
        axes_dim_rope=(4, 2, 2), axes_lens=(32, 32, 32)), _lumina2, dict(adaln=6, gated_adaln=4, gated_residual=4, qk_norm_rope=4, swiglu=4)),
    "z-image": Small("ZImageTransformer2DModel", dict(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=10,
        axes_dims=[4, 6, 6], axes_lens=[64, 32, 32]), _z_image, dict(adaln=5, gated_adaln=4, gated_residual=4, qk_norm_rope=4, swiglu=4)),
    "flux2": Small("Flux2Transformer2DModel", dict(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=10, timestep_guidance_channels=8, axes_dims_rope=(4, 4, 4, 4)), _flux2, dict(adaln=4, gated_adaln=2, gated_residual=3, qk_norm_rope=3, swiglu=3)),
    "cosmos": Small("CosmosTransformer3DModel", dict(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2,
        mlp_ratio=2, text_embed_dim=10, adaln_lora_dim=4, max_size=(4, 8, 8), patch_size=(1, 2, 2),
        rope_scale=(2.0, 1.0, 1.0), extra_pos_embed_type="learnable",
        concat_padding_mask=False), _cosmos, dict(adaln=4, gated_adaln=4, gated_residual=2, gelu_bias=2, qk_norm_rope=4)),
    "hunyuan-video-1.5": Small("HunyuanVideo15Transformer3DModel", dict(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1,
        num_refiner_layers=1, patch_size=1, patch_size_t=1, text_embed_dim=10, text_embed_2_dim=12,
        image_embed_dim=14, rope_axes_dim=(2, 4, 4)), _hunyuan15, dict(adaln=3, gated_adaln=3, gated_residual=3, gelu_bias=2, qk_norm_rope=2)),
    "sana-video": Small("SanaVideoTransformer3DModel", dict(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24,
        caption_channels=10, mlp_ratio=2.0, sample_size=8), _sana_video, dict(adaln=7, gated_adaln=2, gated_residual=4, patch_embed=1, qk_norm_rope=4)),
    "kandinsky-5": Small("Kandinsky5Transformer3DModel", dict(
        in_visual_dim=4, in_text_dim=10, in_text_dim2=8, time_dim=12, out_visual_dim=4, model_dim=24,
        ff_dim=48, num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 4, 4)), _kandinsky5, dict(adaln=3, gated_adaln=5, gated_residual=3, gelu_bias=3, qk_norm_rope=5)),
    "allegro": Small("AllegroTransformer3DModel", dict(
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, num_layers=2,
        cross_attention_dim=48, sample_height=4, sample_width=6, sample_frames=2, caption_channels=10),
        _allegro, dict(adaln=2, gated_adaln=2, gated_residual=4, gelu_bias=2, patch_embed=1, qk_norm_rope=2)),
}  # fmt: skip
