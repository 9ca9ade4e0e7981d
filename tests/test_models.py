"""The DiT: the paper's sizes, every conditioning, packed batches, checkpointing, compiling."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dit_kernels import testing
from dit_kernels.models import DiT, DiT_models, dit

# Peebles & Xie 2023, table 4: GFLOPs (one per multiply-add) and millions of parameters at 256 x 256
PAPER = {
    "DiT-S/8": (0.36, 33), "DiT-S/4": (1.41, 33), "DiT-S/2": (6.06, 33),
    "DiT-B/8": (1.42, 131), "DiT-B/4": (5.56, 130), "DiT-B/2": (23.01, 130),
    "DiT-L/8": (5.01, 459), "DiT-L/4": (19.70, 458), "DiT-L/2": (80.71, 458),
    "DiT-XL/8": (7.39, 676), "DiT-XL/4": (29.05, 675), "DiT-XL/2": (118.64, 675),
}  # fmt: skip


def small(**options):
    """A little model whose every weight is random, the zero-initialised ones too."""
    defaults = {
        "input_size": (4, 8, 8), "patch_size": (1, 2, 2), "in_channels": 3, "hidden_size": 64, "depth": 2,
        "num_heads": 2,
    }  # fmt: skip
    model = DiT(**{**defaults, **options}).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_table(name):
    gflops, millions = PAPER[name]
    with torch.device("meta"):
        model = DiT_models[name]().eval()
        inputs = (torch.zeros(1, 4, 32, 32), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        assert model(*inputs).shape == (1, 8, 32, 32)
    ours = counter.get_total_flops() / 2e9
    # the table is rounded to two digits, and counts the few operations outside matrix products in its own way
    assert abs(ours - gflops) <= max(0.006, 3e-4 * gflops), (ours, gflops)


@pytest.mark.parametrize("name", ["video-S", "video-B", "video-L", "video-XL"])
def test_video_configurations(name):
    with torch.device("meta"):
        model = DiT_models[name]().eval()
        x, t, text = torch.zeros(1, 16, 4, 8, 8), torch.zeros(1), torch.zeros(1, 5, 1024)
    assert model(x, t, text=text).shape == x.shape


def test_any_argument_of_a_named_configuration_can_be_given():
    model = DiT_models["DiT-S/8"](depth=1, num_classes=None, input_size=(1, 64, 32))
    assert len(model.blocks) == 1
    assert model(torch.randn(1, 4, 64, 32), torch.zeros(1)).shape == (1, 8, 64, 32)


def test_the_sizes_of_an_image_as_the_original_takes_them():
    """An int for both, or (Y, X)."""
    for size, config in ((8, (1, 8, 8)), ((8, 12), (1, 8, 12)), ((1, 8, 12), (1, 8, 12))):
        model = DiT_models["DiT-S/2"](input_size=size, depth=0)
        assert model.config["input_size"] == config
    model = DiT(input_size=[8, 8], patch_size=4, hidden_size=32, depth=0, num_heads=2)
    assert model.config["patch_size"] == (1, 4, 4)
    assert model(torch.randn(1, 4, 8, 8), torch.zeros(1)).shape == (1, 8, 8, 8)


CONDITIONS = {
    "none": {},
    "class": {"num_classes": 5},
    "pooled": {"text_dim": 24},
    "cross": {"text_dim": 24, "text_mode": "cross"},
    "joint": {"text_dim": 24, "text_mode": "joint"},
}


POSITIONS = {"sincos": {}, "rope": {"pos_embed": "rope", "qk_norm": "rms"}}


WINDOWS = {"dense": {}, "window": {"window_size": (2, 3, 3), "window_every": 2}}


def conditions(kind, samples):
    if kind == "class":
        return {"y": torch.arange(samples)}
    if kind == "none":
        return {}
    return {
        "text": torch.randn(samples, 6, 24),
        "text_mask": torch.arange(6) < torch.tensor([[3], [6]]),
    }


@pytest.mark.parametrize("kind", CONDITIONS)
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("window", WINDOWS)
def test_every_condition_matters_and_padding_does_not(kind, position, window):
    model = small(**CONDITIONS[kind], **POSITIONS[position], **WINDOWS[window])
    x, t, given = torch.randn(2, 3, 4, 8, 8), torch.tensor([10.0, 500.0]), conditions(kind, 2)
    out = model(x, t, **given)
    assert out.shape == (2, 6, 4, 8, 8)
    assert not torch.allclose(model(x, t + 100, **given), out, atol=1e-3)
    if kind == "class":
        assert not torch.allclose(model(x, t, y=given["y"] + 1), out, atol=1e-3)
    if "text" in given:
        other = given["text"].clone()
        other[0, 3:] = 7.0
        close(model(x, t, text=other, text_mask=given["text_mask"]), out)
        other[0, 0] = 7.0
        assert not torch.allclose(
            model(x, t, text=other, text_mask=given["text_mask"]), out, atol=1e-3
        )


@pytest.mark.parametrize("kind", ["pooled", "cross", "joint"])
def test_a_prompts_real_tokens_may_stand_anywhere(kind):
    """Left padding and gaps: each sample is what its real tokens alone give, packed too."""
    model = small(**CONDITIONS[kind], **POSITIONS["rope"])
    x, t, text = torch.randn(2, 3, 4, 8, 8), torch.tensor([10.0, 500.0]), torch.randn(2, 6, 24)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 0, 0, 1]], dtype=torch.bool)
    alone = [model(x[i : i + 1], t[i : i + 1], text=text[i : i + 1, mask[i]]) for i in range(2)]
    close(model(x, t, text=text, text_mask=mask), torch.cat(alone))
    packed = model.forward_packed(list(x), t, text=text, text_mask=mask)
    close(torch.stack(packed), torch.cat(alone))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    close(compiled(x, t, text=text, text_mask=mask), torch.cat(alone))


@pytest.mark.parametrize("kind", CONDITIONS)
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("window", WINDOWS)
def test_packed_is_each_alone(kind, position, window):
    model = small(**CONDITIONS[kind], **POSITIONS[position], **WINDOWS[window])
    xs = [torch.randn(3, 4, 8, 8), torch.randn(3, 2, 12, 6), torch.randn(3, 8, 8)]
    t = torch.tensor([3.0, 400.0, 999.0])
    y = torch.tensor([0, 4, 5]) if kind == "class" else None
    text = None
    if kind in ("pooled", "cross", "joint"):
        text = [torch.randn(n, 24) for n in (5, 2, 7)]
    outputs = model.forward_packed(xs, t, y, text)
    for i, (x, out) in enumerate(zip(xs, outputs, strict=True)):
        alone = model(
            x[None], t[i : i + 1], None if y is None else y[i : i + 1],
            None if text is None else text[i][None],
        )  # fmt: skip
        close(out, alone[0])


@pytest.mark.parametrize("kind", CONDITIONS)
def test_packed_with_a_time_a_frame(kind):
    model = small(**CONDITIONS[kind])
    xs = [torch.randn(3, 4, 8, 8), torch.randn(3, 2, 12, 6)]
    times = [torch.tensor([0.0, 10.0, 10.0, 500.0]), torch.tensor(3.0)]
    given = conditions(kind, 2)
    outputs = model.forward_packed(xs, times, **given)
    for i, (x, t, out) in enumerate(zip(xs, times, outputs, strict=True)):
        alone = {name: value[i : i + 1] for name, value in given.items()}
        close(out, model(x[None], t[None], **alone)[0])
    with pytest.raises(ValueError, match=r"each t must be \[\] or \[Gt = 2\]"):
        model.forward_packed(xs[1:], times[:1], **{k: v[:1] for k, v in given.items()})


def test_packed_gradients_are_each_alone():
    model = small(pos_embed="rope")
    xs = [torch.randn(3, 4, 8, 8), torch.randn(3, 1, 4, 4)]
    t = torch.tensor([3.0, 400.0])
    sum(out.square().sum() for out in model.forward_packed(xs, t)).backward()
    packed = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    sum(model(x[None], t[i : i + 1]).square().sum() for i, x in enumerate(xs)).backward()
    for grad, parameter in zip(packed, model.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", CONDITIONS)
def test_a_time_a_frame(kind):
    """Equal times give what one time gives; and a frame's time is its own."""
    model = small(**CONDITIONS[kind], depth=1)
    x, given = torch.randn(2, 3, 4, 8, 8), conditions(kind, 2)
    t = torch.tensor([10.0, 500.0])
    frames = t[:, None].repeat(1, 4)
    close(model(x, frames, **given), model(x, t, **given))
    frames[:, 0] = 0.0
    assert not torch.allclose(model(x, frames, **given), model(x, t, **given), atol=1e-3)


