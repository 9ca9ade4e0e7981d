"""Each layer against the plain layer it replaces: same parameter names, same results."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from torch import Tensor, nn

from dit_kernels import nn as dnn
from dit_kernels import ops

B, N, C, H = 2, 12, 48, 4


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)


def same_weights(ours: nn.Module, theirs: nn.Module) -> None:
    """Random weights, zero-initialised ones too, loaded strictly from the layer replaced."""
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2)
    ours.load_state_dict(theirs.state_dict())
    assert set(ours.state_dict()) == set(theirs.state_dict())


def test_ada_layer_norm_of_cogvideox():
    from diffusers.models.normalization import AdaLayerNorm

    options = {
        "output_dim": 2 * C,
        "norm_elementwise_affine": True,
        "norm_eps": 1e-5,
        "chunk_dim": 1,
    }
    ours, theirs = dnn.AdaLayerNorm(32, **options), AdaLayerNorm(32, **options)
    same_weights(ours, theirs)
    x, temb = torch.randn(B, N, C), torch.randn(B, 32)
    close(ours(x, temb=temb), theirs(x, temb=temb))


def test_ada_layer_norm_of_a_learned_timestep():
    from diffusers.models.normalization import AdaLayerNorm

    ours, theirs = dnn.AdaLayerNorm(C, 10), AdaLayerNorm(C, 10)
    same_weights(ours, theirs)
    x, timestep = torch.randn(B, N, C), torch.tensor(3)
    close(ours(x, timestep), theirs(x, timestep))


@pytest.mark.parametrize("norm_type", ["layer_norm", "fp32_layer_norm"])
def test_ada_layer_norm_zero(norm_type):
    from diffusers.models.normalization import AdaLayerNormZero

    ours, theirs = (
        kind(C, norm_type=norm_type) for kind in (dnn.AdaLayerNormZero, AdaLayerNormZero)
    )
    same_weights(ours, theirs)
    x, emb = torch.randn(B, N, C), torch.randn(B, C)
    for a, b in zip(ours(x, emb=emb), theirs(x, emb=emb), strict=True):
        close(a, b)


def test_ada_layer_norm_zero_embeds_time_and_class():
    from diffusers.models.normalization import AdaLayerNormZero

    ours, theirs = (kind(C, 7).eval() for kind in (dnn.AdaLayerNormZero, AdaLayerNormZero))
    same_weights(ours, theirs)
    x, t, y = torch.randn(B, N, C), torch.tensor([3, 900]), torch.tensor([0, 7])
    dtype = torch.float32
    for a, b in zip(ours(x, t, y, dtype), theirs(x, t, y, dtype), strict=True):
        close(a, b)


@pytest.mark.parametrize("frames", [1, 3])
def test_ada_layer_norm_single(frames):
    """PixArt's block: (table + temb).chunk(6), norm, modulate."""
    layer = dnn.AdaLayerNormSingle(C)
    x, temb = torch.randn(B, N, C), torch.randn(B, frames, 6 * C)
    rows = layer.scale_shift_table + temb.unflatten(-1, (6, C))
    rows = rows.repeat_interleave(N // frames, dim=1).unbind(2)
    expected = nn.functional.layer_norm(x, (C,), eps=1e-6) * (1 + rows[1]) + rows[0]
    y, *rest = layer(x, temb)
    close(y, expected)
    for row, want in zip(rest, rows[2:], strict=True):
        close(row.repeat_interleave(N // frames, dim=1), want)
    if frames == 1:
        close(layer(x, temb[:, 0])[0], expected)


def test_qk_norm_rope_of_wan():
    from diffusers.models.transformers.transformer_wan import (
        WanAttention,
        WanAttnProcessor,
        WanRotaryPosEmbed,
    )

    dim = C // H
    theirs = WanAttention(C, H, dim, processor=WanAttnProcessor())
    ours = dnn.QKNormRoPE(dim, H, over="hidden", eps=1e-5)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.5)
    norms = {k: v for k, v in theirs.state_dict().items() if k.startswith("norm_")}
    ours.load_state_dict({k: norms[k] for k in ours.state_dict()})
    x = torch.randn(B, N, C)
    rotary = WanRotaryPosEmbed(dim, (1, 1, 1), 16)(torch.zeros(1, 1, 3, 2, 2))
    cos, sin = ops.rope_3d((3, 2, 2), (4, 4, 4))
    q, k = ours(
        theirs.to_q(x).unflatten(-1, (H, dim)), theirs.to_k(x).unflatten(-1, (H, dim)), cos, sin
    )
    out = ops.attention3d(q, k, theirs.to_v(x).unflatten(-1, (H, dim)))
    close(theirs.to_out[0](out.flatten(2)), theirs(x, rotary_emb=rotary))


class TimmAttention(nn.Module):
    """timm's Attention, as the original DiT uses it."""

    def __init__(self, qk_norm: bool) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.q_norm = nn.LayerNorm(C // H, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(C // H, eps=1e-6) if qk_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(B, N, 3, H, C // H).permute(2, 0, 3, 1, 4).unbind(0)
        out = nn.functional.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj(out.transpose(1, 2).reshape(B, N, C))


@pytest.mark.parametrize("qk_norm", [None, "layer"])
def test_attention3d(qk_norm):
    ours, theirs = dnn.Attention3D(C, H, qk_norm=qk_norm), TimmAttention(qk_norm is not None)
    same_weights(ours, theirs)
    x = torch.randn(B, N, C)
    close(ours(x), theirs(x))


def test_attention3d_of_segments():
    layer, x = dnn.Attention3D(C, H), torch.randn(B, N, C)
    segments = [(slice(0, 5), {}), (slice(5, N), {})]
    close(layer(x, segments=segments), torch.cat((layer(x[:, :5]), layer(x[:, 5:])), dim=1))


def test_cross_attention_packed_is_each_alone():
    layer = dnn.CrossAttention(C, H, 20, "rms")
    x, context, lens = torch.randn(1, 9, C), torch.randn(2, 5, 20), torch.tensor([2, 5]).int()
    packed = layer(x, context, lens, lengths=[4, 5])
    alone = [layer(x[:, :4], context[:1, :2]), layer(x[:, 4:], context[1:])]
    close(packed, torch.cat(alone, dim=1))


def test_feed_forward():
    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.act, self.fc2 = nn.Linear(C, 96), nn.GELU("tanh"), nn.Linear(96, C)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(self.act(self.fc1(x)))

    ours, theirs = dnn.FeedForward(C, 96), Mlp()
    same_weights(ours, theirs)
    x = torch.randn(B, N, C)
    close(ours(x), theirs(x))


def test_feed_forward_swiglu():
    layer, x = dnn.FeedForward(C, 32, "swiglu"), torch.randn(B, N, C)
    a, b = layer.fc1(x).chunk(2, dim=-1)
    close(layer(x), layer.fc2(nn.functional.silu(a) * b))
    with pytest.raises(
        ValueError, match="act must be gelu-tanh, gelu, swiglu or swiglu-second; got 'relu'"
    ):
        dnn.FeedForward(C, act="relu")


def test_feed_forward_calls_a_linear_whose_forward_was_replaced():
    """As accelerate's and diffusers' offloading and layerwise casting do."""
    layer, x, calls = dnn.FeedForward(C), torch.randn(B, N, C), []
    expected, forward = layer(x), layer.fc2.forward
    layer.fc2.forward = lambda h: calls.append(h) or forward(h)
    close(layer(x), expected)
    assert len(calls) == 1


@pytest.mark.parametrize("act", ["gelu-tanh", "gelu", "swiglu", "swiglu-second"])
def test_feed_forward_is_one_function_with_its_second_linear(act):
    """Equal to the module calls that a hook brings back, also in gradients and second derivatives."""
    layer, x = dnn.FeedForward(6, 4, act).double(), torch.randn(2, 3, 6, dtype=torch.float64)
    x.requires_grad_()
    leaves = [x, *layer.parameters()]

    def grads():
        y = layer(x)
        return y, torch.autograd.grad(y.square().sum(), leaves)

    y, fused = grads()
    assert y.grad_fn.name() == "_ActivatedLinearBackward"
    hook = layer.fc2.register_forward_hook(lambda *_: None)
    expected, plain = grads()
    hook.remove()
    for a, b in zip((y, *fused), (expected, *plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)

    def call(x, *parameters):
        names = [name for name, _ in layer.named_parameters()]
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("frozen", ["weight", "everything"])
def test_second_derivative_of_a_frozen_feed_forward(frozen):
    """A gradient penalty through a layer that is not trained itself."""
    layer = dnn.FeedForward(6, 4).double()
    for parameter in [layer.fc2.weight] if frozen == "weight" else layer.parameters():
        parameter.requires_grad_(False)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(layer, x)


def test_second_derivative_of_a_feed_forward_under_autocast():
    layer, x = dnn.FeedForward(C), torch.randn(B, N, C, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    (dx,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
    parameters = list(layer.parameters())[:3]  # the last bias shifts y and bends nothing
    for parameter, grad in zip(
        parameters, torch.autograd.grad(dx.square().sum(), parameters), strict=True
    ):
        assert grad.dtype == parameter.dtype
        assert grad.isfinite().all()


def test_feed_forward_under_autocast():
    layer, x = dnn.FeedForward(C), torch.randn(B, N, C, requires_grad=True)
    hooked = dnn.FeedForward(C)
    hooked.load_state_dict(layer.state_dict())
    hooked.fc2.register_forward_hook(lambda *_: None)
    found = []
    for module in (layer, hooked):
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)
        grads = torch.autograd.grad(y.float().square().sum(), [x, *module.parameters()])
        found.append((y, *grads))
    for fused, plain in zip(*found, strict=True):
        assert fused.dtype == plain.dtype
        assert torch.equal(fused, plain)


def saved_bytes(block: nn.Module, x: Tensor, c: Tensor) -> int:
    """Memory that a forward keeps for backward, each storage once, parameters apart."""
    parameters = {p.untyped_storage().data_ptr() for p in block.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = block(x, c)
    assert out.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_a_block_saves_at_most_72_percent_of_the_eager_blocks_memory(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "N", 256)
    x = torch.randn(B, 256, C, dtype=torch.bfloat16, requires_grad=True)
    c = torch.randn(B, C, dtype=torch.bfloat16)
    ours = saved_bytes(dnn.DiTBlock(C, H).bfloat16(), x, c)
    eager = saved_bytes(OriginalBlock().bfloat16(), x, c)
    assert ours <= 0.72 * eager, ours / eager


def test_patch_embed_3d_takes_a_convs_weights():
    conv = nn.Conv2d(3, C, 2, 2)
    layer = dnn.PatchEmbed3D((1, 2, 2), 3, C)
    layer.load_state_dict({f"proj.{k}": v for k, v in conv.state_dict().items()})
    image = torch.randn(B, 3, 6, 8)
    close(layer(image.unsqueeze(2)), conv(image).flatten(2).transpose(1, 2))
    close(layer(image.unsqueeze(2)), layer.proj(image.unsqueeze(2)).flatten(2).transpose(1, 2))


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_timestep_embedder_of_diffusers(shift):
    from diffusers.models.embeddings import Timesteps

    t = torch.tensor([0.0, 3.5, 999.0])
    expected = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=shift)(t)
    close(dnn.timestep_embedding(t, 256, frequency_shift=shift), expected)
    layer = dnn.TimestepEmbedder(C, frequency_shift=shift)
    assert set(layer.state_dict()) == {f"mlp.{i}.{p}" for i in (0, 2) for p in ("weight", "bias")}
    close(layer(t[:, None])[:, 0], layer.mlp(expected))


def test_attention_pool_is_multi_head_attention_of_one_query():
    layer, text = dnn.AttentionPool(20, C, H), torch.randn(B, 6, 20)
    mask = torch.arange(6) < torch.tensor([[4], [6]])
    k, v = layer.kv(layer.norm(text)).chunk(2, dim=-1)
    plain = nn.MultiheadAttention(C, H, bias=False, batch_first=True)
    with torch.no_grad():
        plain.in_proj_weight.copy_(torch.cat([torch.eye(C)] * 3))
        plain.out_proj.weight.copy_(torch.eye(C))
    pooled, _ = plain(layer.query.expand(B, 1, C), k, v, key_padding_mask=~mask)
    close(layer(text, mask), layer.proj(pooled[:, 0]))
    # what is padded does not matter, and a prompt of nothing is the same vector for all
    noisy = torch.where(mask[..., None], text, torch.randn_like(text))
    close(layer(noisy, mask), layer(text, mask))
    nothing = layer(text, torch.zeros_like(mask))
    close(nothing, layer.proj.bias.expand(B, C))


class OriginalBlock(nn.Module):
    """facebookresearch/DiT's block, written out."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = TimmAttention(False)
        self.mlp = nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(C, 6 * C))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
            return (
                nn.functional.layer_norm(x, (C,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
            )

        rows = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + rows[2][:, None] * self.attn(modulated(x, rows[0], rows[1]))
        h = self.mlp.fc1(modulated(x, rows[3], rows[4]))
        return x + rows[5][:, None] * self.mlp.fc2(nn.functional.gelu(h, approximate="tanh"))


def test_block_of_the_original_dit():
    ours, theirs = dnn.DiTBlock(C, H), OriginalBlock()
    same_weights(ours, theirs)
    x, c = torch.randn(B, N, C), torch.randn(B, C)
    close(ours(x, c), theirs(x, c))
    xs = [x.clone().requires_grad_() for _ in range(2)]
    ours(xs[0], c).square().sum().backward()
    theirs(xs[1], c).square().sum().backward()
    torch.testing.assert_close(xs[0].grad, xs[1].grad, rtol=1e-4, atol=1e-4)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3, msg=name)


def test_final_layer_of_the_original_dit():
    layer, x, c = dnn.FinalLayer(C, (1, 2, 2), 5), torch.randn(B, N, C), torch.randn(B, C)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.2)
    shift, scale = layer.adaLN_modulation(c).chunk(2, dim=1)
    y = nn.functional.layer_norm(x, (C,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    tokens = layer.linear(y).reshape(B, 3, 4, 2, 2, 5)
    expected = torch.einsum("nhwpqc->nchpwq", tokens).reshape(B, 5, 6, 8)
    close(layer(x, c, (1, 3, 4))[:, :, 0], expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dnn.Attention3D(10, 4), "Attention3D: num_heads must divide dim; got 4 and 10"),
        (lambda: dnn.AttentionPool(8, 10, 4), "num_heads must divide hidden_size; got 4 and 10"),
        (lambda: dnn.CrossAttention(10, 4), "CrossAttention: num_heads must divide dim"),
        (lambda: dnn.Attention3D(8, 0), "Attention3D: num_heads must be at least 1; got 0"),
        (lambda: dnn.Attention3D(8, 2, qk_norm="l2"), "qk_norm must be one of None, 'rms', 'layer'"),
        (lambda: dnn.QKNormRoPE(8, norm="l2"), "QKNormRoPE: norm must be one of None, 'rms'"),
        (lambda: dnn.QKNormRoPE(8, over="row"), "QKNormRoPE: over must be one of 'head', 'hidden'"),
        (lambda: dnn.DiTBlock(8, 2, norm="batch"), "norm must be one of 'layer', 'rms'; got 'batch'"),
        (lambda: dnn.AdaLayerNorm(8, norm_eps=-1), "AdaLayerNorm: eps must be a finite number of"),
        (lambda: dnn.AdaLayerNormSingle(8, eps=-1), "AdaLayerNormSingle: eps must be a finite"),
        (lambda: dnn.DiTBlock(8, 2, norm2_eps=-1), "DiTBlock: eps must be a finite number of at least"),
        (lambda: dnn.CrossAttention(8, 2, eps=-1), "CrossAttention: eps must be a finite number of"),
        (lambda: dnn.FinalLayer(8, (1, 2, 2), 4, eps=-1), "FinalLayer: eps must be a finite number"),
        (lambda: dnn.FinalLayer(8, (1, 0, 2), 4), "patch_size must be at least 1 on each axis"),
        (lambda: dnn.PatchEmbed3D(2), "PatchEmbed3D: patch_size must be 3 ints (t, h, w); got 2"),
        (lambda: dnn.FeedForward(8, 0), "FeedForward: hidden_features must be at least 1; got 0"),
        (lambda: dnn.TimestepEmbedder(8, 2, frequency_shift=1.0), "frequency_shift must be less than"),
        (lambda: dnn.LabelEmbedder(0, 8, 0.1), "LabelEmbedder: num_classes must be at least 1; got 0"),
        (lambda: dnn.LabelEmbedder(3, 8, 2), "LabelEmbedder: dropout_prob must lie in [0, 1]; got 2"),
    ],
)  # fmt: skip
def test_a_layer_says_what_it_cannot_be_made_of(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


@pytest.mark.parametrize(("labels", "dropout"), [([-1, 0], 0.1), ([0, 4], 0.1), ([0, 3], 0.0)])
def test_a_label_out_of_range_is_named(labels, dropout):
    layer, labels = dnn.LabelEmbedder(3, 8, dropout), torch.tensor(labels)  # in training too
    message = rf"labels must lie in \[0, {2 + (dropout > 0)}\]; got values from {labels.min()} to {labels.max()}"
    with pytest.raises(ValueError, match=message):
        layer(labels)
    with pytest.raises(TypeError, match=r"labels must be int64; got torch.float32"):
        layer(labels.float())
    # as on a GPU: the values are not waited for
    assert layer.to("meta")(labels.to("meta")).shape == (2, 8)


def test_layers_compile_whole():
    block, x, c = dnn.DiTBlock(C, H, qk_norm="rms"), torch.randn(B, N, C), torch.randn(B, C)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.2)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    close(compiled(x, c), block(x, c))


@pytest.mark.parametrize("padding", ["left", "gaps"])
def test_a_prompts_real_tokens_may_stand_anywhere(padding):
    """As HF tokenizers pad on the left: the pool sees what a prompt of the real tokens alone has."""
    pool, text = dnn.AttentionPool(24, C, H), torch.randn(2, 5, 24)
    mask = torch.tensor({"left": [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], "gaps": [[1, 0, 1, 0, 1], [0, 1, 1, 0, 0]]}[padding]).bool()  # fmt: skip
    alone = torch.cat([pool(text[i : i + 1, mask[i]]) for i in range(2)])
    close(pool(text, mask), alone)
    close(pool(text.masked_fill(~mask[..., None], 9.0), mask), alone)
