"""`patch(model)` puts fused ops under an existing model, `unpatch(model)` takes them out."""

from __future__ import annotations

import importlib
import re
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from dit_kernels.integrations.fused import Fused, is_hooked, norm_of
from dit_kernels.integrations.recognition import (
    FORWARDS,
    PROCESSORS,
    Adapter,
    fingerprint,
    forward_of,
    processor_call,
    processor_of,
)
from dit_kernels.integrations.sites import Site, child, sites
from dit_kernels.ops.arguments import check_choice

KINDS = ("adaln", "qk_norm_rope", "patch_embed", "feed_forward")

# May be asked for, and is left: which attention is fastest where has not been measured yet.
LEFT_KINDS = {"attention3d": "attention3d: attention stays with the backend that the model uses"}

# a file a family; "shared" holds what many have
FAMILIES = (
    "shared", "wan", "flux", "sd3", "cogvideox", "ltx", "hunyuan_video", "pixart", "qwenimage", "mochi",
    "lumina2", "flux2", "cosmos", "sana_video", "kandinsky5", "allegro", "ltx2", "gated",
    "plain",
)  # fmt: skip


@dataclass
class PatchReport:
    """What `patch` did to a model.

    `str(report)` is a table, with the numbers in names put together.

    Args:
        model: the class of the model, or of the pipeline.
        replaced: (site, op), one for each op call that a forward makes there.
        left: (site, reason). What is replaced is here too where hooks keep it from running for now.
    """

    model: str
    replaced: list[tuple[str, str]] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)

    def put_back(self, rows: Sequence[tuple[str, str]], reason: str) -> None:
        """The check of the first call found a difference."""
        for row in rows:
            if row in self.replaced:
                self.replaced.remove(row)
                self.left.append((row[0], f"put back: {reason}"))

    def __str__(self) -> str:
        lines = [
            f"{self.model}: {len(self.replaced)} op calls replaced, {len(self.left)} places left"
        ]
        groups = [("op", self.replaced), ("left because", self.left)]
        tables = [(heading, _grouped(rows)) for heading, rows in groups if rows]
        width = max((len(site) for _, rows in tables for site, _, _ in rows), default=0)
        for heading, rows in tables:
            lines += ["", f"{'site':<{width}}  count  {heading}"]
            for site, what, count in rows:
                lines += _row(f"{site:<{width}}  {count:>5}  ", what)
        return "\n".join(lines)


def _row(start: str, what: str) -> list[str]:
    """A line of the table; a long reason goes on below, within 80 columns."""
    if len(start + what) <= 80:
        return [start + what]
    indent = len(start) if len(start) <= 40 else 4
    below = textwrap.wrap(what, 80 - indent, break_long_words=False)
    if indent == len(start):
        return [start + below[0], *(" " * indent + line for line in below[1:])]
    return [start.rstrip(), *(" " * indent + line for line in below)]


def _grouped(rows: Sequence[tuple[str, str]]) -> list[tuple[str, str, int]]:
    """Sites that differ only in a block's number, as one."""
    counts = Counter((re.sub(r"\b\d+\b", "*", site), what) for site, what in rows)
    return [(site, what, count) for (site, what), count in counts.items()]


def patch(
    model: Any,
    ops: str | Sequence[str] = KINDS,
    *,
    rounding: str = "eager",
    check: bool = True,
) -> PatchReport:
    """Put fused ops under an existing diffusion transformer, in place.

    Recognised are the blocks, attention processors and layers whose code an adapter knows, and patch
    embeddings by their structure; the rest stays as it is. Classes, parameters, names and hooks do not
    change: state_dict, LoRA, offloading and torch.compile work as before. Patching again is patching once.

    Args:
        model: a module, or a diffusers pipeline, whose transformers are patched.
        ops: what to replace, one word or several: "adaln" (norms, modulation, gates), "qk_norm_rope", "patch_embed",
            "feed_forward". "attention3d" is accepted, and left: attention stays with the model's own
            backend, as the report says of each place.
        rounding: "eager" rounds 16-bit values where the model's own code does, "once" only at the stores.
        check: compare each site with the module's own code in float64 at its first call of each form
            (dtypes and ranks of the tensors, train(), autocast), and put that back, with a warning, where
            the site is off by more than the accuracy rule allows. A first call under torch.compile is not
            checked.

    Returns:
        PatchReport: `replaced`, a list of (site, op); `left`, a list of (site, reason).

    Raises:
        ValueError: a word in `ops` or `rounding` is none of these.
        TypeError: the model is neither a module nor a pipeline with a transformer.
    """
    ops = (ops,) if isinstance(ops, str) else tuple(ops)
    for kind in ops:
        check_choice("patch", "ops", kind, (*KINDS, *LEFT_KINDS))
    check_choice("patch", "rounding", rounding, ("eager", "once"))
    roots = transformers(model)
    for name in FAMILIES:
        importlib.import_module(f"dit_kernels.integrations.{name}")
    report = PatchReport(type(model).__name__)
    for _, root in roots:  # all of them first: they may share modules
        unpatch(root)
    for name, root in roots:
        _Walk(root, name, tuple(ops), Fused(rounding), report, check).run()
        for kind, reason in LEFT_KINDS.items():
            if kind in ops:
                report.left += [(site, reason) for site in attentions(root, name)]
    return report