@pytest.mark.parametrize("position", ["sincos", "rope"])
def test_shapes_alone_leave_no_position_table_behind(position):
    """A run on fake tensors (an estimate of memory, say), before and after a real one of that size."""
    options = dict(hidden_size=32, depth=1, num_heads=2, pos_embed=position)
    model, x, t = DiT(input_size=(1, 8, 8), **options), torch.randn(1, 4, 12, 20), torch.zeros(1)
    for _ in range(2):
        with FakeTensorMode():
            fake = DiT(input_size=(1, 8, 8), **options)(torch.randn(x.shape), torch.zeros(1))
        assert type(fake) is not torch.Tensor
        out = model(x, t)
        assert type(out) is torch.Tensor
        assert fake.shape == out.shape


def test_position_tables_are_kept_up_to_a_size(monkeypatch):
    made = []

    def make(rows):
        made.append(rows)
        return (torch.zeros(rows, 1),)

    monkeypatch.setattr(dit, "_kept", {})
    monkeypatch.setattr(dit, "_KEPT_BYTES", 4 * 10)
    for rows in (3, 4, 3, 5, 3, 4, 20, 20, 3):  # 5 pushes 4 out; 20 is kept alone
        assert dit._table(make, rows)[0].shape == (rows, 1)
    assert made == [3, 4, 5, 4, 20, 3]


