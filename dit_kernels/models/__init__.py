from dit_kernels.models.dit import DiT, DiT_models
from dit_kernels.models.weights import from_diffusers, load, load_original, save

__all__ = ["DiT", "DiT_models", "from_diffusers", "load", "load_original", "save"]
