"""Whole diffusers pipelines from small random models, unpatched and patched: `check --diffusers`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_kernels.integrations.patching import patch, unpatch


@dataclass(frozen=True)
class Comparison:
    """The latents of every step, patched against unpatched."""

    pipeline: str
    dtype: str
    replaced: int
    put_back: int
    steps: int
    difference: float  # the largest over all steps
    psnr: float  # over all steps, by the range of the unpatched latents; infinite where they are equal


def _wan(dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=16, ffn_dim=96, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    pipeline = WanPipeline(None, None, None, scheduler, transformer=_random(transformer, dtype))
    return pipeline, dict(
        height=32, width=48, num_frames=9, prompt_embeds=_embeds(1, 6, 16, dtype=dtype),
        negative_prompt_embeds=_embeds(1, 6, 16, dtype=dtype, seed=2), guidance_scale=3.0,
    )  # fmt: skip


def _cogvideox(dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel

    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=16,
        text_embed_dim=16, num_layers=2, sample_width=6, sample_height=4, sample_frames=9,
        max_text_seq_length=6, use_rotary_positional_embeddings=True,
    )  # fmt: skip
    pipeline = CogVideoXPipeline(
        None, None, None, _random(transformer, dtype), CogVideoXDDIMScheduler()
    )
    return pipeline, dict(
        height=32, width=48, num_frames=9, prompt_embeds=_embeds(1, 6, 16, dtype=dtype),
        negative_prompt_embeds=_embeds(1, 6, 16, dtype=dtype, seed=2), guidance_scale=3.0,
    )  # fmt: skip


def _ltx(dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    from diffusers import FlowMatchEulerDiscreteScheduler, LTXPipeline, LTXVideoTransformer3DModel

    transformer = LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16,
        cross_attention_dim=32, num_layers=2, caption_channels=16,
    )  # fmt: skip
    pipeline = LTXPipeline(
        FlowMatchEulerDiscreteScheduler(), None, None, None, _random(transformer, dtype)
    )
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    return pipeline, dict(
        height=64, width=96, num_frames=9, prompt_embeds=_embeds(1, 6, 16, dtype=dtype),
        prompt_attention_mask=mask, negative_prompt_embeds=_embeds(1, 6, 16, dtype=dtype, seed=2),
        negative_prompt_attention_mask=mask, guidance_scale=3.0,
    )  # fmt: skip


def _flux(dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=8,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    pipeline = FluxPipeline(
        FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, _random(transformer, dtype)
    )
    return pipeline, dict(
        height=64, width=96, prompt_embeds=_embeds(1, 6, 16, dtype=dtype),
        pooled_prompt_embeds=_embeds(1, 8, dtype=dtype),
    )  # fmt: skip


def _sd3(dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=32,
        pooled_projection_dim=8, out_channels=4, pos_embed_max_size=16, qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )  # fmt: skip
    pipeline = StableDiffusion3Pipeline(
        _random(transformer, dtype), FlowMatchEulerDiscreteScheduler(), None, None, None, None, None,
        None, None,
    )  # fmt: skip
    return pipeline, dict(
        height=64, width=96, guidance_scale=3.0, prompt_embeds=_embeds(1, 6, 16, dtype=dtype),
        negative_prompt_embeds=_embeds(1, 6, 16, dtype=dtype, seed=2),
        pooled_prompt_embeds=_embeds(1, 8, dtype=dtype),
        negative_pooled_prompt_embeds=_embeds(1, 8, dtype=dtype, seed=2),
    )  # fmt: skip


PIPELINES: dict[str, Callable[[torch.dtype], tuple[Any, dict[str, Any]]]] = {
    "Wan": _wan, "CogVideoX": _cogvideox, "LTX-Video": _ltx, "Flux": _flux, "SD3.5": _sd3,
}  # fmt: skip


def compare(
    names: tuple[str, ...] = tuple(PIPELINES),
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16),
    steps: int = 4,
) -> Iterator[Comparison]:
    """Generate with each pipeline from one seed, unpatched and patched."""
    for name in names:
        for dtype in dtypes:
            pipeline, arguments = PIPELINES[name](dtype)
            own = latents(pipeline, arguments, steps)
            report = patch(pipeline)
            fused = latents(pipeline, arguments, steps)
            unpatch(pipeline)
            error = (fused.double() - own.double()).square().mean().item()
            spread = float(own.max() - own.min())
            yield Comparison(
                name, str(dtype).removeprefix("torch."), len(report.replaced),
                sum(reason.startswith("put back") for _, reason in report.left), len(own),
                float((fused.double() - own.double()).abs().max()),
                10 * math.log10(spread**2 / error) if error else math.inf,
            )  # fmt: skip


def latents(pipeline: Any, arguments: dict[str, Any], steps: int) -> Tensor:
    """[steps, ...]: the latents after each step."""
    found: list[Tensor] = []

    def keep(pipe: Any, step: int, timestep: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        found.append(values["latents"].clone())
        return values

    pipeline.set_progress_bar_config(disable=True)
    pipeline(
        **arguments, num_inference_steps=steps, output_type="latent", callback_on_step_end=keep,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    return torch.stack(found)


def _random(model: Any, dtype: torch.dtype) -> Any:
    """All weights random, also those that training starts at zero."""
    generator = torch.Generator().manual_seed(0)
    keep = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, p in model.named_parameters():
        fan = p[0].numel() if p.dim() > 1 else 4
        value = torch.randn(p.shape, generator=generator) / fan**0.5
        value = value + ("norm" in name and p.dim() == 1)
        p.data = value.to(torch.float32 if any(word in name for word in keep) else dtype)
    return model.eval()


def _embeds(*shape: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
