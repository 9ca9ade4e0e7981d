"""What people do with a model, done with a patched one."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
import warnings
from collections import Counter
from pathlib import Path

import diffusers
import peft
import pytest
import torch
from small_models import SMALL, build, inputs, output
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import dit_kernels
from dit_kernels import ops, testing
from dit_kernels.integrations import recognition, shared, sites

WAN = SMALL["wan"]


def close(actual: torch.Tensor, eager: torch.Tensor) -> None:
    """Two float32 runs of one model: within the rule of the one of them taken as exact in bfloat16's place."""
    testing.assert_accurate(actual, eager.double(), eager, dtype=torch.float16)


@pytest.fixture
def wan() -> nn.Module:
    return build(WAN)


@pytest.fixture
def given() -> dict:
    return inputs(WAN)


def test_patching_twice_is_patching_once(wan: nn.Module, given: dict) -> None:
    first, again = dit_kernels.patch(wan), dit_kernels.patch(wan)
    assert first.replaced == again.replaced
    assert first.left == again.left
    assert not any(s.original.__func__ is s.module.forward.__func__ for s in sites.sites(wan))
    with torch.no_grad():
        before = output(build(WAN), given)
        close(output(wan, given), before)
        dit_kernels.unpatch(wan)
        dit_kernels.unpatch(wan)
        assert torch.equal(output(wan, given), before)


def test_models_side_by_side(given: dict, count_ops: Counter) -> None:
    one, two, untouched = build(WAN), build(WAN), build(WAN)
    dit_kernels.patch(one, check=False)
    dit_kernels.patch(two, ops=("adaln",), check=False)
    with torch.no_grad():
        output(untouched, given)
        assert not count_ops
        output(two, given)
        assert set(count_ops) == {"adaln", "gated_adaln", "gated_residual"}
        dit_kernels.unpatch(two)
        count_ops.clear()
        output(one, given)
        assert count_ops == WAN.rows


def test_ops_chooses_kinds_and_the_report_says_so(wan: nn.Module) -> None:
    report = dit_kernels.patch(wan, ops=("qk_norm_rope",))
    assert {op for _, op in report.replaced} == {"qk_norm_rope"}
    assert ("patch_embedding", "patch_embed is not asked for") in report.left
    text = str(report)
    assert "blocks.*.attn1" in text
    assert "patch_embed is not asked for" in text
    assert dit_kernels.patch(wan, ops="qk_norm_rope").replaced == report.replaced


def test_rounding_once_is_nearer_to_float64() -> None:
    model, given = build(SMALL["flux"], torch.bfloat16), inputs(SMALL["flux"], torch.bfloat16)
    with torch.no_grad():
        own = output(model, given)
        dit_kernels.patch(model)
        eager = output(model, given)
        dit_kernels.patch(model, rounding="once")
        once = output(model, given)
    assert torch.equal(eager, own)  # a seed gives the picture that it gave
    assert not torch.equal(once, own)


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(ValueError, match=r"patch: ops must be one of 'adaln', .*; got 'norm'"):
        dit_kernels.patch(nn.Linear(2, 2), ops=("norm",))
    with pytest.raises(ValueError, match="rounding must be one of 'eager', 'once'; got 'twice'"):
        dit_kernels.patch(nn.Linear(2, 2), rounding="twice")
    with pytest.raises(
        TypeError, match=r"must be a torch.nn.Module, or a diffusers pipeline .*; got dict"
    ):
        dit_kernels.patch({})
    assert dit_kernels.patch(nn.Linear(2, 2)).replaced == []


