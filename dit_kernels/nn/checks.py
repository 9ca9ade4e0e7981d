"""Checks that several layers make."""

from __future__ import annotations

NORMS = ("layer", "rms")


def check_heads(layer: str, name: str, dim: int, num_heads: int) -> None:
    check_least(layer, "num_heads", num_heads)
    if dim % num_heads:
        raise ValueError(f"{layer}: num_heads must divide {name}; got {num_heads} and {dim}")


def check_least(layer: str, name: str, number: int) -> None:
    if number < 1:
        raise ValueError(f"{layer}: {name} must be at least 1; got {number}")
