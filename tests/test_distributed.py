"""The DiT under torch's own parallelism: two processes train to the weights of one, and save what one can load."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
import torch.distributed
import torch.distributed.checkpoint as dcp
import torch.multiprocessing
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from dit_kernels.models import DiT


def model() -> DiT:
    """With weights that are nowhere zero, so that every layer has a gradient."""
    torch.manual_seed(0)
    net = DiT(
        input_size=(2, 8, 8), hidden_size=32, depth=2, num_heads=2, num_classes=10, learn_sigma=False,
        qk_norm="rms", window_size=(2, 3, 3),
    )  # fmt: skip
    for weight in net.parameters():
        if not weight.any():
            torch.nn.init.normal_(weight, std=0.02)
    return net.eval()  # no dropped labels


def trained(net: torch.nn.Module, own: slice) -> None:
    """Three steps on this process's part of a batch of four."""
    torch.manual_seed(1)
    x, target = torch.randn(2, 4, 4, 2, 8, 8)
    t, y = torch.rand(4), torch.arange(4)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        (net(x[own], t[own], y=y[own]) - target[own]).square().mean().backward()
        optimizer.step()


def process(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    own = slice(2 * rank, 2 * rank + 2)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    replicated = model()
    trained(DistributedDataParallel(replicated), own)
    if rank == 0:
        torch.save(replicated.state_dict(), folder / "replicated.pt")
    sharded = model()
    for block in sharded.blocks:
        fully_shard(block)
    fully_shard(sharded)
    trained(sharded, own)
    dcp.save(get_model_state_dict(sharded), checkpoint_id=folder / "sharded")
    torch.distributed.barrier()
    # all is written; at the interpreter's own exit a thread of gloo is now and then still there, and aborts it
    os._exit(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("distributed")
    torch.multiprocessing.spawn(process, (made,), nprocs=2)
    return made


@pytest.mark.parametrize("kind", ["replicated", "sharded"])
def test_two_processes_train_to_the_weights_of_one(folder, kind):
    """But for the order of float32 sums: each weight within a thousandth of how far the training moved it."""
    one = model()
    before = copy.deepcopy(one.state_dict())
    trained(one, slice(None))
    if kind == "replicated":
        found: dict[str, Tensor] = torch.load(folder / "replicated.pt")
    else:
        found = {name: torch.empty_like(value) for name, value in before.items()}
        dcp.load(found, checkpoint_id=folder / "sharded")
    for name, value in one.state_dict().items():
        moved = (value - before[name]).abs().max()
        assert (found[name] - value).abs().max() <= 1e-3 * moved, name
        assert moved > 0 or not name.endswith(("weight", "bias")), name
