"""qk_norm_rope and rope_3d against diffusers' rotary code and torch's norms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dit_kernels import ops

B, N, H, D = 2, 12, 3, 16


def heads(tokens=N, count=H, dim=D, dtype=torch.float64):
    return torch.randn(B, tokens, count, dim, dtype=dtype)


def turn_by_complex_numbers(x, cos, sin):
    """Neighbouring channels as a complex number, times e^(i angle)."""
    number = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    turned = number * torch.complex(cos, sin)[None, :, None]
    return torch.view_as_real(turned).flatten(-2)


def angles(tokens=N, width=D // 2):
    angle = 6 * torch.rand(tokens, width, dtype=torch.float64)
    return angle.cos(), angle.sin()


def test_interleaved_rotation_is_a_complex_product():
    q, k, (cos, sin) = heads(), heads(count=1), angles()
    got_q, got_k = ops.qk_norm_rope(q, k, norm=None, cos=cos, sin=sin)
    torch.testing.assert_close(got_q, turn_by_complex_numbers(q, cos, sin))
    torch.testing.assert_close(got_k, turn_by_complex_numbers(k, cos, sin))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_diffusers_flux_rotary_bit_for_bit(dtype):
    from diffusers.models.embeddings import apply_rotary_emb

    q = heads(dtype=dtype)
    cos, sin = (t.float() for t in angles())
    wide = tuple(t.repeat_interleave(2, dim=1) for t in (cos, sin))
    expected = apply_rotary_emb(q, wide, sequence_dim=1)
    got, _ = ops.qk_norm_rope(q, norm=None, cos=cos, sin=sin, rounding="eager")
    assert torch.equal(got, expected)


def test_diffusers_half_rotary():
    """use_real_unbind_dim=-2 rotates (i, i + D / 2), as Cosmos does."""
    from diffusers.models.embeddings import apply_rotary_emb

    q = heads(dtype=torch.float32)
    cos, sin = (t.float() for t in angles())
    wide = tuple(torch.cat((t, t), dim=1) for t in (cos, sin))
    expected = apply_rotary_emb(q, wide, use_real_unbind_dim=-2, sequence_dim=1)
    got, _ = ops.qk_norm_rope(q, norm=None, cos=cos, sin=sin, layout="half", rounding="eager")
    assert torch.equal(got, expected)


def test_diffusers_allegro_rotary():
    """Each third of a head is turned by its own axis, half against half."""
    from diffusers.models.attention_processor import AllegroAttnProcessor2_0  # noqa: F401
    from diffusers.models.embeddings import apply_rotary_emb_allegro

    grid, dim = (2, 2, 3), 24
    q = torch.randn(B, H, 12, dim)
    t, h, w = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    frequency = 10000.0 ** -(torch.arange(0, 8, 2).float() / 8)
    tables = []
    for length in (max(grid) + 1,) * 3:
        angle = torch.outer(torch.arange(length).float(), frequency)
        wide = torch.cat((angle, angle), dim=1)
        tables.append((wide.cos(), wide.sin()))
    positions = tuple(axis.flatten()[None].expand(B, -1) for axis in (t, h, w))
    expected = apply_rotary_emb_allegro(q, tables, positions)
    cos, sin = ops.rope_3d(grid, (8, 8, 8))
    got, _ = ops.qk_norm_rope(
        q.transpose(1, 2), norm=None, cos=cos, sin=sin, layout="half", sections=3
    )
    torch.testing.assert_close(got.transpose(1, 2), expected, rtol=1e-5, atol=1e-5)


def test_diffusers_wan_table():
    from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

    grid = (3, 4, 5)
    theirs_cos, theirs_sin = WanRotaryPosEmbed(128, (1, 2, 2), 32)(torch.zeros(1, 1, 3, 8, 10))
    cos, sin = ops.rope_3d(grid, (44, 42, 42))
    assert cos.dtype == torch.float32
    torch.testing.assert_close(cos, theirs_cos[0, :, 0, ::2].float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sin, theirs_sin[0, :, 0, 1::2].float(), rtol=1e-6, atol=1e-6)


def test_rope_3d_by_hand():
    cos, _ = ops.rope_3d((2, 3, 4), (4, 2, 2), 100.0, offset=(1, 0, -2))
    assert cos.shape == (24, 4)
    # token (t, h, w) = (1, 2, 3) is the last; positions 2, 2, 1
    expected = torch.tensor([2.0, 2.0 / 10.0, 2.0, 1.0]).cos()
    torch.testing.assert_close(cos[-1], expected)


@pytest.mark.parametrize("over", ["head", "hidden"])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_norms_are_torchs(norm, over):
    q, k = heads(), heads(count=2)
    size = {"head": (D, D), "hidden": (H * D, 2 * D)}[over]
    weights = [torch.randn(n, dtype=torch.float64) for n in size]
    biases = [torch.randn(n, dtype=torch.float64) for n in size]
    got = ops.qk_norm_rope(
        q, k, norm=norm, over=over, q_weight=weights[0], k_weight=weights[1], q_bias=biases[0],
        k_bias=biases[1], eps=1e-5,
    )  # fmt: skip
    for x, y, weight, bias in zip((q, k), got, weights, biases, strict=True):
        row = x if over == "head" else x.flatten(2)
        if norm == "layer":
            expected = F.layer_norm(row, row.shape[-1:], weight, bias, 1e-5)
        else:
            expected = F.rms_norm(row, row.shape[-1:], weight, 1e-5) + bias
        torch.testing.assert_close(y, expected.view(x.shape), rtol=1e-12, atol=1e-12)


def test_only_the_rotated_range_turns():
    q, (cos, sin) = heads(), angles(5)
    got, none = ops.qk_norm_rope(q, norm=None, cos=cos, sin=sin, rope_start=3, rope_len=5)
    assert none is None
    assert torch.equal(got[:, :3], q[:, :3])
    assert torch.equal(got[:, 8:], q[:, 8:])
    torch.testing.assert_close(got[:, 3:8], turn_by_complex_numbers(q[:, 3:8], cos, sin))


def test_the_first_2r_channels_turn():
    q, (cos, sin) = heads(), angles(width=3)
    got, _ = ops.qk_norm_rope(q, norm=None, cos=cos, sin=sin)
    assert torch.equal(got[..., 6:], q[..., 6:])
    torch.testing.assert_close(got[..., :6], turn_by_complex_numbers(q[..., :6], cos, sin))


def test_learned_angles_get_gradients():
    """Mochi learns its frequencies, a head its own."""
    cos, sin = (
        torch.randn(1, N, H, D // 2, dtype=torch.float64, requires_grad=True) for _ in range(2)
    )
    q = heads()
    assert torch.autograd.gradcheck(
        lambda c, s: ops.qk_norm_rope(q, cos=c, sin=s)[0], (cos, sin), fast_mode=True
    )


def test_relu_stands_between_norm_and_rotation():
    q, (cos, sin) = heads(), angles()
    expected = turn_by_complex_numbers(F.rms_norm(q, (D,), eps=1e-6).relu(), cos, sin)
    got, _ = ops.qk_norm_rope(q, act="relu", cos=cos, sin=sin)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


Q = torch.randn(2, 12, 4, 16)
TABLE = torch.ones(12, 8)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"q": Q[0]}, ValueError, "qk_norm_rope: q must be [B, N, H, D]; got [12, 4, 16]"),
        ({"k": Q[:1]}, ValueError, "qk_norm_rope: k must be [B, N, H', D] like q"),
        (
            {"k": Q[:, :5], "cos": TABLE, "sin": TABLE},
            ValueError,
            "of another length only without cos",
        ),
        ({"cos": TABLE}, ValueError, "cos and sin come together"),
        (
            {"cos": TABLE[:5], "sin": TABLE[:5]},
            ValueError,
            "with L = 12 and R <= D / 2 = 8; got [5, 8]",
        ),
        (
            {"cos": torch.ones(12, 9), "sin": torch.ones(12, 9)},
            ValueError,
            "R <= D / 2 = 8; got [12, 9]",
        ),
        ({"q_weight": torch.ones(8)}, ValueError, "q_weight must be [D] = [16]; got [8]"),
        (
            {"q_weight": torch.ones(16), "over": "hidden"},
            ValueError,
            "q_weight must be [H * D] = [64]",
        ),
        ({"q_weight": torch.ones(16), "norm": None}, ValueError, "q_weight needs a norm"),
        ({"k_weight": torch.ones(16)}, ValueError, "k_weight and k_bias need k"),
        (
            {"rope_start": 20, "cos": TABLE, "sin": TABLE},
            ValueError,
            "must lie within the 12 tokens",
        ),
        ({"sections": 3, "cos": TABLE, "sin": TABLE}, ValueError, "sections must divide D and R"),
        (
            {"rope_start": 0.0, "cos": TABLE, "sin": TABLE},
            TypeError,
            "rope_start must be an int; got float",
        ),
        ({"layout": "pairs"}, ValueError, "layout must be one of 'interleaved', 'half'"),
        ({"eps": -1.0}, ValueError, "eps must be a finite number of at least 0; got -1.0"),
        ({"act": "gelu"}, ValueError, "act must be one of None, 'relu'"),
        (
            {"q": Q.long()},
            TypeError,
            "q must be float32, bfloat16, float16 or float64; got torch.int64",
        ),
    ],
)
def test_errors_say_what_was_expected(kwargs, error, message):
    with pytest.raises(error) as caught:
        ops.qk_norm_rope(**{"q": Q, **kwargs})
    assert message in str(caught.value)


def test_rope_3d_errors():
    with pytest.raises(ValueError, match="dims must be even"):
        ops.rope_3d((1, 2, 3), (3, 4, 4))
    with pytest.raises(ValueError, match="grid must be 3 ints"):
        ops.rope_3d((2, 3), (4, 4, 4))
    for grid in ("abc", (1.0, 2.0, 3.0)):
        with pytest.raises(TypeError, match="grid must be 3 ints"):
            ops.rope_3d(grid, (4, 4, 4))
    with pytest.raises(ValueError, match="theta must be a finite number above 0; got 0"):
        ops.rope_3d((1, 2, 3), (4, 4, 4), theta=0)
    with pytest.raises(TypeError, match="offset must be a number; got 'a'"):
        ops.rope_3d((1, 2, 3), (4, 4, 4), offset=(0, "a", 0))