def unpatch(model: Any) -> None:
    """Take out what `patch` put under the model: it computes to the bit what it did before.

    Args:
        model: what `patch` was given, patched or not.

    Raises:
        TypeError: the model is neither a module nor a pipeline with a transformer.
    """
    for _, root in transformers(model):
        for site in sites(root):
            site.remove()


def attentions(root: nn.Module, prefix: str) -> list[str]:
    """The names of the modules with an attention processor."""
    return [
        ".".join(filter(None, (prefix, name)))
        for name, module in root.named_modules()
        if getattr(module, "processor", None) is not None
    ]


def transformers(model: Any) -> list[tuple[str, nn.Module]]:
    """The modules to patch, with their name in a pipeline ("" for a module itself)."""
    if isinstance(model, nn.Module):
        return [("", getattr(model, "_orig_mod", model))]  # torch.compile's wrapper
    components = getattr(model, "components", None)
    if isinstance(components, dict):
        found = [
            (name, getattr(part, "_orig_mod", part))
            for name, part in components.items()
            if isinstance(part, nn.Module) and name.startswith("transformer")
        ]
        if found:
            return found
    raise TypeError(
        "patch: model must be a torch.nn.Module, or a diffusers pipeline with a transformer;"
        f" got {type(model).__name__}"
    )


class _Walk:
    """One pass over a model's modules, parents first."""

    def __init__(
        self,
        root: nn.Module,
        name: str,
        kinds: Sequence[str],
        fused: Fused,
        report: PatchReport,
        check: bool,
    ) -> None:
        self.root, self.prefix, self.kinds = root, name, kinds
        self.fused, self.report, self.check = fused, report, check

    def run(self) -> None:
        self.visit(self.root, self.prefix)

    def visit(self, module: nn.Module, name: str) -> None:
        covered: set[str] = set()
        for adapter, reason in self.candidates(module):
            if adapter is None:
                self.report.left.append((name, reason))
                continue
            placed = self.place(module, name, adapter)
            covered |= set(adapter.covers(module)) if placed else set()
        for child_name, part in module.named_children():
            if child_name not in covered:
                self.visit(part, f"{name}.{child_name}" if name else child_name)

    def candidates(self, module: nn.Module) -> Iterator[tuple[Adapter | None, str]]:
        """The adapters of a module; or None and the reason, where it looks like a place for one."""
        if getattr(module, "processor", None) is not None:
            found = processor_of(module)
            kind = type(module.processor).__name__
            yield found, _unknown(kind, processor_call(module.processor), PROCESSORS)
            return
        found = forward_of(module)
        if found is not None:
            yield found, ""
            return
        kind = type(module).__name__
        if norm_of(module) is not None:
            yield None, "a norm alone: torch's own is one kernel, and what follows it is not known"
        elif any(kind == adapter.name for adapter in FORWARDS.values()) or (
            kind.endswith("Block") and any(norm_of(child) for child in module.children())
        ):
            yield None, _unknown(kind, type(module).forward, FORWARDS)

    def place(self, module: nn.Module, name: str, adapter: Adapter) -> bool:
        found = adapter.rows(module)
        if isinstance(found, str):
            self.report.left.append((name, found))
            return False
        rows = [(".".join(filter(None, (name, place))), op) for place, op in found]
        if adapter.kind not in self.kinds:
            self.report.left += [(site, f"{adapter.kind} is not asked for") for site, _ in rows]
            return False
        here = module.__dict__.get("_dit_kernels")
        if isinstance(here, Site) and here.report is self.report:  # it has several names
            here.rows += rows
        elif not Site(module, name, adapter, rows, self.fused, self.report, self.check).put():
            self.report.left += [
                (site, "its forward has been replaced already") for site, _ in rows
            ]
            return False
        self.report.replaced += rows
        hooked = [part for part in adapter.covers(module) if is_hooked(child(module, part))]
        if hooked:
            self.report.left.append(
                (
                    name,
                    f"its {hooked[0]} has hooks: its own code runs for as long as they are there",
                )
            )
        return True


def _unknown(kind: str, function: Any, table: dict[str, Adapter]) -> str:
    if any(kind == adapter.name for adapter in table.values()):
        return f"its code ({fingerprint(function)}) is not one that the adapter of {kind} knows"
    return f"{kind} has no adapter"
