"""A patched model that is changed, watched or called in an unusual way does what it would do unpatched."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
from diffusers import hooks
from diffusers.models.normalization import AdaLayerNorm, FP32LayerNorm, RMSNorm
from small_models import SMALL, build, inputs, output
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

import dit_kernels
from dit_kernels import testing
from dit_kernels.integrations.sites import sites

WAN = SMALL["wan"]


@pytest.fixture(autouse=True)
def _nothing_is_put_back() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="dit_kernels.patch")
        yield


def close(actual: Tensor, eager: Tensor) -> None:
    """Two float32 runs of one model, by the accuracy rule at float16: what is wrong is off by more."""
    testing.assert_accurate(actual, eager.double(), eager, dtype=torch.float16)


def twins(family: str) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """The same model unpatched and patched, and inputs."""
    plain, model = build(SMALL[family]), build(SMALL[family])
    dit_kernels.patch(model)
    return plain, model, inputs(SMALL[family])


@pytest.mark.parametrize(
    "family",
    ["flux", "wan", "sd3.5", "hunyuan-video-i2v", "qwen-image", "flux2", "cogvideox", "lumina2", "dit"],
)  # fmt: skip
def test_one_time_for_the_whole_batch(family: str) -> None:
    """Modulation of one sample, which the models' own code broadcasts."""
    plain, model, given = twins(family)
    for name in ("timestep", "pooled_projections", "guidance", "class_labels"):
        if name in given:
            given[name] = given[name][:1]
    with torch.no_grad():
        close(output(model, given), output(plain, given))


def test_one_time_for_images_to_edit() -> None:
    small = SMALL["qwen-image"]
    small = type(small)(small.kind, small.config | {"zero_cond_t": True}, small.inputs)
    model, given = build(small), inputs(small)
    given |= {"timestep": torch.tensor([0.7]), "img_shapes": [[(1, 2, 4), (1, 2, 2)]] * 2}
    with torch.no_grad():
        want = output(model, given)
        dit_kernels.patch(model)
        close(output(model, given), want)


def test_another_norm_than_at_patch_is_called() -> None:
    *models, given = twins("wan")
    found = []
    for model in models:
        with torch.no_grad():
            output(model, given)  # checked
            for block in model.blocks:
                block.norm1, block.norm3 = nn.Identity(), nn.RMSNorm(24)
            found.append(output(model, given))
    close(found[1], found[0])


def test_norms_that_peft_has_wrapped_are_trained() -> None:
    config = peft.LNTuningConfig(target_modules=["norm1.norm", "norm2.norm", "norm_q"])
    plain, model, given = twins("cogvideox")
    found = []
    for one in (plain, model):
        one.requires_grad_(False)
        with torch.no_grad():
            output(one, given)
        peft.inject_adapter_in_model(config, one)
        tuned = {name: p for name, p in one.named_parameters() if "ln_tuning" in name}
        for p in tuned.values():
            p.data.mul_(1.5)
            p.requires_grad_()
        out = output(one, given)
        grads = torch.autograd.grad(out.square().mean(), tuned.values())
        found.append((out, torch.cat([g.flatten() for g in grads])))
    for got, want in zip(found[1], found[0], strict=True):
        close(got.detach(), want.detach())


def test_a_bias_and_an_activation_that_came_later() -> None:
    plain, model, given = twins("lumina2")
    torch.manual_seed(0)
    first, second = (block.feed_forward for block in model.layers)
    first.linear_3, second.silu = nn.Linear(32, first.linear_3.out_features), nn.ReLU()
    plain.layers[0].feed_forward.linear_3 = copy.deepcopy(first.linear_3)
    plain.layers[1].feed_forward.silu = nn.ReLU()
    with torch.no_grad():
        close(output(model, given), output(plain, given))


def test_every_hook_sees_each_call_once_and_in_the_models_dtype() -> None:
    for family in ("wan", "flux", "kandinsky-5", "flux2", "lumina2"):
        seen: list[Counter] = []
        for model in twins(family)[:2]:
            seen.append(Counter())
            for name, module in model.named_modules():
                module.register_forward_pre_hook(
                    lambda module, args, name=name, seen=seen[-1]: seen.update([name])
                )
                module.register_forward_hook(
                    lambda module, args, out, name=name, seen=seen[-1]: seen.update(
                        [(name, getattr(out, "dtype", None))]
                    )
                )
            with torch.no_grad():
                output(model, inputs(SMALL[family]))
        assert seen[1] == seen[0]