def test_a_wrong_site_is_put_back_with_a_warning_that_names_it(
    wan: nn.Module, given: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = ops.gated_adaln
    with torch.no_grad():
        before = output(wan, given)
        report = dit_kernels.patch(wan)

        def wrong(*args: object, **kwargs: object) -> object:
            x, y = right(*args, **kwargs)
            return x, y * 1.001

        monkeypatch.setattr(ops, "gated_adaln", wrong)
        with pytest.warns(RuntimeWarning) as caught:
            after = output(wan, given)
    assert {str(w.message).split(":")[1].split(" (")[0].strip() for w in caught} == {
        "blocks.0", "blocks.1",
    }  # fmt: skip
    assert "is put back: what goes into linear is off by" in str(caught[0].message)
    assert [site for site, _ in report.replaced if site.endswith("norm3")] == []
    assert next(r for s, r in report.left if s == "blocks.0.norm3").startswith("put back: ")
    close(after, before)


def test_without_the_check_nothing_is_compared(wan: nn.Module, given: dict, monkeypatch) -> None:
    dit_kernels.patch(wan, check=False)
    monkeypatch.setattr(sites.Site, "verify", None)
    output(wan, given)


def test_other_code_under_a_known_name_is_left(wan: nn.Module, given: dict) -> None:
    known = type(wan.blocks[0])

    class WanTransformerBlock(known):
        def forward(self, hidden_states, encoder_hidden_states, temb, rotary_emb):
            return hidden_states + 1

    wan.blocks[1].__class__ = WanTransformerBlock
    with torch.no_grad():
        before = output(wan, given)
        report = dit_kernels.patch(wan)
        close(output(wan, given), before)
    reasons = dict(report.left)
    assert "is not one that the adapter of WanTransformerBlock knows" in reasons["blocks.1"]
    assert "blocks.0.norm1" in dict(report.replaced)


def test_another_attention_processor_takes_over(wan: nn.Module, given: dict, count_ops) -> None:
    dit_kernels.patch(wan, check=False)

    class Own:
        _attention_backend = _parallel_config = None

        def __call__(self, attn, hidden_states, *args):
            return hidden_states

    for block in wan.blocks:
        block.attn1.set_processor(Own())
    with torch.no_grad():
        output(wan, given)
    assert count_ops["qk_norm_rope"] == WAN.rows["qk_norm_rope"] - 2


def test_hooks_on_a_norm_are_called(wan: nn.Module, given: dict) -> None:
    seen = []
    dit_kernels.patch(wan)
    wan.blocks[0].norm1.register_forward_hook(lambda *_: seen.append("norm1"))
    wan.blocks[1].attn1.to_q.register_forward_hook(lambda *_: seen.append("to_q"))
    with torch.no_grad():
        output(wan, given)
    assert set(seen) == {"norm1", "to_q"}


def test_names_saving_and_loading(wan: nn.Module, given: dict, tmp_path: Path) -> None:
    with torch.no_grad():
        before = output(wan, given)
    names = [name for name, _ in wan.named_modules()]
    dit_kernels.patch(wan)
    assert [name for name, _ in wan.named_modules()] == names
    wan.save_pretrained(tmp_path)
    loaded = diffusers.WanTransformer3DModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(output(loaded, given), before)
        dit_kernels.patch(loaded)
        loaded.load_state_dict(wan.state_dict())
        close(output(loaded, given), before)


def test_a_copy_is_a_patched_model_of_its_own(wan: nn.Module, given: dict) -> None:
    dit_kernels.patch(wan)
    with torch.no_grad():
        patched = output(wan, given)
        twin = copy.deepcopy(wan)
        pickled = pickle.loads(pickle.dumps(wan))
        dit_kernels.unpatch(wan)
        assert {s.module for s in sites.sites(twin)} <= set(twin.modules())
        assert len(sites.sites(twin)) == 10
        assert torch.equal(output(twin, given), patched)
        for p in twin.blocks[0].parameters():
            p.zero_()
        assert not torch.equal(output(twin, given), patched)
        dit_kernels.unpatch(twin)
        assert sites.sites(twin) == []
        # pickled whole, a model comes back unpatched
        assert sites.sites(pickled) == []
        assert torch.equal(output(pickled, given), output(wan, given))
        dit_kernels.patch(pickled)
        assert torch.equal(output(pickled, given), patched)


def test_threads_share_a_patched_model(wan: nn.Module, given: dict) -> None:
    with torch.no_grad():
        before = output(wan, given)
    dit_kernels.patch(wan)
    found: list[torch.Tensor] = []

    def call() -> None:
        with torch.no_grad():
            found.append(output(wan, given))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for out in found:
        close(out, before)


@pytest.mark.parametrize("family", ["wan", "flux"])
def test_gradient_checkpointing(family: str, count_ops: Counter) -> None:
    model, given = build(SMALL[family]), inputs(SMALL[family])
    dit_kernels.patch(model)
    output(model, given).square().sum().backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model.enable_gradient_checkpointing()
    count_ops.clear()
    output(model, given).square().sum().backward()
    assert count_ops["gated_adaln"] == 2 * SMALL[family].rows["gated_adaln"]
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, want[name]), name


