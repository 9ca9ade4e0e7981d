"""Checkpoints as safetensors: written whole or not at all, with the settings in the metadata."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save


def write_checkpoint(
    path: str | Path, tensors: dict[str, torch.Tensor], settings: dict[str, Any]
) -> None:
    """Write tensors and settings so that a reader, or a crash, sees the old file or the new one.

    Args:
        path: the file; its folder is made if missing.
        tensors: name to tensor, any device and strides.
        settings: JSON values, kept in the file's metadata.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        # One entry: safetensors writes several in an order that changes from run to run.
        metadata={"settings": json.dumps(settings)},
    )
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary file to write; it takes the place of `path` when it is whole and on the disk."""
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        yield Path(name)
        with open(name, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp makes files that only their owner can read
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself is only safe once the folder is on the disk
    finally:
        os.close(folder)


def remove_unfinished(path: str | Path) -> None:
    """Remove the temporary files of `atomic_path` that nobody is left to finish."""
    path = Path(path)
    for temporary in path.parent.glob(f".{path.name}.*"):
        temporary.unlink()


def read_checkpoint(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors and settings that `write_checkpoint` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not such a checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            settings = json.loads((file.metadata() or {}).get("settings", "{}"))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a checkpoint of this package: {error}") from error
    return tensors, settings
