"""What the DiT says of arguments that it cannot take."""

from __future__ import annotations

import pytest
import torch

from dit_kernels.models import DiT_models
from tests.test_models import small

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