@pytest.mark.parametrize("family", ["wan", "flux2", "lumina2", "kandinsky-5", "mochi"])
def test_a_single_hook_anywhere_is_called(family: str) -> None:
    """Not all at once: a hook on one module makes its neighbours' code run too."""
    plain, model, given = twins(family)
    with torch.no_grad():
        output(model, given)
        for name, module in model.named_modules():
            if ".1." in name:  # as in the first block
                continue
            counts = []
            for one in (plain.get_submodule(name), module):
                calls: list[int] = []
                handle = one.register_forward_hook(lambda *_, calls=calls: calls.append(1))
                output(plain if one is not module else model, given)
                handle.remove()
                counts.append(len(calls))
            assert counts[1] == counts[0], name


def test_caches_count_the_calls_of_the_model_alone() -> None:
    """Diffusers' caches skip by the number of a call; the check of the first call is none."""
    always = (-1, 1001)
    configs = {
        "broadcast": lambda: hooks.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, cross_attention_block_skip_range=3,
            spatial_attention_timestep_skip_range=always,
            cross_attention_timestep_skip_range=always, current_timestep_callback=lambda: 500,
        ),
        "taylor": lambda: hooks.TaylorSeerCacheConfig(
            cache_interval=3, disable_cache_before_step=1, max_order=1),
    }  # fmt: skip
    for make in configs.values():
        found = []
        for order in ("never", "before", "after"):
            model, given = build(SMALL["flux"]), inputs(SMALL["flux"])
            if order == "before":
                dit_kernels.patch(model)
            model.enable_cache(make())
            if order == "after":
                dit_kernels.patch(model)
            with torch.no_grad(), model.cache_context("cond"):
                steps = [given | {"hidden_states": given["hidden_states"] * i} for i in range(5)]
                found.append(torch.stack([output(model, step) for step in steps]))
        close(found[1], found[0])
        close(found[2], found[0])


def test_hooks_that_were_removed_are_gone(count_ops: Counter) -> None:
    """What hooks leave in a module once they are removed is the module's own forward."""
    accelerate = pytest.importorskip("accelerate", reason="a dev dependency")
    model, given = build(WAN), inputs(WAN)
    for module in model.modules():
        accelerate.hooks.add_hook_to_module(module, accelerate.hooks.ModelHook())
    accelerate.hooks.remove_hook_from_submodules(model)
    dit_kernels.patch(model, check=False)
    with torch.no_grad():
        output(model, given)
    assert count_ops == WAN.rows


def test_an_unpickled_model_is_patched_whole(count_ops: Counter) -> None:
    small = SMALL["z-image"]
    model, given = build(small), inputs(small)
    dit_kernels.patch(model, ops="adaln")
    model = pickle.loads(pickle.dumps(model))
    dit_kernels.patch(model, check=False)
    with torch.no_grad():
        output(model, given)
    assert count_ops == small.rows


def test_a_first_call_of_nans_decides_nothing() -> None:
    plain, model, given = twins("wan")
    with torch.no_grad():
        output(model, given | {"hidden_states": given["hidden_states"] * torch.nan})
        assert not any(
            site.checked for site in sites(model) if site.name in ("blocks.0", "blocks.1")
        )
        close(output(model, given), output(plain, given))
        assert all(site.active and site.checked for site in sites(model))


def test_an_empty_first_call_decides_nothing() -> None:
    ff = build(WAN).blocks[0].ffn
    dit_kernels.patch(ff)
    with torch.no_grad():
        ff(torch.zeros(0, 3, 24))
        assert not sites(ff)[0].checked
        ff(torch.randn(1, 3, 24))
        assert sites(ff)[0].checked


def test_labels_that_training_drops_at_random() -> None:
    *models, given = twins("dit")
    found = []
    for model in models:
        model.train()
        torch.manual_seed(0)
        found.append(torch.stack([output(model, given) for _ in range(8)]).detach())
    close(found[1], found[0])
    assert all(site.active for site in sites(models[1]))


def test_a_site_whose_op_raises_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, model, given = twins("wan")

    def failing(*args: object, **kwargs: object) -> None:
        raise ValueError("not this shape")

    monkeypatch.setattr(dit_kernels.ops, "gated_residual", failing)
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        close(output(model, given), output(plain, given))
    assert "raises ValueError, the module's own code doesn't (not this shape)" in str(
        [str(w.message) for w in caught]
    )


