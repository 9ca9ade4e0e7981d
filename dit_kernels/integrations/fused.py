"""The fused ops as the adapters call them: a norm module and modulation in, the families' forms out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_kernels import ops
from dit_kernels.ops.arguments import autocast_dtype
from dit_kernels.ops.feed_forward import activated_linear

try:  # only the adapters of diffusers' models need it
    from diffusers.models.attention_dispatch import dispatch_attention_fn
except ImportError:
    dispatch_attention_fn = None  # type: ignore[assignment]

_NORMS = {"LayerNorm": "layer", "FP32LayerNorm": "layer", "RMSNorm": "rms", "MochiRMSNorm": "rms"}


def norm_of(module: nn.Module | None) -> dict[str, Any] | None:
    """A norm module over the last dimension as arguments of `ops.adaln`; None if it is anything else."""
    if module is None or type(module).__name__ not in _NORMS:
        return None
    if type(module).__module__ not in (
        "torch.nn.modules.normalization",
        "diffusers.models.normalization",
    ):
        return None
    size = getattr(module, "normalized_shape", getattr(module, "dim", ()))
    if len(size) != 1:
        return None
    eps = module.eps
    return {
        "norm": _NORMS[type(module).__name__],
        "weight": module.weight,
        "bias": getattr(module, "bias", None),
        "eps": torch.finfo(torch.float32).eps if eps is None else eps,
    }


def rows(modulation: Tensor | None, x: Tensor, row_index: Tensor | None = None) -> Tensor | None:
    """Modulation as the ops take it: [B, 1, C] is a row a sample, and one sample's row is every sample's."""
    if modulation is None or row_index is not None:
        return modulation
    if modulation.dim() == 3 and modulation.shape[1] == 1:
        modulation = modulation[:, 0]
    if modulation.shape[0] == 1 and x.shape[0] > 1:
        modulation = modulation.expand(x.shape[0], *modulation.shape[1:])
    return modulation


def keeps_dtype(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the module's own formula of x and modulation or weights gives x's dtype, as the ops do."""
    if autocast_dtype(x) is not None and x.dtype != torch.float32:
        return False  # autocast makes norms float32
    return all(o is None or torch.promote_types(x.dtype, o.dtype) == x.dtype for o in others)


def fits(x: Tensor, weight: Tensor | None) -> bool:
    """Whether q or k may be normalised by the op; under autocast attention rounds it in any case."""
    return weight is None or weight.dtype == x.dtype or autocast_dtype(x) is not None


def normed_dtype(x: Tensor, norm: Any) -> torch.dtype:
    """What the module's own norm makes of x; under autocast a float32 weight makes it float32."""
    weight = getattr(norm, "weight", None)
    return x.dtype if weight is None else torch.promote_types(x.dtype, weight.dtype)


