"""The adapters of outside kernels, against stand-ins that have the packages' interfaces and plain torch inside.

None of the packages can be had here; what can be checked is that arguments go where the interface has them.
"""

from __future__ import annotations

import itertools
import sys
import types
import zipfile

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import peers
from benchmarks.baselines import baselines
from benchmarks.cases import CASES
from benchmarks.shapes import SWEEPS, Shape
from dit_kernels import ops, testing

VIDEO = Shape(1, (2, 4, 5), 64, 2, 32, window=(1, 3, 4))
PACKED = SWEEPS["packed"].points[8].small()
BATCH = Shape(3, (1, 4, 4), 64, 2, 64)


def rms(x: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=eps)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, N, H, D]"""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class LigerSiLUMulFunction:
    @staticmethod
    def apply(a, b, gate_multiplier=1.0, down_multiplier=1.0):
        return F.silu(a) * b


class LigerLayerNormFunction:
    @staticmethod
    def apply(X, W, B, eps):
        return F.layer_norm(X, W.shape, W, B, eps)


class LigerModulatedRMSNormFunction:
    @staticmethod
    def apply(X, W, scale, shift, eps, offset=0.0, casting_mode="llama", in_place=True):
        assert W is None
        assert casting_mode == "gemma"
        assert not in_place
        return rms(X, eps) * (1 + scale[:, None]) + shift[:, None]


def quack_rmsnorm(x, weight=None, bias=None, residual=None, out_dtype=None, residual_dtype=None,
                  eps=1e-6, prenorm=False, weight_offset=0.0):  # fmt: skip
    assert x.dim() == 2
    return rms(x, eps) * (weight + weight_offset) + bias


def quack_layernorm_fwd(x, weight, bias=None, eps=1e-6, return_rstd=False, return_mean=False):
    assert weight.dtype == bias.dtype == torch.float32
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def fused_layer_norm_affine(input, weight, bias, normalized_shape, eps=1e-6):
    return F.layer_norm(input, normalized_shape, weight, bias, eps)


def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None):
    assert tensor_layout == "NHD"
    return attention(q, k, v)


def na3d(query, key, value, kernel_size, stride=1, dilation=1, is_causal=False, scale=None):
    cubes = (query, key, value)
    assert all(x.is_contiguous() and x.dim() == 6 for x in cubes)  # [B, T, H, W, heads, dim]
    grid = query.shape[1:4]
    flat = (x.flatten(1, 3) for x in cubes)
    return ops.attention3d(*flat, grid=grid, window_size=kernel_size).unflatten(1, grid)


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
    return attention(q, k, v)


def flash_3_func(q, k, v, softmax_scale=None, causal=False):
    return attention(q, k, v), torch.zeros(())


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **_):
    assert q.dim() == 3
    assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
    bounds = cu_seqlens_q.tolist()
    parts = (slice(*pair) for pair in itertools.pairwise(bounds))
    return torch.cat([attention(q[None, s], k[None, s], v[None, s])[0] for s in parts])


class BlockDiagonalMask:
    @staticmethod
    def from_seqlens(q_seqlen):
        return list(q_seqlen)


def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None):
    lengths = attn_bias or [query.shape[1]]
    parts = zip(*(x.split(lengths, dim=1) for x in (query, key, value)), strict=True)
    return torch.cat([attention(*part) for part in parts], dim=1)


class DotProductAttention(torch.nn.Module):
    def __init__(self, num_attention_heads, kv_channels, *, qkv_format, attn_mask_type):
        super().__init__()
        assert (qkv_format, attn_mask_type) == ("bshd", "no_mask")
        self.heads, self.dim = num_attention_heads, kv_channels

    def forward(self, q, k, v):
        assert q.shape[2:] == (self.heads, self.dim)
        return attention(q, k, v).flatten(2)


def set_stream(handle, stream):
    handle.stream = stream


class CudnnGraph:
    """adalayernorm with what cudnn's graph has around it."""

    def __init__(self, handle, **types):
        self.made, self.options = [], {}

    def tensor(self, name, dim, stride, data_type, is_pass_by_value=False):
        assert len(dim) == len(stride) == 3
        self.made.append(name)
        return name

    def adalayernorm(self, norm_forward_phase, input, scale, bias, epsilon):
        self.names = (input, scale, bias, epsilon)
        return self, None, None

    def set_output(self, is_output):
        return self

    set_data_type = build = set_output

    def get_workspace_size(self):
        return 16

    def execute(self, tensors, workspace, handle):
        assert handle.stream == 77
        x, scale, shift, eps = (tensors[name] for name in self.names)
        assert scale.dtype == shift.dtype == torch.float32
        y = F.layer_norm(x.float(), x.shape[-1:], eps=float(eps)) * scale[:, None] + shift[:, None]
        tensors[self].copy_(y)


