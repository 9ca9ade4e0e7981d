"""Fused kernels for Diffusion Transformers, with their layers, models and text-to-video job."""

import os


def debug() -> bool:
    """DIT_KERNELS_DEBUG=1: values that live on the device (indices, lengths) are checked too."""
    return os.environ.get("DIT_KERNELS_DEBUG") == "1"


from dit_kernels import models, nn, ops  # noqa: E402
from dit_kernels.backends import use_backend  # noqa: E402

__all__ = ["models", "nn", "ops", "use_backend"]
