"""patch_embed, unpatchify and final_layer against torch's convolution and the original DiT's einsum."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F

from dit_kernels import ops


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 1, 3), (4, 6, 3), (1, 1, 1)], ids=str)
def test_patch_embed_is_a_convolution(patch):
    video, weight, bias = (
        randn(2, 3, 4, 6, 9 if patch[2] == 3 else 8),
        randn(20, 3, *patch),
        randn(20),
    )
    expected = F.conv3d(video, weight, bias, stride=patch).flatten(2).transpose(1, 2)
    pos = randn(expected.shape[1], 20)
    close(ops.patch_embed(video, weight, bias), expected)
    close(ops.patch_embed(video, weight, bias, pos_embed=pos), expected + pos)
    close(ops.patch_embed(video, weight, pos_embed=pos[None]), expected - bias + pos)


def test_patch_embed_of_an_image():
    image, weight, bias = randn(2, 4, 6, 8), randn(24, 4, 2, 2), randn(24)
    expected = F.conv2d(image, weight, bias, stride=2).flatten(2).transpose(1, 2)
    close(ops.patch_embed(image, weight, bias), expected)


def test_unpatchify_is_the_original_einsum():
    tokens = randn(2, 12, 2 * 2 * 5)
    parts = tokens.reshape(2, 3, 4, 2, 2, 5)
    expected = torch.einsum("nhwpqc->nchpwq", parts).reshape(2, 5, 6, 8)
    close(ops.unpatchify(tokens, (1, 3, 4), (1, 2, 2), 5)[:, :, 0], expected)


@pytest.mark.parametrize("layout", ["t h w c", "c t h w", "h w t c", "w c h t"])
def test_unpatchify_puts_every_value_in_its_place(layout):
    grid, patch, channels = (2, 3, 2), (2, 1, 3), 4
    sizes = dict(zip("thwc", (*patch, channels), strict=True))
    tokens = randn(2, 12, 24)
    video = ops.unpatchify(tokens, grid, patch, channels, layout=layout)
    parts = tokens.view(2, *grid, *(sizes[axis] for axis in layout.split()))
    for _ in range(60):
        b, c, f, y, x = (int(torch.randint(n, ())) for n in video.shape)
        inside = {"t": f % 2, "h": 0, "w": x % 3, "c": c}
        expected = parts[(b, f // 2, y, x // 3, *(inside[axis] for axis in layout.split()))]
        assert video[b, c, f, y, x] == expected


def test_unpatchify_undoes_patches():
    """An identity projection cuts the video; unpatchify puts it together."""
    video, patch = randn(2, 3, 4, 6, 8), (2, 3, 2)
    width = 3 * 12
    weight = torch.eye(width, dtype=torch.float64).view(width, 3, *patch)
    tokens = ops.patch_embed(video, weight)
    assert torch.equal(ops.unpatchify(tokens, (2, 2, 4), patch, 3, layout="c t h w"), video)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_final_layer_is_its_parts(norm):
    x, shift, scale = randn(2, 12, 48), randn(2, 3, 48), randn(2, 3, 48)
    weight, bias, grid, patch = randn(24, 48), randn(24), (3, 2, 2), (2, 2, 2)
    y = ops.adaln(x, shift, scale, norm=norm, eps=1e-5)
    expected = ops.unpatchify(F.linear(y, weight, bias), grid, patch, 3, layout="c t h w")
    got = ops.final_layer(
        x, shift, scale, weight, bias, grid, patch, 3, layout="c t h w", norm=norm, eps=1e-5
    )
    close(got, expected)


VIDEO, WEIGHT = torch.randn(1, 3, 4, 6, 8), torch.randn(16, 3, 2, 2, 2)
TOKENS = torch.randn(1, 12, 16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.patch_embed(VIDEO, WEIGHT[0]), "video must be [B, Cin, F, Y, X] with weight"),
        (
            lambda: ops.patch_embed(VIDEO[:, :2], WEIGHT),
            "video has 2 channels; weight [16, 3, 2, 2, 2] takes 3",
        ),
        (
            lambda: ops.patch_embed(VIDEO[:, :, :3], WEIGHT),
            "the patch [2, 2, 2] must divide the video",
        ),
        (
            lambda: ops.patch_embed(VIDEO, WEIGHT[:, :, :0]),
            "the patch [0, 2, 2] must divide the video (F, Y, X); got [4, 6, 8]",
        ),
        (
            lambda: ops.patch_embed(VIDEO, WEIGHT, pos_embed=torch.ones(5, 16)),
            "pos_embed must be [N, C] = [24, 16]; got [5, 16]",
        ),
        (
            lambda: ops.unpatchify(TOKENS, (1, 3, 3), (1, 2, 2), 4),
            "N = 9 for grid (1, 3, 3); got [1, 12, 16]",
        ),
        (lambda: ops.unpatchify(TOKENS, (1, 3, 4), (1, 2, 2), 3), "pt * ph * pw * channels = 12]"),
        (
            lambda: ops.unpatchify(TOKENS, (1, 3, 4), (1, 2, 2), 4, layout="t h w"),
            "layout must hold t, h, w and c once each; got 't h w'",
        ),
        (
            lambda: ops.final_layer(
                TOKENS, None, torch.ones(2, 16), torch.ones(16, 16), None, (1, 3, 4), (1, 2, 2), 4
            ),
            "final_layer: scale must be [B, C], [B, G, C] with G | N, or [B, N, C]; got [2, 16]",
        ),
        (
            lambda: ops.final_layer(
                TOKENS, None, None, torch.ones(8, 16), None, (1, 3, 4), (1, 2, 2), 4
            ),
            "final_layer: weight must be [pt * ph * pw * channels, C] = [16, 16]; got [8, 16]",
        ),
        (
            lambda: ops.final_layer(
                TOKENS, None, None, torch.ones(16, 16), None, (1, 3, 4), (1, 2, 2), 4, eps=-1.0
            ),
            "final_layer: eps must be a finite number of at least 0; got -1.0",
        ),
    ],
)
def test_errors_say_what_was_expected(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"channels": 4.0}, "channels must be an int; got float"),
        (
            {"layout": ("t", "h", "w", "c")},
            "layout must be a string such as 't h w c'; got ('t', 'h'",
        ),
        ({"patch_size": (1, 2, 2.0)}, "patch_size must be 3 ints (t, h, w); got (1, 2, 2.0)"),
    ],
)
def test_errors_of_types_say_what_was_expected(given, message):
    with pytest.raises(TypeError, match=re.escape(f"unpatchify: {message}")):
        ops.unpatchify(
            TOKENS, **{"grid": (1, 3, 4), "patch_size": (1, 2, 2), "channels": 4, **given}
        )
