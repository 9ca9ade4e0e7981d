"""gelu_bias and swiglu against torch's activations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dit_kernels import ops

X, BIAS = torch.randn(3, 5, 24, dtype=torch.float64), torch.randn(24, dtype=torch.float64)


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_gelu(approximate):
    expected = F.gelu(X + BIAS, approximate=approximate)
    torch.testing.assert_close(ops.gelu_bias(X, BIAS, approximate=approximate), expected)
    expected = F.gelu(X, approximate=approximate)
    torch.testing.assert_close(ops.gelu_bias(X, approximate=approximate), expected)


def test_swiglu():
    a, b = (X + BIAS).chunk(2, dim=-1)
    torch.testing.assert_close(ops.swiglu(X, BIAS), F.silu(a) * b)
    torch.testing.assert_close(ops.swiglu(X, BIAS, gate="second"), a * F.silu(b))


def test_the_bias_is_added_before_rounding():
    x, bias = X.bfloat16(), BIAS.bfloat16()
    expected = F.gelu(x.float() + bias.float(), approximate="tanh").bfloat16()
    assert torch.equal(ops.gelu_bias(x, bias), expected)


def test_errors_say_what_was_expected():
    with pytest.raises(ValueError, match=r"gelu_bias: bias must be \[F\] = \[24\]; got \[12\]"):
        ops.gelu_bias(X, BIAS[:12])
    with pytest.raises(ValueError, match=r"swiglu: x must be \[..., 2F\]; got \[3, 5, 23\]"):
        ops.swiglu(X[..., :23])
    with pytest.raises(ValueError, match="approximate must be one of 'tanh', 'none'; got 'erf'"):
        ops.gelu_bias(X, approximate="erf")
    with pytest.raises(ValueError, match="gate must be one of"):
        ops.swiglu(X, gate="third")
    with pytest.raises(TypeError, match="gelu_bias: x must be float32"):
        ops.gelu_bias(X.int())