@dataclass(frozen=True)
class Fused:
    """The ops with the numerics that `patch` was asked for."""

    rounding: str = "eager"

    def _fit(self, more: dict[str, Any], x: Tensor) -> None:
        """The second modulation, of the second output."""
        for name in ("shift2", "scale2"):
            if name in more:
                more[name] = rows(more[name], x, more.get("row_index"))

    def adaln(
        self,
        norm: nn.Module,
        x: Tensor,
        shift: Tensor | None = None,
        scale: Tensor | None = None,
        **more: Any,
    ) -> Any:
        """norm(x) * (1 + scale) + shift"""
        more.setdefault("rounding", self.rounding)
        self._fit(more, x)
        index = more.get("row_index")
        shift, scale = rows(shift, x, index), rows(scale, x, index)
        return ops.adaln(x, shift, scale, **(norm_of(norm) or {}), **more)

    def gated_adaln(
        self,
        norm: nn.Module,
        residual: Tensor,
        branch: Tensor,
        gate: Tensor | None,
        shift: Tensor | None = None,
        scale: Tensor | None = None,
        **more: Any,
    ) -> Any:
        """residual = residual + gate * branch; (residual, norm(residual) * (1 + scale) + shift)"""
        more.setdefault("rounding", self.rounding)
        self._fit(more, residual)
        index = more.get("row_index")
        gate, shift, scale = (rows(m, residual, index) for m in (gate, shift, scale))
        return ops.gated_adaln(
            residual, branch, gate, shift, scale, **(norm_of(norm) or {}), **more
        )

    def gated_residual(
        self, residual: Tensor, branch: Tensor, gate: Tensor | None, **more: Any
    ) -> Tensor:
        """residual + gate * branch"""
        more.setdefault("rounding", self.rounding)
        gate = rows(gate, residual, more.get("row_index"))
        return ops.gated_residual(residual, branch, gate, **more)

    def qk(
        self,
        q: Tensor,
        k: Tensor | None,
        norm_q: nn.Module | None,
        norm_k: nn.Module | None,
        rotation: Sequence[Tensor] | None = None,
        **more: Any,
    ) -> tuple[Tensor, Tensor]:
        """Norm and rotation of q and k [B, N, H, D]"""
        own = norm_of(norm_q)
        cos, sin = rotation or (None, None)
        if cos is not None and sin is not None and q.dtype != torch.float64:
            # some models make their angles in float64, which no kernel reads
            cos, sin = (t.float() if t.dtype == torch.float64 else t for t in (cos, sin))
        arguments = {"norm": None} if own is None else {"norm": own["norm"], "eps": own["eps"]}
        if own is not None:
            arguments |= {"q_weight": own["weight"], "q_bias": own["bias"]}
        if own is not None and k is not None:
            arguments |= {"k_weight": norm_k.weight, "k_bias": getattr(norm_k, "bias", None)}  # type: ignore[union-attr]
        more.setdefault("rounding", self.rounding)
        return ops.qk_norm_rope(q, k, cos=cos, sin=sin, **arguments, **more)  # type: ignore[return-value]

    def feed_forward(self, x: Tensor, act: str, linear: Any) -> Tensor:
        """linear(act(x)); a plain Linear keeps only x for the backward."""
        if is_plain_linear(linear) and torch.is_grad_enabled():
            return activated_linear(x, linear.weight, linear.bias, act)
        return linear(self.activation(x, act))

    def activation(self, x: Tensor, act: str) -> Tensor:
        kind, _, option = act.partition("-")
        return (
            ops.gelu_bias(x, approximate=option) if kind == "gelu" else ops.swiglu(x, gate=option)
        )


def is_site(forward: Any) -> bool:
    """Whether a module's `forward` is what `patch` put there. (A hook copies a function's attributes.)"""
    return isinstance(forward, MethodType) and getattr(forward.__func__, "is_site", False)


def has_own_forward(module: nn.Module) -> bool:
    """Whether the module's forward is its class's or a site's."""
    forward = module.__dict__.get("forward")
    if forward is None or is_site(forward):
        return True
    # what accelerate, diffusers and pickle leave behind once their hooks are gone
    return isinstance(forward, MethodType) and forward.__func__ is type(module).forward


def is_hooked(module: nn.Module | None) -> bool:
    """Whether calling the module does more than its class's forward or a site's."""
    return module is not None and bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or not has_own_forward(module)
    )


def is_plain_linear(module: nn.Module) -> bool:
    """A Linear whose weight can be read directly: not quantised, wrapped, sharded, hooked or offloaded."""
    return (
        type(module) is nn.Linear
        and type(module.weight) in (nn.Parameter, Tensor)
        and not is_hooked(module)
    )


def attend(
    processor: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **more: Any
) -> Tensor:
    """Attention of [B, N, H, D] as diffusers computes it, through the backend that the user has set."""
    more.setdefault("parallel_config", getattr(processor, "_parallel_config", None))
    return dispatch_attention_fn(
        q, k, v, attn_mask=mask, backend=getattr(processor, "_attention_backend", None), **more
    )


def mask_of_heads(attn: Any, mask: Tensor | None, context: Tensor) -> Tensor | None:
    """The mask that diffusers' processors make of what they are given, [B, H, 1 or N, keys]."""
    if mask is None:
        return None
    batch, length, _ = context.shape
    mask = attn.prepare_attention_mask(mask, length, batch)
    return mask.view(batch, attn.heads, -1, mask.shape[-1])


def attend_plainly(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Attention of [B, N, H, D] by torch's function, for processors that call it themselves."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale).transpose(1, 2)
