"""Fused ops under models that people already have: `patch(model)` and `unpatch(model)`.

patching.py      walks a model, decides what is replaced, and reports it
sites.py         a replaced forward: how it is put under a module and taken out again
checking.py      the first call of a site against the module's own code in float64
recognition.py   a module's code is recognised by its fingerprint; the table of adapters
fused.py         the fused ops as the adapters call them
shared.py        pieces of many models: adaLN layers, norms, feed-forwards, patch embeddings
<family>.py      the blocks and attention processors of one model family
"""

from dit_kernels.integrations.patching import PatchReport, patch, unpatch

__all__ = ["PatchReport", "patch", "unpatch"]
