"""Tiles that were measured to be faster than the defaults on this GPU, kept on disk.

No call is ever tuned: a call takes what is on disk for its shape class, else the default, which needs no
tuning. `python -m benchmarks.tune` measures the few candidates of each class and writes the user's own file;
those of the committed results come with the package. A class is what a kernel is compiled for (channels, head
dim, form) and never a number of tokens.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import triton

from dit_kernels.ops import triton_launch

Tiles = TypeVar("Tiles", bound=NamedTuple)
Key = tuple[Hashable, ...]

FORMAT = 2
# a file a GPU, which `make report` copies from the committed results
SHIPPED = Path(__file__).parent.parent / "tuned"
# kernel -> the candidates of a class, from its key and default
CANDIDATES: dict[str, Callable[[Key, Any], list[Any]]] = {}
# set by the tuner: what to try now, and where to note what calls asked for
trying: dict[tuple[str, str], Any] = {}
asked: dict[tuple[str, str], tuple[Key, Any]] | None = None


def choose(kernel: str, key: Key, default: Tiles) -> Tiles:
    """The tiles for a class: on trial, else tuned for this GPU, else the default."""
    name = _name(key)
    if asked is not None:
        asked.setdefault((kernel, name), (key, default))
    found = trying.get((kernel, name)) or tuned().get(kernel, {}).get(name)
    return default if found is None else type(default)(*found)


@contextlib.contextmanager
def noted() -> Iterator[dict[tuple[str, str], tuple[Key, Any]]]:
    """What calls inside ask for: (kernel, class) -> (its key, its default)."""
    global asked
    triton_launch.Plans.clear()
    asked = {}
    try:
        yield asked
    finally:
        asked = None


@contextlib.contextmanager
def tried(kernel: str, name: str, tiles: Any) -> Iterator[None]:
    """Calls inside take these tiles for a class."""
    trying[kernel, name] = tiles
    triton_launch.Plans.clear()
    try:
        yield
    finally:
        del trying[kernel, name]
        triton_launch.Plans.clear()


def _name(key: Key) -> str:
    return " ".join(map(str, key))


@functools.cache
def tuned() -> dict[str, dict[str, list[Any]]]:
    """kernel -> class -> tiles, of this GPU, this source and this Triton; the user's own before those that ship."""
    if not torch.cuda.is_available():
        return {}
    found = load(shipped(torch.cuda.get_device_name()), version())
    for kernel, classes in load(file(), version()).items():
        found.setdefault(kernel, {}).update(classes)
    return found


def shipped(gpu: str) -> Path:
    return SHIPPED / f"{gpu.replace(' ', '-')}.json"


def file() -> Path:
    """DIT_KERNELS_TUNED, or a file of the GPU's name in the user's cache."""
    given = os.environ.get("DIT_KERNELS_TUNED")
    if given:
        return Path(given)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "dit_kernels" / f"{torch.cuda.get_device_name().replace(' ', '-')}.json"


def version() -> dict[str, Any]:
    """What a tuned file must have been made with."""
    return {
        "format": FORMAT,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "triton": ".".join(triton.__version__.split(".")[:2]),
        "sources": sources(),
    }


@functools.cache
def sources() -> dict[str, str]:
    """op -> a hash of its kernels and of what calls them; lines that are blank or a comment don't count."""
    here = Path(__file__).parent
    found = {}
    for folder in sorted({path.parent for path in here.glob("*/triton.py")}):
        files = [here / "triton_rows.py", *sorted(folder.glob("t*.py"))]
        lines = [line.rstrip() for path in files for line in path.read_text().splitlines()]
        code = "\n".join(line for line in lines if line and not line.lstrip().startswith("#"))
        found[folder.name] = hashlib.sha256(code.encode()).hexdigest()[:16]
    return found


def load(path: Path, wanted: dict[str, Any]) -> dict[str, dict[str, list[Any]]]:
    """What a file holds of kernels that are still what they were when it was made.

    Nothing where it is missing, of another GPU, Triton or format, or, with a warning, broken.
    """
    try:
        content = json.loads(path.read_text())
        made_with, tiles = content["version"], content["tiles"]
        if any(made_with[name] != wanted[name] for name in wanted if name != "sources"):
            return {}
        for classes in tiles.values():
            for name, values in classes.items():
                if not isinstance(name, str) or not all(isinstance(v, int | list) for v in values):
                    raise ValueError(f"no tiles: {name}: {values}")
        ops = {op for op, source in wanted["sources"].items() if made_with["sources"].get(op) == source}  # fmt: skip
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(f"{path} is no file of tuned tiles and is ignored: {error!r}", stacklevel=2)
        return {}
    return {
        kernel: {name: [_tuples(v) for v in values] for name, values in classes.items()}
        for kernel, classes in tiles.items()
        if kernel.partition(".")[0] in ops
    }


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def save(path: Path, made_with: dict[str, Any], tiles: dict[str, dict[str, list[Any]]]) -> None:
    """All or nothing: another process may be reading."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{os.getpid()}")
    new.write_text(json.dumps({"version": made_with, "tiles": tiles}, indent=1) + "\n")
    new.replace(path)
