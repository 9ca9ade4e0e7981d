"""facebookresearch/DiT, and models whose blocks are made of the same parts.

Their code comes in copies with small differences, so it is not known by a fingerprint. A module with
these parts is recognised by what it computes: its own forward, around parts that stand in for its
layers, on small random float64 input, has to give the formula that the adapter serves.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dit_kernels.integrations.fused import Fused, keeps_dtype
from dit_kernels.integrations.recognition import STRUCTURES, Adapter
from dit_kernels.ops.arguments import autocast_dtype

WIDTH = 8  # of the input that a module is tried on


class Stand(nn.Module):
    """Stands in for a layer: a fixed function, of one argument, that no other stand computes."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(WIDTH, width, generator=generator, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) @ self.weight


def computes(
    module: nn.Module, stands: dict[str, nn.Module], formula: Callable[..., Tensor], *args: Tensor
) -> bool:
    """Whether the module's forward, with stands for its layers, is the formula. The module stays as it is."""
    parameters = inspect.signature(type(module).forward).parameters
    if len(parameters) != 1 + len(args):
        return False
    trial = object.__new__(type(module))
    trial.__dict__ = {**module.__dict__, "_modules": {**module._modules, **stands}}
    try:
        with torch.no_grad():
            found = type(module).forward(trial, *args)
    except Exception:  # whatever another model's code may raise on input that it isn't for
        return False
    wanted = formula(*args)
    return (
        isinstance(found, Tensor)
        and found.shape == wanted.shape
        and torch.allclose(found, wanted, rtol=1e-9, atol=1e-9)
    )


def trial_input(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def plain_norm(module: Any) -> nn.LayerNorm | None:
    """The same norm at the width that modules are tried at; None if it is no LayerNorm without affine."""
    if type(module) is not nn.LayerNorm or module.weight is not None:
        return None
    return nn.LayerNorm(WIDTH, eps=module.eps, elementwise_affine=False)


def has(module: nn.Module, *names: str) -> bool:
    return all(isinstance(module._modules.get(name), nn.Module) for name in names)


def block(fused: Fused, self: Any, x: Tensor, c: Tensor) -> Any:
    modulation = self.adaLN_modulation(c)
    if x.dim() != 3 or not keeps_dtype(x, modulation):
        return NotImplemented
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=1)
    branch = self.attn(fused.adaln(self.norm1, x, shift, scale))
    x, y = fused.gated_adaln(self.norm2, x, branch, gate, shift_mlp, scale_mlp)
    return fused.gated_residual(x, self.mlp(y), gate_mlp)


_BLOCK = Adapter(
    "a block of norm1, attn, norm2, mlp, adaLN_modulation",
    "adaln",
    block,
    lambda module: [("norm1", "adaln"), ("norm2", "gated_adaln"), ("mlp", "gated_residual")],
    lambda module: ("norm1", "norm2"),
)


def plain_block(module: nn.Module) -> Adapter | None:
    if not has(module, "norm1", "attn", "norm2", "mlp", "adaLN_modulation"):
        return None
    norms = plain_norm(module.norm1), plain_norm(module.norm2)
    attn, mlp, modulation = Stand(WIDTH, 1), Stand(WIDTH, 2), Stand(6 * WIDTH, 3)

    def formula(x: Tensor, c: Tensor) -> Tensor:
        rows = modulation(c)[:, None].chunk(6, dim=-1)
        x = x + rows[2] * attn(norms[0](x) * (1 + rows[1]) + rows[0])  # type: ignore[misc]
        return x + rows[5] * mlp(norms[1](x) * (1 + rows[4]) + rows[3])  # type: ignore[misc]

    if None in norms:
        return None
    stands = {"norm1": norms[0], "norm2": norms[1], "attn": attn, "mlp": mlp}
    stands["adaLN_modulation"] = modulation
    found = computes(module, stands, formula, trial_input(2, 3, WIDTH), trial_input(2, WIDTH))  # type: ignore[arg-type]
    return _BLOCK if found else None


def final_layer(fused: Fused, self: Any, x: Tensor, c: Tensor) -> Any:
    modulation = self.adaLN_modulation(c)
    if x.dim() != 3 or not keeps_dtype(x, modulation):
        return NotImplemented
    return self.linear(fused.adaln(self.norm_final, x, *modulation.chunk(2, dim=1)))


_FINAL_LAYER = Adapter(
    "a last layer of norm_final, linear, adaLN_modulation",
    "adaln",
    final_layer,
    lambda module: [("norm_final", "adaln")],
    lambda module: ("norm_final",),
)


def plain_final_layer(module: nn.Module) -> Adapter | None:
    if not has(module, "norm_final", "linear", "adaLN_modulation"):
        return None
    norm = plain_norm(module.norm_final)
    linear, modulation = Stand(WIDTH, 1), Stand(2 * WIDTH, 2)

    def formula(x: Tensor, c: Tensor) -> Tensor:
        shift, scale = modulation(c)[:, None].chunk(2, dim=-1)
        return linear(norm(x) * (1 + scale) + shift)  # type: ignore[misc]

    if norm is None:
        return None
    stands = {"norm_final": norm, "linear": linear, "adaLN_modulation": modulation}
    found = computes(module, stands, formula, trial_input(2, 3, WIDTH), trial_input(2, WIDTH))
    return _FINAL_LAYER if found else None


def mlp(fused: Fused, self: Any, x: Tensor) -> Any:
    dropouts = [part for part in self.children() if isinstance(part, nn.Dropout)]
    if self.training and any(part.p for part in dropouts):
        return NotImplemented
    x = self.fc1(x)
    if autocast_dtype(x) not in (None, x.dtype):
        return NotImplemented
    return fused.feed_forward(x, f"gelu-{self.act.approximate}", self.fc2)


_MLP = Adapter(
    "an MLP of fc1, act, fc2",
    "feed_forward",
    mlp,
    lambda module: [("", "gelu_bias")],
    lambda module: [name for name, _ in module.named_children() if name not in ("fc1", "fc2")],
)


def plain_mlp(module: nn.Module) -> Adapter | None:
    if not has(module, "fc1", "act", "fc2") or type(module.act) is not nn.GELU:
        return None
    first, act, second = Stand(WIDTH, 1), module.act, Stand(WIDTH, 2)
    stands: dict[str, nn.Module] = {"fc1": first, "fc2": second}
    # a dropout is left out of the trial; anything else in between is part of it
    for name, part in module.named_children():
        if isinstance(part, nn.Dropout):
            stands[name] = nn.Identity()
    found = computes(module, stands, lambda x: second(act(first(x))), trial_input(2, 3, WIDTH))
    return _MLP if found else None


STRUCTURES.extend((plain_block, plain_final_layer, plain_mlp))