def test_a_call_of_another_form_is_checked_too() -> None:
    """A time a token takes another way through the ops than a time a sample."""
    _, model, given = twins("wan")
    block = next(site for site in sites(model) if site.name == "blocks.0")
    with torch.no_grad():
        output(model, given)
        output(model, given)
        assert len(block.checked) == 1
        output(model, inputs(SMALL["wan-tokens"]))
        assert len(block.checked) == 2


def test_an_ensemble_under_vmap() -> None:
    models, given = [build(SMALL["flux"], seed=seed) for seed in (0, 1)], inputs(SMALL["flux"])
    patched = copy.deepcopy(models[0])
    dit_kernels.patch(patched)
    parameters, buffers = stack_module_state(models)

    def call(parameters: Any, buffers: Any) -> Tensor:
        (out,) = functional_call(patched, (parameters, buffers), (), given | {"return_dict": False})
        return out

    with torch.no_grad():
        both = torch.func.vmap(call)(parameters, buffers)
        close(both, torch.stack([output(model, given) for model in models]))


def test_a_module_of_two_names() -> None:
    model = build(WAN)
    model.blocks[1].ffn = model.blocks[0].ffn
    report = dit_kernels.patch(model)
    assert Counter(op for _, op in report.replaced) == WAN.rows
    site = next(site for site in sites(model) if site.name == "blocks.0.ffn")
    assert site.rows == [("blocks.0.ffn", "gelu_bias"), ("blocks.1.ffn", "gelu_bias")]


def test_modulation_that_is_no_row_a_sample_is_left() -> None:
    report = dit_kernels.patch(AdaLayerNorm(8, chunk_dim=0))
    assert not report.replaced
    assert ("", "its modulation is not a row a sample") in report.left


@pytest.mark.parametrize("family", ["wan", "flux", "cogvideox"])
def test_a_first_call_inside_a_checkpoint(family: str) -> None:
    *models, given = twins(family)
    found = []
    for model in models:
        model.enable_gradient_checkpointing()
        out = output(model, given)
        out.square().mean().backward()
        found.append(out.detach())
    close(found[1], found[0])


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["sd3.5", "hunyuan-video", "lumina2", "z-image"])
def test_nothing_is_put_back_under_autocast(family: str, narrow: torch.dtype) -> None:
    """There norms of 16-bit queries and branches are float32, and so may be what attention gives."""
    for seed in range(3):
        model, given = build(SMALL[family], seed=seed), inputs(SMALL[family], seed=seed)
        report = dit_kernels.patch(model)
        with torch.no_grad(), torch.autocast("cpu", narrow):
            output(model, given)
        assert Counter(op for _, op in report.replaced) == SMALL[family].rows


def test_a_patch_embedding_rounds_once_under_autocast() -> None:
    embed, video = nn.Conv2d(3, 8, 2, 2, dtype=torch.bfloat16), torch.randn(1, 3, 4, 4).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        want = embed(video)
        dit_kernels.patch(embed)
        assert torch.equal(embed(video), want)


def test_the_report_is_80_columns_wide() -> None:
    for family in SMALL:
        report = dit_kernels.patch(build(SMALL[family]), ops=("adaln", "attention3d"))
        text = str(report)
        assert max(map(len, text.splitlines())) <= 80
        words = " ".join(text.split())
        assert all(reason in words for _, reason in report.left)


def test_the_report_names_what_hooks_keep_from_running(count_ops: Counter) -> None:
    model, given = build(WAN), inputs(WAN)
    handle = model.blocks[0].norm1.register_forward_hook(lambda *_: None)
    report = dit_kernels.patch(model, check=False)
    assert report.left == [
        ("blocks.0", "its norm1 has hooks: its own code runs for as long as they are there")
    ]
    with torch.no_grad():
        output(model, given)
        assert count_ops["gated_adaln"] == WAN.rows["gated_adaln"] // 2
        handle.remove()
        count_ops.clear()
        output(model, given)
    assert count_ops == WAN.rows


@pytest.mark.parametrize("kind", [FP32LayerNorm, RMSNorm])
def test_a_norm_of_heads_runs_what_the_report_says(kind: type, count_ops: Counter) -> None:
    norm = kind(8, 1e-5)
    norm.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    heads = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(1))
    shapes = (heads, heads.transpose(1, 2), heads[:, 0], heads[0, 0])
    want = [norm(x) for x in shapes]
    assert dit_kernels.patch(norm, check=False).replaced == [("", "adaln")]
    for x, y in zip(shapes, want, strict=True):
        close(norm(x).detach(), y.detach())
    assert count_ops == {"adaln": len(shapes)}
