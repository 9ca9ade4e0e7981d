"""The DiT with the weights of others: the original's and diffusers', and safetensors files."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from dit_kernels import models
from dit_kernels.models import DiT
from tests.test_models import close, small


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