@pytest.mark.parametrize("family", ["wan", "flux", "cogvideox-5b", "sd3.5"])
def test_compiled_whole(family: str) -> None:
    model, given = build(SMALL[family]), inputs(SMALL[family])
    dit_kernels.patch(model)
    with torch.no_grad():
        want = output(model, given)
        counter = CompileCounterWithBackend("eager")
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        close(output(compiled, given), want)
    assert counter.frame_count == 1


@pytest.mark.parametrize("family", ["wan", "flux"])
def test_compiled_block_by_block_as_often_as_unpatched(family: str) -> None:
    def frames(patched: bool) -> tuple[int, torch.Tensor]:
        model, given = build(SMALL[family]), inputs(SMALL[family])
        if patched:
            dit_kernels.patch(model)
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        with torch.no_grad():
            model.compile_repeated_blocks(fullgraph=True, backend=counter)
            out = output(model, given)
            model.unpatched = output(model, given)
        return counter.frame_count, out

    (plain, want), (fused, got) = frames(False), frames(True)
    assert fused == plain
    close(got, want)


def test_layerwise_casting_before_and_after(given: dict) -> None:
    outputs = []
    for order in ("never", "before", "after"):
        model = build(WAN)
        if order == "after":
            dit_kernels.patch(model)
        model.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
        if order == "before":
            report = dit_kernels.patch(model)
            assert Counter(op for _, op in report.replaced) == WAN.rows
        with torch.no_grad():
            outputs.append(output(model, given))
        assert model.blocks[0].attn1.to_q.weight.dtype == torch.float16
    close(outputs[1], outputs[0])
    close(outputs[2], outputs[0])


@pytest.mark.parametrize("order", ["before", "after"])
def test_offloading_hooks(order: str, given: dict, count_ops: Counter) -> None:
    """accelerate keeps the weights elsewhere (on `meta`) and brings them in for each module's call."""
    accelerate = pytest.importorskip("accelerate", reason="a dev dependency")
    model = build(WAN)
    with torch.no_grad():
        before = output(model, given)
        if order == "after":
            dit_kernels.patch(model)
        accelerate.cpu_offload(model, execution_device="cpu")
        if order == "before":
            report = dit_kernels.patch(model)
            assert Counter(op for _, op in report.replaced) == WAN.rows
        close(output(model, given), before)
        count_ops.clear()
        close(output(model, given), before)
        assert count_ops["gelu_bias"]
        dit_kernels.unpatch(model)
        count_ops.clear()
        assert torch.equal(output(model, given), before)
        assert not count_ops


def test_group_offloading(given: dict) -> None:
    model = build(WAN)
    with torch.no_grad():
        before = output(model, given)
        dit_kernels.patch(model)
        model.enable_group_offload(
            onload_device=torch.device("cpu"), offload_type="leaf_level", use_stream=False
        )
        close(output(model, given), before)
        dit_kernels.unpatch(model)
        assert torch.equal(output(model, given), before)


LORA = peft.LoraConfig(r=2, target_modules=["to_q", "to_v", "to_out.0", "net.2", "net.0.proj"])


@pytest.mark.parametrize("order", ["before", "after"])
def test_lora(order: str, given: dict, count_ops: Counter) -> None:
    model, plain = build(WAN), build(WAN)
    torch.manual_seed(0)
    plain.add_adapter(LORA)
    if order == "after":
        dit_kernels.patch(model)
    torch.manual_seed(0)
    model.add_adapter(LORA)
    if order == "before":
        dit_kernels.patch(model)
    for one in (model, plain):
        for name, p in one.named_parameters():
            if "lora_B" in name:
                p.data.fill_(0.1)
    want, got = output(plain, given), output(model, given)
    close(got, want)
    want.square().sum().backward()
    got.square().sum().backward()
    grads = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    assert grads
    assert all("lora" in name for name in grads)
    found = dict(model.named_parameters())
    close(*(torch.cat([g.flatten() for g in side]) for side in (
        [found[name].grad for name in grads], grads.values())))  # fmt: skip
    assert list(model.state_dict()) == list(plain.state_dict())
    count_ops.clear()
    output(model, given)
    assert count_ops["gated_adaln"] == WAN.rows["gated_adaln"]
    model.delete_adapters("default")
    dit_kernels.unpatch(model)
    with torch.no_grad():
        assert torch.equal(output(model, given), output(build(WAN), given))


