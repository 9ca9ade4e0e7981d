"""A replaced forward, and how it is put under a module and taken out again.

A site replaces `forward` of one module instance. Classes, parameters, names and submodules stay
as they are, so that state_dict, LoRA, hooks and torch.compile see the model that they know. Hooks that
replace `forward` themselves (accelerate's and diffusers') stay outside: the site goes below them.
"""

from __future__ import annotations

import copy
import functools
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dit_kernels.integrations import checking
from dit_kernels.integrations.fused import Fused, is_hooked, is_site
from dit_kernels.integrations.recognition import Adapter

if TYPE_CHECKING:
    from dit_kernels.integrations.patching import PatchReport

# one check at a time: the second thread at a site waits for the verdict
_checks = threading.RLock()


class Site:
    """What one module runs in place of its forward. It is the module's attribute `_dit_kernels`."""

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
        self.serve = adapter.forward
        self.covers = tuple((name, type(child(module, name))) for name in adapter.covers(module))
        self.processor = type(getattr(module, "processor", None))
        self.active = True
        self.check = check
        self.checked: set[checking.Key] = set()

    def __deepcopy__(self, memo: dict[int, Any]) -> Site:
        copied = Site.__new__(Site)
        memo[id(self)] = copied
        copied.__dict__ |= self.__dict__
        copied.module = copy.deepcopy(self.module, memo)
        copied.original = MethodType(self.original.__func__, copied.module)
        copied.report = copy.deepcopy(self.report, memo)
        copied.checked = set(self.checked)
        return copied

    def __reduce__(self) -> Any:
        """A model that is pickled comes back unpatched."""
        return type(None), ()

    def put(self) -> bool:
        """Under the module's hooks; False where something unknown has replaced its forward."""
        slot = innermost(self.module)
        if slot is None:
            return False
        self.module.__dict__["_dit_kernels"] = self
        kind: Any = type(self.module)
        slot.set(MethodType(_entry(kind), self.module))
        return True

    def verify(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """At the first call of its form: compare with the module's own code; go back if they differ."""
        key = checking.key(args, kwargs, self.module.training)
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
                module=self.module,
                replay=self.adapter.replay,
            )
            if difference is checking.UNDECIDED:
                return
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
        """Where something else has wrapped the site since, it lets every call through from now on."""
        self.active = False
        slot = innermost(self.module)
        if slot is not None and slot.is_site:
            slot.set(None)
            del self.module.__dict__["_dit_kernels"]


def child(module: nn.Module | None, name: str) -> nn.Module | None:
    """A module below this one, by its dotted name."""
    for part in name.split("."):
        module = None if module is None else module._modules.get(part)
    return module


@functools.cache
def _entry(kind: Any) -> Callable[..., Any]:
    """The forward of patched modules of one class.

    One function for all of them, with the site in an attribute: torch.compile then takes one block's
    graph for the next. It has the name and signature of the class's own.
    """

    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        site = self._dit_kernels
        if not site.active or type(getattr(self, "processor", None)) is not site.processor:
            return site.original(*args, **kwargs)
        for name, known in site.covers:
            covered = child(self, name)
            # another module than the one that was there, or hooks: neither is called by the site
            if type(covered) is not known or is_hooked(covered):
                return site.original(*args, **kwargs)
        if not torch.compiler.is_compiling():
            if checking.running() or checking.batched():
                return site.original(*args, **kwargs)
            if site.check:
                site.verify(args, kwargs)
                if not site.active:
                    return site.original(*args, **kwargs)
        result = site.serve(site.fused, self, *args, **kwargs)
        return site.original(*args, **kwargs) if result is NotImplemented else result

    forward.is_site = True  # type: ignore[attr-defined]
    return forward


@dataclass(frozen=True)
class Slot:
    """Where the forward that runs below all hooks is kept."""

    owner: Any
    attribute: str
    own: Any  # the class's forward, bound

    @property
    def is_site(self) -> bool:
        return is_site(self.owner.__dict__.get(self.attribute))

    def set(self, forward: Any) -> None:
        """None: the class's own."""
        if forward is not None:
            self.owner.__dict__[self.attribute] = forward
        elif isinstance(self.owner, nn.Module) and self.attribute == "forward":
            self.owner.__dict__.pop("forward", None)
        else:
            self.owner.__dict__[self.attribute] = self.own


def innermost(module: nn.Module) -> Slot | None:
    """The slot of a module; None where its forward has been replaced in a way that is not known."""
    own = MethodType(type(module).forward, module)
    slots = [Slot(module, "forward", own)]
    if "_hf_hook" in module.__dict__ and "_old_forward" in module.__dict__:
        slots.append(Slot(module, "_old_forward", own))
    references = getattr(module.__dict__.get("_diffusers_hook"), "_fn_refs", None)
    if references:
        wrapped = getattr(references[0], "original_forward", None)
        attribute = "forward" if wrapped is None else "original_forward"
        slots.append(Slot(references[0], attribute, own))
    for slot in slots:
        if slot.is_site or slot.owner.__dict__.get(slot.attribute, own) == own:
            return slot
    return None


def sites(model: nn.Module) -> list[Site]:
    """The sites under a model."""
    found = [module.__dict__.get("_dit_kernels") for module in model.modules()]
    return [site for site in found if isinstance(site, Site)]
