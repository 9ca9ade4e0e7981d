"""The DiT: the paper's sizes, the weights of others, every conditioning, packed batches."""

from __future__ import annotations

import math
import threading
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dit_kernels import models, testing
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


def original_state_dict(depth=2, width=64, classes=10, patch=2, channels=4, size=8):
    """Random weights under the original's names, with its 4-D patch embedding and its pos_embed."""
    tokens, mlp = (size // patch) ** 2, 4 * width
    shapes = {
        "pos_embed": (1, tokens, width),
        "x_embedder.proj.weight": (width, channels, patch, patch),
        "x_embedder.proj.bias": (width,),
        "t_embedder.mlp.0.weight": (width, 256), "t_embedder.mlp.0.bias": (width,),
        "t_embedder.mlp.2.weight": (width, width), "t_embedder.mlp.2.bias": (width,),
        "y_embedder.embedding_table.weight": (classes + 1, width),
        "final_layer.linear.weight": (patch * patch * 2 * channels, width),
        "final_layer.linear.bias": (patch * patch * 2 * channels,),
        "final_layer.adaLN_modulation.1.weight": (2 * width, width),
        "final_layer.adaLN_modulation.1.bias": (2 * width,),
    }  # fmt: skip
    for i in range(depth):
        for name, shape in {
            "attn.qkv": (3 * width, width), "attn.proj": (width, width), "mlp.fc1": (mlp, width),
            "mlp.fc2": (width, mlp), "adaLN_modulation.1": (6 * width, width),
        }.items():  # fmt: skip
            shapes[f"blocks.{i}.{name}.weight"] = shape
            shapes[f"blocks.{i}.{name}.bias"] = shape[:1]
    return {name: 0.1 * torch.randn(shape) for name, shape in shapes.items()}


def original_forward(sd, x, t, y, heads=2, patch=2):
    """The original DiT's forward from its state dict, in plain torch."""
    F = nn.functional
    width = sd["x_embedder.proj.bias"].shape[0]

    def linear(name, x):
        return F.linear(x, sd[f"{name}.weight"], sd[f"{name}.bias"])

    def modulated(x, shift, scale):
        return F.layer_norm(x, (width,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    frequency = torch.exp(-math.log(10000) * torch.arange(128) / 128)
    angle = t[:, None].float() * frequency[None]
    c = linear("t_embedder.mlp.0", torch.cat((angle.cos(), angle.sin()), dim=-1))
    c = linear("t_embedder.mlp.2", F.silu(c)) + sd["y_embedder.embedding_table.weight"][y]
    h = F.conv2d(x, sd["x_embedder.proj.weight"], sd["x_embedder.proj.bias"], stride=patch)
    h = h.flatten(2).transpose(1, 2) + sd["pos_embed"]
    for i in range(sum(name.endswith("attn.qkv.weight") for name in sd)):
        block = f"blocks.{i}."
        rows = linear(block + "adaLN_modulation.1", F.silu(c)).chunk(6, dim=1)
        qkv = linear(block + "attn.qkv", modulated(h, rows[0], rows[1]))
        q, k, v = qkv.reshape(*h.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(h.shape)
        h = h + rows[2][:, None] * linear(block + "attn.proj", a)
        m = F.gelu(linear(block + "mlp.fc1", modulated(h, rows[3], rows[4])), approximate="tanh")
        h = h + rows[5][:, None] * linear(block + "mlp.fc2", m)
    shift, scale = linear("final_layer.adaLN_modulation.1", F.silu(c)).chunk(2, dim=1)
    h = linear("final_layer.linear", modulated(h, shift, scale))
    side = int(h.shape[1] ** 0.5)
    h = h.reshape(h.shape[0], side, side, patch, patch, -1)
    return torch.einsum("nhwpqc->nchpwq", h).reshape(h.shape[0], -1, side * patch, side * patch)


def original_model():
    return DiT(
        input_size=(1, 8, 8), in_channels=4, hidden_size=64, depth=2, num_heads=2, num_classes=10
    ).eval()


def test_the_sizes_of_an_image_as_the_original_takes_them():
    """An int for both, or (Y, X)."""
    for size, config in ((8, (1, 8, 8)), ((8, 12), (1, 8, 12)), ((1, 8, 12), (1, 8, 12))):
        model = DiT_models["DiT-S/2"](input_size=size, depth=0)
        assert model.config["input_size"] == config
    model = DiT(input_size=[8, 8], patch_size=4, hidden_size=32, depth=0, num_heads=2)
    assert model.config["patch_size"] == (1, 4, 4)
    assert model(torch.randn(1, 4, 8, 8), torch.zeros(1)).shape == (1, 8, 8, 8)


def test_the_original_dits_weights():
    sd, model = original_state_dict(), original_model()
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([0, 17, 999]), torch.tensor([1, 9, 10])
    expected = original_forward(sd, x, t, y)
    model.load_state_dict(models.load_original(sd))
    assert (model(x, t, y) - expected).abs().max() <= 1e-5
    other = original_model()
    other.load_state_dict(sd)
    assert torch.equal(other(x, t, y), model(x, t, y))
    checkpoint = {"model": {}, "ema": sd, "opt": {}, "args": None}
    model.load_state_dict(models.load_original(checkpoint))


def test_the_original_dits_position_table():
    """get_2d_sincos_pos_embed: half of the channels for w, half for h, sines first."""
    model = original_model()
    table = model.pos_embed[0].view(4, 4, 64)
    for h, w in ((0, 0), (1, 3), (3, 2)):
        for half, position in ((0, w), (1, h)):
            part = table[h, w, 32 * half : 32 * (half + 1)]
            frequency = 10000.0 ** -(torch.arange(16) / 16)
            close(part, torch.cat(((position * frequency).sin(), (position * frequency).cos())))


def diffusers_model(**options):
    from diffusers import DiTTransformer2DModel

    config = {
        "num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 4, "out_channels": 8,
        "num_layers": 3, "sample_size": 8, "num_embeds_ada_norm": 10,
    }  # fmt: skip
    theirs = DiTTransformer2DModel(**{**config, **options}).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.05)
    return theirs


def tied(theirs):
    """As real checkpoints have it: one embedder of time and class, repeated in every block."""
    for block in theirs.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(theirs.transformer_blocks[0].norm1.emb.state_dict())
    return theirs


@pytest.mark.parametrize("out_channels", [8, None])
def test_diffusers_dit(out_channels):
    theirs = tied(diffusers_model(out_channels=out_channels))
    ours = models.from_diffusers(theirs)
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([0, 17, 999]), torch.tensor([1, 9, 10])
    with torch.no_grad():
        assert (ours(x, t, y) - theirs(x, t, y).sample).abs().max() <= 1e-5
        exact = ours.double()(x.double(), t, y) - theirs.double()(x.double(), t, y).sample
    # the sinusoidal embedding is float32 in both
    assert exact.abs().max() <= 1e-6


def test_from_diffusers_says_what_it_cannot_take():
    with pytest.raises(TypeError, match="must be a DiTTransformer2DModel; got Linear"):
        models.from_diffusers(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="block 1 must embed time and class as block 0 does"):
        models.from_diffusers(diffusers_model())
    with pytest.raises(ValueError, match="activation_fn 'geglu' has no counterpart"):
        models.from_diffusers(tied(diffusers_model(activation_fn="geglu")))


def test_safetensors_round_trip(tmp_path):
    model = small(num_classes=5, pos_embed="rope", qk_norm="rms", window_size=(2, 2, 2))
    path = tmp_path / "model.safetensors"
    models.save(model, path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    again = models.load(path).eval()
    assert again.config == models.load(path).config
    x, t, y = torch.randn(1, 3, 4, 8, 8), torch.rand(1), torch.tensor([2])
    assert torch.equal(again(x, t, y), model(x, t, y))
    models.save(model, tmp_path / "new" / "model.safetensors")
    assert models.load(tmp_path / "new" / "model.safetensors").config == model.config


@pytest.mark.parametrize(
    ("file", "changes", "error", "message"),
    [
        ("none", {}, FileNotFoundError, "load: no such file: none"),
        (".", {}, IsADirectoryError, "load: . is a folder; give the path of a .safetensors file"),
        ("text", {}, ValueError, "load: text is not a safetensors file of `save`: "),
        ("cut-off", {}, ValueError, "load: cut-off is not a safetensors file of `save`: "),
        ("other", {}, ValueError, "load: other has no DiT configuration in its metadata"),
        ("newer", {}, ValueError, "has settings that this version does not know: colour"),
        ("model", {"colour": 1}, TypeError, "load: DiT has no argument 'colour'"),
        (
            "model", {"hidden_size": 64}, ValueError,
            "the weights in model don't fit its configuration with the changes {'hidden_size': 64}: size mismatch",
        ),
    ],
)  # fmt: skip
def test_load_says_what_is_wrong_with_a_file(monkeypatch, tmp_path, file, changes, error, message):
    from safetensors.torch import save_file

    monkeypatch.chdir(tmp_path)
    models.save(small(hidden_size=32, depth=1), "model")
    Path("text").write_text("no weights")
    Path("cut-off").write_bytes(Path("model").read_bytes()[:-1])
    tensors = {"a": torch.zeros(1)}
    save_file(tensors, "other")
    save_file(tensors, "newer", metadata={"config": '{"depth": 1, "colour": 1}'})
    with pytest.raises(error) as caught:
        models.load(file, **changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_save_and_load_original_say_what_they_take(tmp_path):
    with pytest.raises(TypeError, match="save: model must be a DiT; got Linear"):
        models.save(nn.Linear(2, 2), tmp_path / "x")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        models.save(small(depth=0), tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(
        TypeError, match=r"must be a dict of tensors, as torch\.load gives it; got str"
    ):
        models.load_original("DiT-XL-2-256x256.pt")
    with pytest.raises(
        ValueError, match=r"must be the original DiT's, with x_embedder\.proj\.weight"
    ):
        models.load_original({"model": {"a": torch.zeros(1)}})


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


def packed(xs, t, y=None, text=None, text_mask=None, **options):
    return small(**options).forward_packed(xs, t, y, text, text_mask)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: small()(X[:, :2], T),
            "DiT: x must be [B, 3, F, Y, X] or [B, 3, Y, X]; got [2, 2, 4, 8, 8]",
        ),
        (
            lambda: small()(X[..., :7], T),
            "the patch (1, 2, 2) must divide the video (F, Y, X); got (4, 8, 7)",
        ),
        (
            lambda: small()(X, torch.rand(2, 3)),
            "t must be [B] or [B, Gt = 4], a time a frame of patches, for B = 2; got [2, 3]",
        ),
        (lambda: small()(X, torch.rand(3)), "for B = 2; got [3]"),
        (
            lambda: small(num_classes=5)(X, T, torch.tensor([1, 2, 3])),
            "DiT: y must be [B = 2]; got [3]",
        ),
        (
            lambda: small(text_dim=8)(X, T, text=torch.randn(2, 5, 7)),
            "DiT: text must be [B = 2, L, text_dim = 8]; got [2, 5, 7]",
        ),
        (
            lambda: small(text_dim=8)(
                X, T, text=torch.randn(2, 5, 8), text_mask=torch.ones(2, 4, dtype=torch.bool)
            ),
            "DiT: text_mask must be [B, L] = [2, 5]; got [2, 4]",
        ),
        (
            lambda: small()(X, T, text_mask=torch.ones(2, 4, dtype=torch.bool)),
            "DiT: text_mask is given, and no text that it could be of",
        ),
        (lambda: small(num_classes=5)(X, T), "DiT: y must be given to this model"),
        (lambda: small()(X, T, torch.tensor([1])), "DiT: y is not an input of this model"),
        (lambda: small(text_dim=8)(X, T), "text must be given to this model, which was made with"),
        (lambda: small()(X, T, text=TEXT), "text is not an input of this model, which was made with"),
        (lambda: small()(X.to("meta"), T), "x must be on cpu, where the weights are; got meta"),
        (lambda: small()(X, T.to("meta")), "t must be on cpu, where x is; got meta"),
        (
            lambda: small(num_classes=5)(X, T, torch.tensor([1, 6])),
            "class labels must lie in [0, 5]; got values from 1 to 6",
        ),
        (lambda: small(pos_embed="learned"), "pos_embed must be one of 'sincos', 'rope'; got 'learned'"),
        (lambda: small(norm="batch"), "DiT: norm must be one of 'layer', 'rms'; got 'batch'"),
        (lambda: small(qk_norm="none"), "DiT: qk_norm must be one of None, 'rms', 'layer'; got 'none'"),
        (lambda: small(depth=-1), "DiT: depth must be at least 0; got -1"),
        (lambda: small(num_classes=0), "num_classes must be at least 1, or None for none; got 0"),
        (lambda: small(mlp_ratio=0.001), "mlp_ratio must give the feed-forward a width of at least 1"),
        (lambda: small(norm2_eps=-1.0), "DiT: eps must be a finite number of at least 0; got -1.0"),
        (lambda: small(class_dropout_prob=2), "class_dropout_prob must lie in [0, 1]; got 2"),
        (lambda: small(text_mode="cross"), "DiT: text_mode 'cross' needs text_dim, the width of"),
        (lambda: small(window_every=2), "window_every needs window_size; got window_every 2 alone"),
        (
            lambda: small(window_size=(1, 2, 2), stride=(1, 2, 3)),
            "stride must be at most window_size (1, 2, 2) on each axis; got (1, 2, 3)",
        ),
        (
            lambda: small(pos_embed="rope", rope_dims=(16, 16, 16)),
            "rope_dims must be even, and at most 32 together, the channels of a head; got (16, 16, 16)",
        ),
        (lambda: small(pos_embed="rope", rope_theta=0), "rope_theta must be more than 0; got 0"),
        (lambda: small(patch_size=(1, 0, 2)), "patch_size must be at least 1 on each axis"),
        (lambda: small(input_size=(4, 8, 7)), "the patch (1, 2, 2) must divide the video"),
        (lambda: small(text_dim=8, text_mode="adaln"), "DiT: text_mode must be one of"),
        (lambda: small(num_heads=0), "DiT: num_heads must be at least 1; got 0"),
        (lambda: small(input_size=(8,)), "DiT: input_size must be 3 ints (t, h, w); got (8,)"),
        (lambda: small(input_size=8.0), "DiT: input_size must be 3 ints (t, h, w); got 8.0"),
        (lambda: small(patch_size=(2,)), "DiT: patch_size must be 3 ints (t, h, w); got (2,)"),
        (lambda: small(window_size=(2, 2)), "DiT: window_size must be 3 ints (t, h, w)"),
        (lambda: small(stride=(1, 2, 2)), "DiT: stride needs window_size; got stride (1, 2, 2)"),
        (
            lambda: small(hidden_size=60, num_heads=4, pos_embed="rope"),
            "a head must have an even number; got hidden_size 60 and num_heads 4",
        ),
        (lambda: small(num_heads=3), "DiT: num_heads must divide hidden_size; got 3 and 64"),
        (
            lambda: small(hidden_size=72),
            "hidden_size must be a multiple of 16 for the sincos table of a video; got 72",
        ),
        (lambda: packed([X[0]], T), "t must have an entry for each of the 1 videos; got 2"),
        (lambda: packed([X[0, 0]], T[:1]), "each of xs must be [3, F, Y, X] or [3, Y, X]; got [4, 8, 8]"),
        (lambda: packed(list(X), torch.rand(2, 3)), "each t must be [] or [Gt = 4], a time a frame"),
        (
            lambda: packed(list(X), T, torch.tensor([1]), num_classes=5),
            "DiT: y must be [S = 2]; got [1]",
        ),
        (
            lambda: packed(list(X), T, text=[TEXT[0, :, :7]] * 2, text_dim=8),
            "DiT: each text must be [L, text_dim = 8]; got [5, 7]",
        ),
        (
            lambda: packed(list(X), T, text=TEXT[:1], text_dim=8),
            "DiT: text must have an entry for each of the 2 videos; got 1",
        ),
        (
            lambda: packed(list(X), T, text=TEXT, text_mask=MASK[:, :3], text_dim=8),
            "DiT: text_mask must be [S, L] = [2, 5]; got [2, 3]",
        ),
        (
            lambda: packed(list(X), T, text=[TEXT[0], TEXT[1, :2]], text_mask=MASK, text_dim=8),
            "DiT: text_mask is for prompts of one length; got lengths [2, 5]",
        ),
    ],
)  # fmt: skip
def test_errors_say_what_was_expected(call, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        call()
    assert message in str(caught.value)


def test_an_unknown_name_says_which_there_are():
    with pytest.raises(KeyError, match=r"DiT_models has no 'DiT-XL'; it has DiT-S/2, DiT-S/4"):
        DiT_models["DiT-XL"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: small()(X.long(), T), "x must be float32, bfloat16, float16 or float64; got torch.int64"),
        (lambda: small()(X.double(), T), "x must be torch.float32 as the weights, outside of autocast"),
        (lambda: small()(X.tolist(), T), "DiT: x must be a tensor [B, 3, F, Y, X]; got list"),
        (lambda: small()(X, 0.5), "DiT: t must be a tensor [B] or [B, Gt]; got float"),
        (lambda: small()(X, T > 0), "DiT: t must be real numbers; got torch.bool"),
        (lambda: small(num_classes=5)(X, T, 3), "DiT: y must be a tensor [B]; got int"),
        (lambda: small(num_classes=5)(X, T, T), "DiT: y must be int64; got torch.float32"),
        (lambda: small(text_dim=8)(X, T, text=["a", "b"]), "text must be a tensor [B, L, text_dim]; got list"),
        (
            lambda: small(text_dim=8, text_mode="cross")(X, T, text=TEXT.half()),
            "text must be torch.float32 as the weights, outside of autocast; got torch.float16",
        ),
        (
            lambda: small(text_dim=8)(X, T, text=TEXT, text_mask=MASK.long()),
            "text_mask must be bool; got torch.int64",
        ),
        (lambda: packed(X, T), "xs must be a list of videos [3, F, Y, X], each of its own size; got a tensor"),
        (lambda: packed([X[0], X[1].bfloat16()], T), "each of xs must be torch.float32 as the weights"),
        (lambda: packed(list(X), 0.5), "t must be a tensor or a list, an entry a video; got float"),
        (lambda: packed(list(X), [0.5, 0.5]), "each t must be a tensor [] or [Gt]; got float"),
        (lambda: packed(list(X), T, text=["a", "b"], text_dim=8), "each text must be a tensor [L, text_dim]"),
        (lambda: small(hidden_size=64.0), "DiT: hidden_size must be an int; got 64.0"),
    ],
)  # fmt: skip
def test_errors_of_type_say_what_was_expected(call, message):
    with pytest.raises(TypeError) as caught:
        call()
    assert message in str(caught.value)


def test_what_casts_on_the_way_is_not_taken_for_a_wrong_dtype():
    expected = small()(X, T)
    model = small().bfloat16()
    model.blocks[0].register_forward_pre_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="dtype"):  # of the Linear itself: the hook did nothing
        model(X, T)
    model = small()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(X.bfloat16(), T).shape == expected.shape


def test_a_video_configuration_without_text():
    model = DiT_models["video-S"](depth=1, text_dim=None)
    assert model.text_mode is None
    assert model.config["text_mode"] == "pooled"


def test_packing_nothing():
    assert small().forward_packed([], torch.zeros(0)) == []
