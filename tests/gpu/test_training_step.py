"""A whole training step in a CUDA graph: forward, backward and optimiser, launched by one call."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from dit_kernels.models import DiT

MODELS = {
    "image": {"input_size": (1, 16, 16), "num_classes": 10, "class_dropout_prob": 0.0},
    "video": {
        "input_size": (4, 8, 12), "learn_sigma": False, "pos_embed": "rope", "qk_norm": "rms",
        "text_dim": 32, "text_mode": "cross", "window_size": (3, 3, 3), "window_every": 2,
    },
}  # fmt: skip


def model_and_inputs(name: str) -> tuple[DiT, dict[str, Tensor]]:
    options = MODELS[name]
    with torch.device("cuda"):
        model = DiT(hidden_size=128, depth=2, num_heads=2, **options)
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.02)
        inputs = {"x": torch.randn(3, 4, *options["input_size"]), "t": torch.rand(3) * 1000}
        if "text_dim" in options:
            inputs["text"] = torch.randn(3, 7, 32)
        else:
            inputs["y"] = torch.randint(10, (3,))
    return model, inputs


def step(model: DiT, inputs: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> Tensor:
    optimizer.zero_grad()
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(**inputs).float().square().mean()
    loss.backward()
    optimizer.step()
    return loss.detach()


@pytest.mark.parametrize("name", MODELS)
def test_replays_train_as_eager_steps_do(name):
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        model, inputs = model_and_inputs(name)
        beside = copy.deepcopy(model)
        options = {"lr": 1e-3, "fused": True, "capturable": True}
        optimizers = [torch.optim.AdamW(m.parameters(), **options) for m in (model, beside)]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # the optimiser makes its state in the first
                step(model, inputs, optimizers[0])
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = step(model, inputs, optimizers[0])
        losses = []
        for _ in range(4):
            graph.replay()
            losses.append(loss.item())
        expected = [step(beside, inputs, optimizers[1]).item() for _ in range(7)][3:]
    finally:
        torch.use_deterministic_algorithms(False)
    assert losses == expected
    assert losses[-1] < losses[0]
    for parameter, other in zip(model.parameters(), beside.parameters(), strict=True):
        assert torch.equal(parameter, other)
