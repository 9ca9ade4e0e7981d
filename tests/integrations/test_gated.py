"""Feed-forwards whose gate is a Linear of its own (Lumina 2, Z-Image)."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention import LuminaFeedForward
from torch import Tensor, nn

import dit_kernels
from dit_kernels import testing
from dit_kernels.integrations.gated import halves


def linears(dtype: torch.dtype = torch.float64) -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    first, second = (nn.Linear(6, 5, bias=False, dtype=dtype) for _ in range(2))
    return first, second


def feed_forward() -> nn.Module:
    torch.manual_seed(0)
    return LuminaFeedForward(8, 16, multiple_of=4)


def both(x: Tensor, first: nn.Linear, second: nn.Linear) -> Tensor:
    return torch.cat([first(x), second(x)], -1)


@pytest.mark.parametrize("size", [(4, 6), (2, 3, 6), (2, 0, 6)], ids=str)
def test_halves_are_both_products(size: tuple[int, ...]) -> None:
    x = torch.randn(size, dtype=torch.float64, requires_grad=True)
    first, second = linears()
    wanted = (x, first.weight, second.weight)
    y, plain = halves(x, first, second), both(x, first, second)
    dy = torch.randn_like(y)
    torch.testing.assert_close(y, plain)
    torch.testing.assert_close(
        torch.autograd.grad(y, wanted, dy), torch.autograd.grad(plain, wanted, dy)
    )
    with torch.no_grad():
        assert torch.equal(halves(x, first, second), y)


def test_second_derivatives_and_forward_mode() -> None:
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    first, second = linears()
    assert torch.autograd.gradgradcheck(lambda x: halves(x, first, second).sin(), x)
    x = x.detach()
    given, tangent = (x,), (torch.randn_like(x),)
    found = torch.func.jvp(lambda x: halves(x, first, second), given, tangent)
    assert torch.equal(found[1], both(tangent[0], first, second))


def test_only_the_gradients_that_are_wanted() -> None:
    x = torch.randn(3, 6, dtype=torch.float64)
    first, second = linears()
    second.weight.requires_grad_(False)
    halves(x, first, second).sum().backward()
    assert first.weight.grad is not None
    assert second.weight.grad is None


def saved(model: nn.Module, x: Tensor) -> int:
    """Bytes that a forward keeps beside the weights and x."""
    own = {p.data_ptr() for p in (x, *model.parameters())}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    return sum(kept.values())


def test_training_keeps_the_pre_activations_alone() -> None:
    model, x = feed_forward(), torch.randn(2, 3, 8, requires_grad=True)
    before = saved(model, x)
    dit_kernels.patch(model)
    model(x)  # the check
    assert saved(model, x) == 2 * 3 * 2 * 16 * 4 < before


def test_the_result_under_autocast_and_compile() -> None:
    model, x = feed_forward(), torch.randn(2, 3, 8)
    plain = copy.deepcopy(model)
    dit_kernels.patch(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x), plain(x))  # the model's own code serves
    exact = copy.deepcopy(plain).double()(x.double())
    whole = torch.compile(model, fullgraph=True, backend="aot_eager")
    testing.assert_accurate(whole(x), exact, plain(x))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: setattr(m, "linear_3", nn.Linear(8, 16)), "its linear_3 has a bias"),
        (lambda m: setattr(m, "silu", nn.ReLU()), "its activation ReLU is not one that the op has"),
    ],
    ids=["bias", "activation"],
)
def test_another_formula_is_left(change: object, reason: str) -> None:
    model = feed_forward()
    change(model)  # type: ignore[operator]
    report = dit_kernels.patch(model)
    assert (report.replaced, report.left) == ([], [("", reason)])


def test_a_hooked_linear_is_called() -> None:
    model, x = feed_forward(), torch.randn(2, 3, 8)
    dit_kernels.patch(model, check=False)
    calls = []
    model.linear_3.register_forward_hook(lambda *given: calls.append(1))
    y = model(x)
    assert len(calls) == 1
    h = F.silu(model.linear_1(x)) * model.linear_3(x)
    torch.testing.assert_close(y, model.linear_2(h))