def names(*words: str) -> types.SimpleNamespace:
    return types.SimpleNamespace(**{word: word for word in words})


STANDINS = {
    "liger_kernel.ops.swiglu": {"LigerSiLUMulFunction": LigerSiLUMulFunction},
    "liger_kernel.ops.layer_norm": {"LigerLayerNormFunction": LigerLayerNormFunction},
    "liger_kernel.ops.modulated_rms_norm": {
        "LigerModulatedRMSNormFunction": LigerModulatedRMSNormFunction
    },
    "quack": {"rmsnorm": quack_rmsnorm},
    "quack.rmsnorm": {"layernorm_fwd": quack_layernorm_fwd},
    "apex.normalization.fused_layer_norm": {"fused_layer_norm_affine": fused_layer_norm_affine},
    "cudnn": {
        "data_type": names("BFLOAT16", "HALF", "FLOAT"), "pygraph": CudnnGraph,
        "norm_forward_phase": names("INFERENCE"), "heur_mode": names("A", "FALLBACK"),
        "create_handle": types.SimpleNamespace, "set_stream": set_stream,
    },
    "sageattention": {"sageattn": sageattn},
    "natten": {"na3d": na3d},
    "flash_attn": {
        "flash_attn_func": flash_attn_func, "flash_attn_varlen_func": flash_attn_varlen_func
    },
    "flash_attn_interface": {
        "flash_attn_func": flash_3_func, "flash_attn_varlen_func": flash_attn_varlen_func
    },
    "xformers.ops": {"memory_efficient_attention": memory_efficient_attention},
    "xformers.ops.fmha.attn_bias": {"BlockDiagonalMask": BlockDiagonalMask},
    "transformer_engine.pytorch": {"DotProductAttention": DotProductAttention},
}  # fmt: skip


@pytest.fixture
def installed(monkeypatch):
    for path, content in STANDINS.items():
        parts = path.split(".")
        for i in range(1, len(parts) + 1):
            name = ".".join(parts[:i])
            if name not in STANDINS or i == len(parts):
                module = sys.modules.get(name)
                if not isinstance(module, types.ModuleType) or not hasattr(module, "is_standin"):
                    module = types.ModuleType(name)
                    module.is_standin = True
                    module.__path__ = []
                    module.__spec__ = types.SimpleNamespace(name=name)
                    monkeypatch.setitem(sys.modules, name, module)
        vars(sys.modules[path]).update(content)
    peers._import_failure.cache_clear()
    yield
    peers._import_failure.cache_clear()


ADAPTERS = [(peer, name) for peer in peers.PEERS for name in peer.adapters]


@pytest.mark.parametrize(("peer", "name"), ADAPTERS, ids=[f"{p.name}-{n}" for p, n in ADAPTERS])
def test_an_adapter_passes_what_the_interface_wants(installed, monkeypatch, peer, name):
    monkeypatch.setattr(peers, "on_gpu", lambda arguments: None)
    stream = types.SimpleNamespace(cuda_stream=77)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    (case,) = (case for case in CASES if case.name == name)
    shape = PACKED if name.endswith("-packed") else VIDEO
    if peer.name == "sage":
        shape = BATCH
    arguments = case.arguments(shape, torch.float32, "cpu", 0)
    assert peer.missing(name, arguments) is None
    adapter = peer.adapters[name]
    call = adapter.call(arguments)
    actual = testing.run(call, arguments, backward=adapter.backward).all()
    exact = testing.converted(arguments, torch.float64)
    oracle = testing.run(case.function, exact, backward=adapter.backward, backend="reference").all()
    with testing.plain_torch():
        eager = testing.run(case.function, arguments, backward=adapter.backward).all()
    for key, value in actual.items():
        testing.assert_accurate(value, oracle[key], eager[key], key)