def test_images_and_other_sizes():
    model = small(input_size=(1, 8, 8))
    image = torch.randn(2, 3, 8, 8)
    t = torch.rand(2)
    out = model(image, t)
    assert out.shape == (2, 6, 8, 8)
    close(model(image.unsqueeze(2), t).squeeze(2), out)
    assert model(torch.randn(2, 3, 20, 6), t).shape == (2, 6, 20, 6)
    video = small()
    assert video(torch.randn(1, 3, 7, 4, 10), torch.rand(1)).shape == (1, 6, 7, 4, 10)


def test_a_window_as_large_as_the_grid_is_no_window():
    torch.manual_seed(1)
    local = small(window_size=(4, 4, 4))
    torch.manual_seed(1)
    dense = small()
    x, t = torch.randn(1, 3, 4, 8, 8), torch.rand(1)
    assert torch.equal(local(x, t), dense(x, t))
    torch.manual_seed(1)
    every = small(window_size=(1, 2, 2), window_every=2)
    assert [bool(every._window(i, (4, 4, 4))) for i in range(4)] == [False, True, False, True]
    assert not torch.allclose(every(x, t), dense(x, t), atol=1e-3)


def test_activation_checkpointing_changes_memory_not_results():
    x, t = torch.randn(2, 3, 4, 8, 8), torch.rand(2)
    grads, saved = [], []
    for checkpointing in (False, True):
        torch.manual_seed(2)
        model = small(activation_checkpointing=checkpointing, depth=4)
        size = 0

        def count(tensor):
            nonlocal size
            size += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = model(x, t).square().mean()
        loss.backward()
        grads.append([p.grad for p in model.parameters()])
        saved.append(size)
    assert saved[1] < saved[0] / 4
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_activation_checkpointing_recomputes_on_the_same_backend():
    """Backward may run where no `use_backend` reaches: here in another thread, as on a GPU."""
    model = small(activation_checkpointing=True)
    with testing.plain_torch():
        loss = model(torch.randn(1, 3, 4, 8, 8), torch.rand(1)).square().mean()
    errors = []

    def backward():
        try:
            loss.backward()
        except torch.utils.checkpoint.CheckpointError as error:
            errors.append(error)

    thread = threading.Thread(target=backward)
    thread.start()
    thread.join()
    assert not errors
    assert all(p.grad is not None for p in model.parameters())


def test_a_new_model_predicts_zero():
    """adaLN-Zero: every block begins as the identity and the output as zero."""
    model = DiT(
        input_size=(2, 4, 4), hidden_size=64, depth=2, num_heads=2, text_dim=8, text_mode="cross"
    )
    x = torch.randn(1, 4, 2, 4, 4)
    assert (model(x, torch.rand(1), text=torch.randn(1, 3, 8)) == 0).all()
    tokens = torch.randn(1, 8, 64)
    block = model.blocks[0]
    out = block(tokens, torch.randn(1, 64), context=torch.randn(1, 3, 8))
    assert torch.equal(out, tokens)


def test_class_dropout_in_training_only():
    model = small(num_classes=5, class_dropout_prob=1.0)
    x, t, y = torch.randn(1, 3, 4, 8, 8), torch.rand(1), torch.tensor([1])
    dropped = model(x, t, torch.tensor([5]))
    assert not torch.allclose(model(x, t, y), dropped, atol=1e-4)
    assert torch.equal(model.train()(x, t, y), dropped)


def test_bfloat16_and_autocast():
    model = small(num_classes=5)
    x, t, y = torch.randn(2, 3, 4, 8, 8), torch.rand(2) * 1000, torch.tensor([1, 2])
    exact = model(x, t, y)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(x, t, y)
    rough = model.bfloat16()(x.bfloat16(), t, y)
    assert rough.dtype == torch.bfloat16
    assert mixed.dtype == torch.float32
    scale = exact.abs().max()
    assert (mixed - exact).abs().max() < (rough.float() - exact).abs().max() < 0.1 * scale


def test_the_whole_model_compiles():
    for options in (
        {"num_classes": 5},
        {"pos_embed": "rope", "text_dim": 24, "text_mode": "joint"},
    ):
        model = small(**options, window_size=(2, 3, 3), window_every=2)
        x, t = torch.randn(2, 3, 4, 8, 8), torch.rand(2)
        given = {"y": torch.tensor([1, 2])} if "num_classes" in options else conditions("joint", 2)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        close(compiled(x, t, **given), model(x, t, **given))


X, T = torch.randn(2, 3, 4, 8, 8), torch.rand(2)


TEXT, MASK = torch.randn(2, 5, 8), torch.ones(2, 5, dtype=torch.bool)
