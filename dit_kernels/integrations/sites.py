"""A replaced forward, and how it is put under a module and taken out again.

A site is an attribute `forward` of one module instance. Classes, parameters, names and submodules stay
as they are, so that state_dict, LoRA, hooks and torch.compile see the model that they know. Hooks that
replace `forward` themselves (accelerate's and diffusers') stay outside: the site goes below them.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dit_kernels.integrations import checking
from dit_kernels.integrations.fused import Fused, is_hooked
from dit_kernels.integrations.recognition import Adapter

if TYPE_CHECKING:
    from dit_kernels.integrations.patching import PatchReport

# one check at a time: the second thread at a site waits for the verdict
_checks = threading.RLock()


class Site:
    """What runs in place of one module's forward."""

    is_site = True

    def __init__(
        self,
        module: nn.Module,
        name: str,
        adapter: Adapter,
        rows: list[tuple[str, str]],
        fused: Fused,
        report: PatchReport,
        check: bool,
    ) -> None:
        self.module, self.name, self.adapter, self.fused = module, name, adapter, fused
        self.rows, self.report = rows, report
        self.original = MethodType(type(module).forward, module)
        self.__wrapped__ = self.original  # inspect.signature sees the module's own
        self.covers, self.serve = adapter.covers, adapter.forward
        self.processor = type(getattr(module, "processor", None))
        self.active = True
        self.check = check
        self.checked: set[checking.Key] = set()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module
        if not self.active or type(getattr(module, "processor", None)) is not self.processor:
            return self.original(*args, **kwargs)
        for name in self.covers:
            child: Any = module
            for part in name.split("."):
                child = None if child is None else child._modules.get(part)
            if child is not None and is_hooked(child):
                return self.original(*args, **kwargs)
        if not torch.compiler.is_compiling():
            if checking.running():
                return self.original(*args, **kwargs)
            if self.check:
                self.verify(args, kwargs)
                if not self.active:
                    return self.original(*args, **kwargs)
        result = self.serve(self.fused, module, *args, **kwargs)
        return self.original(*args, **kwargs) if result is NotImplemented else result

    def verify(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """At the first call with these dtypes: compare with the module's own code; go back if they differ."""
        key = checking.key(args, kwargs)
        if key in self.checked or checking.impossible(args, kwargs):
            return
        with _checks:
            if key in self.checked or not self.active:
                return
            difference = checking.difference(
                self.original,
                lambda *a, **k: self.serve(self.fused, self.module, *a, **k),
                args,
                kwargs,
                replay=self.adapter.replay,
            )
            if difference is None:
                self.checked.add(key)
                return
            self.active = False
            self.report.put_back(self.rows, difference)
            warnings.warn(
                f"dit_kernels.patch: {self.name or 'the model'} ({self.adapter.name}) is put back:"
                f" {difference}",
                RuntimeWarning,
                stacklevel=4,
            )

    def remove(self) -> None:
        """Take the site out; where something else has wrapped it since, it lets every call through."""
        self.active = False
        slot = innermost(self.module)
        if slot is not None and slot[0] is self:
            slot[1](None)


def innermost(module: nn.Module) -> tuple[Any, Callable[[Any], None]] | None:
    """The forward that runs below all hooks (None: the class's own), and how to set it; None if unknown."""

    def set_attribute(value: Any) -> None:
        if value is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = value

    own = MethodType(type(module).forward, module)
    outer = module.__dict__.get("forward")
    if outer is None or isinstance(outer, Site):
        return outer, set_attribute
    references = getattr(module.__dict__.get("_diffusers_hook"), "_fn_refs", None)
    places: list[tuple[Any, str]] = []
    if "_hf_hook" in module.__dict__ and "_old_forward" in module.__dict__:
        places.append((module, "_old_forward"))
    if references:
        first = references[0]
        original = getattr(first, "original_forward", None)
        places.append((first, "forward" if original is None else "original_forward"))
    for owner, attribute in places:
        found = owner.__dict__[attribute]
        if found == own or isinstance(found, Site):

            def set_reference(value: Any, owner: Any = owner, attribute: str = attribute) -> None:
                owner.__dict__[attribute] = own if value is None else value

            return (found if isinstance(found, Site) else None), set_reference
    return None


def sites(model: nn.Module) -> list[Site]:
    """The sites under a model."""
    found = []
    for module in model.modules():
        slot = innermost(module)
        if slot is not None and isinstance(slot[0], Site):
            found.append(slot[0])
    return found