def test_a_lora_fine_tune_follows_the_same_losses(given: dict) -> None:
    target = torch.randn(given["hidden_states"].shape, generator=torch.Generator().manual_seed(3))

    def losses(patched: bool) -> torch.Tensor:
        model = build(WAN)
        torch.manual_seed(0)
        model.add_adapter(LORA)
        if patched:
            dit_kernels.patch(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=2e-3)
        found = []
        for _ in range(20):
            loss = (output(model, given) - target).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.detach())
        return torch.stack(found)

    want, got = losses(False), losses(True)
    assert want[-1] < want[0]
    close(got, want)


class _Int8(torch.Tensor):
    """A weight kept in int8, as quantised models keep them: it only knows F.linear."""

    @staticmethod
    def __new__(cls, weight: torch.Tensor) -> _Int8:
        return torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype)

    def __init__(self, weight: torch.Tensor) -> None:
        self.scale = weight.abs().amax(1, keepdim=True) / 127
        self.values = (weight / self.scale).round().to(torch.int8)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.linear:
            x, weight, *bias = args
            full = weight.values.to(x.dtype) * weight.scale.to(x.dtype)
            return torch.nn.functional.linear(x, full, *bias)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"{function} reads a quantised weight")


def test_quantised_linears(given: dict) -> None:
    model = build(WAN)
    for module in model.blocks.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(_Int8(module.weight.detach()), requires_grad=False)
    given["hidden_states"].requires_grad_()
    want = output(model, given)
    report = dit_kernels.patch(model)
    got = output(model, given)
    assert Counter(op for _, op in report.replaced) == WAN.rows
    close(got, want)
    (dx,) = torch.autograd.grad(got.square().sum(), given["hidden_states"])
    (want_dx,) = torch.autograd.grad(want.square().sum(), given["hidden_states"])
    close(dx, want_dx)


def test_attention_backends_stay_the_users(wan: nn.Module, given: dict) -> None:
    dit_kernels.patch(wan)
    with torch.no_grad():
        before = output(wan, given)
        wan.set_attention_backend("_native_math")
        assert {str(p._attention_backend.value) for p in wan.attn_processors.values()} == {
            "_native_math"
        }
        close(output(wan, given), before)


def test_fused_qkv_projections(wan: nn.Module, given: dict) -> None:
    with torch.no_grad():
        before = output(wan, given)
        dit_kernels.patch(wan)
        wan.fuse_qkv_projections()
        close(output(wan, given), before)


def test_autocast_is_checked_apart(wan: nn.Module, given: dict) -> None:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("error", message="dit_kernels.patch")
        plain = build(WAN)
        with torch.autocast("cpu", torch.bfloat16):
            want = output(plain, given)
            dit_kernels.patch(wan)
            got = output(wan, given)
        oracle = output(plain, given)
    testing.assert_accurate(got, oracle.double(), want, dtype=torch.bfloat16)


def test_fingerprints_do_not_see_comments_types_and_docstrings() -> None:
    def one(x: int, *, y: float = 2.0) -> float:
        """A docstring."""
        z: float = x * y  # a comment
        return z

    plain = one

    def one(x, *, y=2.0):
        z = x * y
        return z  # noqa: RET504

    assert recognition.fingerprint(plain) == recognition.fingerprint(one)

    def one(x, *, y=2.0):
        z = x + y
        return z  # noqa: RET504

    assert recognition.fingerprint(plain) != recognition.fingerprint(one)
    assert recognition.fingerprint(len) == ""


def test_a_strided_convolution_is_no_patch_embedding() -> None:
    for convolution in (
        nn.Conv2d(2, 3, 2), nn.Conv2d(2, 4, 2, 2, groups=2), nn.Conv2d(2, 3, 2, 2, padding=1),
        nn.Conv2d(2, 3, 2, 2, dilation=2), nn.Conv2d(2, 3, 1, 1),
    ):  # fmt: skip
        assert shared.patch_convolution(convolution) is None
    assert shared.patch_convolution(nn.Conv3d(2, 3, (1, 2, 2), (1, 2, 2))) is not None


def test_the_signature_of_a_forward_stays(wan: nn.Module) -> None:
    dit_kernels.patch(wan)
    block = wan.blocks[0]
    assert inspect.signature(block.forward) == inspect.signature(type(block).forward.__get__(block))
