"""A patched model sharded by FSDP2, quantised by torchao, and loaded from a single file."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import diffusers
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from small_models import SMALL, build, inputs, output
from torch import Tensor, nn

import dit_kernels
from dit_kernels import testing

WAN, LTX = SMALL["wan"], SMALL["ltx"]
RANKS = 2


def loss_and_gradients(model: nn.Module, given: dict) -> tuple[Tensor, dict[str, Tensor]]:
    loss = output(model, given).square().mean()
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), {
        name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        for name, grad in grads.items()
    }


def sharded(rank: int, order: str, folder: str) -> None:
    """One rank of a run: both see the same batch, so that its mean is the unsharded gradient."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    model, given = build(WAN), inputs(WAN)
    want = loss_and_gradients(copy.deepcopy(model), given)
    if order == "patched first":
        report = dit_kernels.patch(model)
    mesh = init_device_mesh("cpu", (RANKS,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if order == "sharded first":
        report = dit_kernels.patch(model)
    assert Counter(op for _, op in report.replaced) == WAN.rows
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="dit_kernels.patch")
        loss, grads = loss_and_gradients(model, given)
    if rank == 0:
        torch.save((want, (loss, grads)), f"{folder}/results.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("order", ["patched first", "sharded first"])
def test_fsdp2(order: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(sharded, (order, folder), nprocs=RANKS)
        (want, want_grads), (loss, grads) = torch.load(f"{folder}/results.pt")
    assert grads.keys() == want_grads.keys()
    testing.assert_accurate(loss, want.double(), want, dtype=torch.float16)
    for name, grad in grads.items():
        scale = want_grads[name].abs().max()
        if scale > 0:
            eager = want_grads[name] / scale
            testing.assert_accurate(grad / scale, eager.double(), eager, name, dtype=torch.float16)


def test_torchao() -> None:
    # not among this repository's packages: diffusers imports it wherever it is, which takes seconds
    # and prints warnings. `make versions` fetches it for this test.
    quantization = pytest.importorskip("torchao.quantization")
    model, given = build(WAN, torch.bfloat16), inputs(WAN, torch.bfloat16)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    kind = type(model.blocks[0].ffn.net[2].weight)
    assert kind is not nn.Parameter
    report = dit_kernels.patch(model)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("error", message="dit_kernels.patch")
        got = output(model, given)
        assert type(model.blocks[0].ffn.net[2].weight) is kind
        dit_kernels.unpatch(model)
        assert torch.equal(got, output(model, given))
    assert Counter(op for _, op in report.replaced) == WAN.rows


def test_from_single_file(tmp_path: Path) -> None:
    model, given = build(LTX), inputs(LTX)
    model.save_config(tmp_path)
    dit_kernels.patch(model)
    save_file(model.state_dict(), tmp_path / "one.safetensors")
    loaded = diffusers.LTXVideoTransformer3DModel.from_single_file(
        tmp_path / "one.safetensors", config=str(tmp_path), torch_dtype=torch.float32
    )
    report = dit_kernels.patch(loaded)
    assert Counter(op for _, op in report.replaced) == LTX.rows
    with torch.no_grad():
        assert torch.equal(output(loaded, given), output(model, given))
