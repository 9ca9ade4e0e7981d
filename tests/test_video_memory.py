"""What can't fit in memory: the estimates are below what is really held, and not far below."""

import dataclasses
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dit_kernels.video import memory
from dit_kernels.video.model import ModelConfig, TextToVideo
from dit_kernels.video.training import Trainer, TrainingConfig

WIDE = ModelConfig(hidden_size=64, depth=2, num_heads=2, text_dim=32, text_depth=1)


class Held(TorchDispatchMode):
    """The most bytes held at a time by tensors that ops gave; what an op holds meanwhile is not seen."""

    def __init__(self):
        super().__init__()
        self.live, self.now, self.most = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.live:
                    self.live[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self.forget, storage._cdata)
        return out

    def forget(self, key):
        self.now -= self.live.pop(key)


@pytest.fixture
def asked(monkeypatch):
    """What is said to be needed at least: bytes of each check."""
    found = []
    monkeypatch.setattr(memory, "check_fits", lambda what, least, device: found.append(least))
    return found


@pytest.mark.parametrize("guided", [False, True])
def test_generation_holds_at_least_what_is_said(asked, guided):
    model = TextToVideo(WIDE).eval()
    memory.check_generation(model, 2, 8, (128, 160), guided=guided)
    x = torch.randn(4 if guided else 2, 1, 8, 128, 160)
    text, mask = model.encode_text(["a one"] * len(x))
    with torch.no_grad(), Held() as held:
        model.denoise(x, torch.tensor(0.5), text, mask)
    (least,) = asked
    assert least <= held.most <= 3 * least


def test_a_step_of_training_holds_at_least_what_is_said(asked):
    config = TrainingConfig(batch_size=4, accumulate=2, steps=1)
    trainer = Trainer(dataclasses.replace(WIDE, size=64), config)
    parameters, least, clip = asked[0], asked[1], asked[2]
    with Held() as held:
        trainer.step()
    assert least <= held.most
    assert parameters <= memory.COPIES * 4 * sum(p.numel() for p in trainer.model.parameters())
    assert clip == 4 * 8 * 64 * 64


def test_the_limit_of_a_container_counts(monkeypatch, tmp_path):
    cpu = torch.device("cpu")
    whole = memory.machine_memory(cpu)
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "LIMITS", (str(limit), str(tmp_path / "none")))
    limit.write_text("max\n")
    assert memory.machine_memory(cpu) == whole
    limit.write_text(f"{5 << 30}\n")
    memory.check_fits("2 numbers", 5 << 30, cpu)
    with pytest.raises(ValueError, match=r"^2 numbers take at least 6\.0 GiB of memory; this "):
        memory.check_fits("2 numbers", 6 << 30, cpu)