def compared(baseline: str, name: str, shape: Shape) -> None:
    """A baseline of torch's own, forward, by the accuracy rule."""
    (case,) = (case for case in CASES if case.name == name)
    arguments = case.arguments(shape, torch.float32, "cpu", 0)
    (found,) = (b for b in baselines("cuda") if b.name == baseline)
    actual = found.call(case, arguments)(**arguments)
    exact = testing.converted(arguments, torch.float64)
    oracle = testing.run(case.function, exact, backward=False, backend="reference").outputs["out0"]
    with testing.plain_torch():
        eager = testing.run(case.function, arguments, backward=False).outputs["out0"]
    testing.assert_accurate(actual, oracle, eager)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("text", [0, 3])
@pytest.mark.parametrize("window", [(1, 3, 4), (2, 2, 1), (3, 4, 5)])
def test_flex_attention_is_given_the_same_window(monkeypatch, window, text):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    compared("flex", "attention-window", Shape(2, (3, 4, 5), 64, 2, 32, text=text, window=window))


def test_torchs_packed_attention_is_given_the_same_sequences(monkeypatch):
    from torch.nn.attention import varlen

    monkeypatch.setattr(varlen, "varlen_attn", flash_attn_varlen_func)
    compared("varlen", "attention-packed", PACKED)


def test_what_an_adapter_cannot_serve_has_a_reason(installed, monkeypatch):
    monkeypatch.setattr(peers, "on_gpu", lambda arguments: None)
    found = {peer.name: peer for peer in peers.PEERS}
    cases = {case.name: case for case in CASES}

    def reason(peer: str, case: str, shape: Shape) -> str | None:
        return found[peer].missing(case, cases[case].arguments(shape, torch.float32, "cpu", 0))

    assert reason("apex", "adaln", BATCH) == "its norm takes one weight a call; here are 3 samples"
    assert reason("sage", "attention", VIDEO) == "head dim 32 is not 64, 96 or 128"
    text = Shape(1, (2, 4, 5), 64, 2, 32, text=3, window=(1, 3, 4))
    assert reason("natten", "attention-window", text) == "it has no text tokens"
    assert reason("liger", "adaln-rms", BATCH) is None


def test_a_package_that_is_not_there_or_does_not_import_is_absent_with_the_reason(
    tmp_path, monkeypatch
):
    assert peers._import_failure("no-such", "no_such_module") == "no-such is not installed"
    (tmp_path / "half_installed.py").write_text("raise OSError('libfoo.so: not found\\nmore')")
    monkeypatch.syspath_prepend(tmp_path)
    reason = peers._import_failure("half-installed", "half_installed")
    assert reason == "half-installed does not import: OSError: libfoo.so: not found"


def test_peers_that_travel_must_fit(tmp_path, monkeypatch, capsys):
    def pip(command, check):
        assert check
        assert command[-4:] == list(peers.TRAVEL)
        assert not (tmp_path / "old.whl").exists()
        (tmp_path / "big-1.0-py3-none-any.whl").write_bytes(bytes(3 << 20))

    monkeypatch.setattr(peers.subprocess, "run", pip)
    (tmp_path / "old.whl").touch()
    assert peers.download(tmp_path) == 0
    assert "3.0 MiB  big-1.0" in capsys.readouterr().out
    monkeypatch.setattr(peers, "MOST_BYTES", 1 << 20)
    assert peers.download(tmp_path) == 1
    assert "more than the 1 MiB that travel" in capsys.readouterr().err


def test_wheels_are_installed_one_by_one(tmp_path, capfd):
    """One that this Python cannot take does not keep the others out; no network is asked."""
    for name, tag in (("fits", "py3-none-any"), ("other", "cp27-cp27m-any")):
        wheel = tmp_path / f"{name}-1.0-{tag}.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"{name}.py", "value = 7")
            folder = f"{name}-1.0.dist-info"
            archive.writestr(
                f"{folder}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
            )
            archive.writestr(
                f"{folder}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n"
            )
            archive.writestr(f"{folder}/RECORD", "")
    assert peers.main([str(tmp_path), "--install", str(tmp_path / "site")]) == 1
    printed = capfd.readouterr().out
    assert "installed: fits-1.0" in printed
    assert "NOT installed: other-1.0" in printed
    assert printed.endswith("1 of 2 wheels installed, not other\n")
    assert (tmp_path / "site" / "fits.py").read_text() == "value = 7"
