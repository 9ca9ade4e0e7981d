"""A module is recognised by the code that it runs: its forward, or its attention processor.

An adapter re-expresses one function of a model's source with fused ops. It is used only where the
function that the module would run has the fingerprint that the adapter names. A release that changes
the function, or a subclass that overrides it, is left alone; a copy of it under another name is served.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

Row = tuple[str, str]  # (name of the place below the module, op)


@dataclass(frozen=True)
class Adapter:
    """How one function is expressed with fused ops.

    Args:
        name: of the class whose function it re-expresses, for people and for reports.
        kind: the word in `patch(ops=...)` that chooses it.
        forward: (fused, module, *the function's arguments) -> its result, or NotImplemented to let the
            module's own code serve this call. For an attention processor the module is the attention.
        rows: module -> the op calls that one forward makes, or the sentence why it is left.
        covers: module -> children, by dotted name, whose own forward is not called. Where one has hooks, the
            module's own code runs.
        helpers: module-level functions that the function calls and the adapter re-expresses, with
            their fingerprints.
        replay: False where the function's matrix products themselves are replaced.
    """

    name: str
    kind: str
    forward: Callable[..., Any]
    rows: Callable[[nn.Module], Sequence[Row] | str]
    covers: Callable[[Any], Sequence[str]] = lambda module: ()
    helpers: dict[str, tuple[str, ...]] = field(default_factory=dict)
    replay: bool = True


FORWARDS: dict[str, Adapter] = {}  # fingerprint of a module's forward -> adapter
PROCESSORS: dict[str, Adapter] = {}  # fingerprint of an attention processor's __call__ -> adapter
STRUCTURES: list[Callable[[nn.Module], Adapter | None]] = []  # recognised by their parts


def adapts(
    name: str,
    *fingerprints: str,
    kind: str,
    rows: Callable[[Any], Sequence[Row] | str],
    covers: Sequence[str] | Callable[[Any], Sequence[str]] = (),
    helpers: dict[str, tuple[str, ...]] | None = None,
    processor: bool = False,
    replay: bool = True,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: the function serves in place of those with the given fingerprints."""

    def register(forward: Callable[..., Any]) -> Callable[..., Any]:
        covered = covers if callable(covers) else lambda module: covers
        adapter = Adapter(name, kind, forward, rows, covered, helpers or {}, replay)
        table = PROCESSORS if processor else FORWARDS
        table.update(dict.fromkeys(fingerprints, adapter))
        return forward

    return register


@functools.cache
def fingerprint(function: Callable[..., Any]) -> str:
    """Twelve hex digits of the function's code without comments, docstring, decorators and annotations.

    "" where there is no source.
    """
    try:
        source = inspect.getsource(inspect.unwrap(function))
        tree = _Bare().visit(ast.parse(textwrap.dedent(source)))
    except (OSError, TypeError, SyntaxError):
        return ""
    return hashlib.sha256(ast.unparse(ast.fix_missing_locations(tree)).encode()).hexdigest()[:12]


class _Bare(ast.NodeTransformer):
    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        self.generic_visit(node)
        node.decorator_list, node.returns = [], None
        first = node.body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            node.body = node.body[1:] or [ast.Pass()]
        return node

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        self.generic_visit(node)
        if node.value is None:
            return None
        return ast.Assign([node.target], node.value)


def forward_of(module: nn.Module) -> Adapter | None:
    """The adapter for a module's forward, by fingerprint or by structure."""
    found = _adapter(FORWARDS, type(module).forward)
    for structure in STRUCTURES:
        found = found or structure(module)
    return found


def processor_of(module: nn.Module) -> Adapter | None:
    """The adapter for a module's attention processor."""
    return _adapter(PROCESSORS, processor_call(module.processor))


def processor_call(processor: Any) -> Any:
    """The function that a call of the processor runs."""
    kind = type(processor)
    return kind.forward if isinstance(processor, nn.Module) else kind.__call__


def _adapter(table: dict[str, Adapter], function: Any) -> Adapter | None:
    found = table.get(fingerprint(function))
    if found is None:
        return None
    scope = getattr(inspect.unwrap(function), "__globals__", {})
    same = all(fingerprint(scope.get(name)) in known for name, known in found.helpers.items())
    return found if same else None
