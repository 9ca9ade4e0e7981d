"""Fused kernels for Diffusion Transformers, with their layers, models and text-to-video job."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dit_kernels import models, nn, ops, testing
    from dit_kernels.backends import use_backend
    from dit_kernels.integrations import PatchReport, patch, unpatch

__all__ = [
    "PatchReport",
    "__version__",
    "debug",
    "models",
    "nn",
    "ops",
    "patch",
    "testing",
    "unpatch",
    "use_backend",
]


def debug() -> bool:
    """DIT_KERNELS_DEBUG=1: values that live on the device (indices, lengths) are checked too."""
    return os.environ.get("DIT_KERNELS_DEBUG") == "1"


def __getattr__(name: str) -> Any:
    # torch takes seconds to import, and `dit-kernels --help` doesn't need it
    if name == "use_backend":
        return importlib.import_module("dit_kernels.backends").use_backend
    if name in ("PatchReport", "patch", "unpatch"):
        return getattr(importlib.import_module("dit_kernels.integrations"), name)
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("dit-kernels")
    if name in __all__:
        return importlib.import_module(f"dit_kernels.{name}")
    raise AttributeError(f"module 'dit_kernels' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
