"""A new length recompiles nothing: Triton's own specialisation, counted over five lengths, with no GPU.

The kernels are launched in a process without the interpreter, under a stand-in driver; what Triton would
compile is counted by its cache key and not compiled.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

LENGTHS = (1, 64, 333, 1000, 4096)

SCRIPT = """
import json, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction
from dit_kernels.ops import triton_launch

class Driver:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device=None): return 0

triton.runtime.driver.set_active(Driver())
variants = {}

def record(self, key, *args, **options):
    variants.setdefault(self.__name__, set()).add(key)

JITFunction._do_compile = record
triton_launch.launch = lambda kernel, grid, *args, **options: kernel.warmup(*args, grid=grid, **options)

def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")

def adaln(n):
    from dit_kernels.ops.adaln import triton as m
    # a token a sample is another kernel: every token has a modulation row of its own
    x, branch = empty(2, n + 1, 256), empty(2, n + 1, 256)
    gate, shift, scale = empty(2, 3 * 256).chunk(3, dim=-1)
    tensors = (x, branch, gate, None, None, shift, scale, None, None, None, None, empty(256), None, None)
    call = ("layer", "none", "none", 1e-6, "once")
    out, y, *saved = m.forward(*tensors, *call, True)
    needs = [t is not None for t in tensors]
    m.backward([out, y], *tensors, [out, *saved], *call, needs)

def attention(n, text=0, **options):
    from dit_kernels.ops.attention3d import triton as m
    tokens = n * 32 + text
    q, k, v = empty(1, tokens, 3, 4, 72).unbind(2)
    lengths = empty(1, dtype=torch.int32) if text else None
    packed = empty(4, dtype=torch.int32) if options.get("packed") else None
    grid = [n, 4, 8] if options.get("window") or options.get("causal") else []
    tensors = (q, k, v, lengths, None, packed)
    window, stride = ((1, 3, 5), (1, 1, 1)) if options.get("window") else ((), ())
    call = (grid, window, stride, text, False, bool(options.get("causal")), tokens, 0.1, False, False)
    out, lse = m.forward(*tensors, *call, True)
    m.backward([out], *tensors, [out, lse], *call, [True] * 3)

def attention_dense(n): attention(n)
def attention_window(n): attention(n, window=True)
def attention_window_text(n): attention(n, window=True, text=n % 7 + 1)
def attention_causal(n): attention(n + 1, causal=True)  # one frame has nothing to hide
def attention_packed(n): attention(n, packed=True)

def feed_forward(n):
    from dit_kernels.ops.feed_forward import triton as m
    x, bias = empty(2, n, 256), empty(256)
    m.forward(x, bias, "gelu-tanh", False)
    m.backward([x], x, bias, [], "gelu-tanh", [True, True])

def unpatchify(n):
    from dit_kernels.ops.unpatchify import triton as m
    call = ((1, n, 32), (1, 2, 2), 4, "t h w c")
    tokens = empty(1, 32 * n, 16)
    (video,) = m.forward(tokens, *call, False)
    m.backward([video], tokens, [], *call, [True])

def qk_norm_rope(n):
    from dit_kernels.ops.qk_norm_rope import triton as m
    q, k, _ = empty(2, n, 3, 4, 64).unbind(2)
    weight, cos = empty(64), empty(n, 32, dtype=torch.float32)
    tensors = (q, k, weight, weight, None, None, cos, cos)
    call = ("rms", "head", 1e-6, "none", "interleaved", 1, 0, "once")
    q_out, k_out, *saved = m.forward(*tensors, *call, True)
    needs = [True] * 4 + [False] * 2 + [True] * 2
    m.backward([q_out, k_out], *tensors, saved, *call, needs)

def patch_embed(n):
    from dit_kernels.ops.patch_embed import triton as m
    tensors = (empty(2, 4, 1, 2 * n, 64), empty(96, 4, 1, 2, 2), empty(96), empty(32 * n, 96))
    (tokens,) = m.forward(*tensors, False)
    m.backward([tokens], *tensors, [], [True] * 4)

def final_layer(n):
    from dit_kernels.ops.final_layer import triton as m
    tensors = (empty(2, 32 * n, 128), empty(2, 128), empty(2, 128), empty(16, 128), empty(16))
    call = ((1, n, 32), (1, 2, 2), 4, "t h w c", "layer", 1e-6)
    video, *saved = m.forward(*tensors, *call, True)
    m.backward([video], *tensors, saved, *call, [True] * 5)

results = {}
for op in (adaln, attention_dense, attention_window, attention_window_text, attention_causal, attention_packed, feed_forward, unpatchify, qk_norm_rope, patch_embed, final_layer):
    counts = []
    for n in json.loads(sys.argv[1]):
        op(n)
        counts.append({name: len(keys) for name, keys in variants.items()})
    results[op.__name__] = counts
    variants.clear()
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def counts() -> dict[str, list[dict[str, int]]]:
    """op -> kernel -> variants so far, after each length."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", SCRIPT, json.dumps(LENGTHS)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "op",
    [
        "adaln", "attention_dense", "attention_window", "attention_window_text", "attention_causal",
        "attention_packed", "feed_forward", "unpatchify", "qk_norm_rope", "patch_embed", "final_layer",
    ],
)  # fmt: skip
def test_one_variant_serves_every_length(op, counts):
    first, *others = counts[op]
    assert first
    assert all(later == first for later in others)
