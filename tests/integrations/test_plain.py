"""Models of facebookresearch/DiT's form, recognised by what they compute."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

import dit_kernels
from dit_kernels import testing

WIDTH = 24


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2).flatten(2)


class Mlp(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(WIDTH, 4 * WIDTH)
        self.act = nn.GELU(approximate="tanh")
        self.drop = nn.Dropout(dropout)
        self.fc2 = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.drop(self.act(self.fc1(x))))


def modulation(count: int) -> nn.Module:
    return nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, count * WIDTH))


class Block(nn.Module):
    affine = False

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, eps=1e-6, elementwise_affine=self.affine)
        self.attn = Attention()
        self.norm2 = nn.LayerNorm(WIDTH, eps=1e-6, elementwise_affine=self.affine)
        self.mlp = Mlp(dropout)
        self.adaLN_modulation = modulation(6)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        rows = self.adaLN_modulation(c)[:, None].chunk(6, -1)
        for norm, layer, (shift, scale, gate) in (
            (self.norm1, self.attn, rows[:3]),
            (self.norm2, self.mlp, rows[3:]),
        ):
            x = x + gate * layer(norm(x) * (1 + scale) + shift)
        return x


class Last(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(WIDTH, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(WIDTH, 8)
        self.adaLN_modulation = modulation(2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, -1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class Model(nn.Module):
    def __init__(self, block: type[nn.Module] = Block) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, WIDTH, 2, stride=2)
        self.blocks = nn.ModuleList(block() for _ in range(2))
        self.last = Last()

    def forward(self, video: Tensor, c: Tensor) -> Tensor:
        x = self.embed(video).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x, c)
        return self.last(x, c)


ROWS = {"patch_embed": 1, "adaln": 3, "gated_adaln": 2, "gated_residual": 2, "gelu_bias": 2}


def given(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = (2, 3, 6, 4), (2, WIDTH)
    return tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes)  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_and_gradients_by_the_accuracy_rule(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Model().to(dtype)
    patched, oracle = copy.deepcopy(model), copy.deepcopy(model).double()
    report = dit_kernels.patch(patched)
    assert Counter(op for _, op in report.replaced) == ROWS
    assert not report.left
    results = []
    for one in (patched, oracle, model):
        inputs = [value.to(next(one.parameters()).dtype) for value in given(dtype)]
        out = one(*inputs)
        out.square().sum().backward()
        # their scale: all gradients have a part in the sum of errors
        grads = [p.grad.double().flatten() / p.numel() ** 0.5 for p in one.parameters()]
        results.append((out, torch.cat(grads)))
    testing.assert_accurate(*(out for out, _ in results), "output")
    testing.assert_accurate(*(grads for _, grads in results), "gradients", dtype=dtype)
    dit_kernels.unpatch(patched)
    assert torch.equal(patched(*given(dtype)), model(*given(dtype)))


def test_as_many_op_calls_as_the_report_says(count_ops: Counter) -> None:
    model = Model()
    dit_kernels.patch(model, check=False)
    with torch.no_grad():
        model(*given(torch.float32))
    assert count_ops == ROWS


class ScaleFirst(Block):
    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        rows = self.adaLN_modulation(c)[:, None].chunk(6, -1)
        for norm, layer, (scale, shift, gate) in (
            (self.norm1, self.attn, rows[:3]),
            (self.norm2, self.mlp, rows[3:]),
        ):
            x = x + gate * layer(norm(x) * (1 + scale) + shift)
        return x


class SomethingMore(Block):
    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return super().forward(x, c) + 1e-3 * x


class Masked(Block):
    def forward(self, x: Tensor, c: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, c)


class Affine(Block):
    affine = True


class Failing(Block):
    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        if x.shape[-1] != WIDTH:
            raise RuntimeError("another width")
        return super().forward(x, c)


@pytest.mark.parametrize("kind", [ScaleFirst, SomethingMore, Masked, Affine, Failing])
def test_another_formula_is_left_alone(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = Model(kind)
    with torch.no_grad():
        before = [block(torch.ones(1, 4, WIDTH), torch.ones(1, WIDTH)) for block in model.blocks]
    report = dit_kernels.patch(model, ops=("adaln",))
    assert [site for site, op in report.replaced] == ["last.norm_final"]
    assert {site for site, _ in report.left} >= {
        f"blocks.{i}.norm{j}" for i in (0, 1) for j in (1, 2)
    }
    with torch.no_grad():
        after = [block(torch.ones(1, 4, WIDTH), torch.ones(1, WIDTH)) for block in model.blocks]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_dropout_that_drops_is_not_skipped(count_ops: Counter) -> None:
    mlp = Mlp(0.5)
    dit_kernels.patch(mlp, check=False)
    x = torch.randn(1, 4, WIDTH)
    with torch.no_grad():
        mlp.train()(x)
        assert not count_ops
        mlp.eval()(x)
    assert count_ops == {"gelu_bias": 1}
