"""What each case is timed against. An adapter turns a case's arguments into a call, or says why it can't.

Ours:     each backend of the op that is there.
Eager:    the formula as people write it; `compile` and `compile-max` the same through torch.compile.
torch's:  attention with one kernel forced, FlexAttention with the same window, packed attention.
Outside:  the packages of `peers`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Arguments, Case
from benchmarks.peers import PEERS, Outputs, Peer, on_gpu
from dit_kernels import backends, ops, testing


@dataclass(frozen=True)
class Baseline:
    """A competitor in the cases that it has.

    Args:
        name: as it stands in the tables.
        applies: whether it has the op at all.
        missing: why it can't run this call here, or None.
        call: makes the function that is timed.
        has_backward: whether a gradient can be asked of it.
        preparation: 0 none, 1 compilation, 2 tuning; what takes longer runs when all else has been timed.
    """

    name: str
    applies: Callable[[Case], bool]
    missing: Callable[[Case, Arguments], str | None]
    call: Callable[[Case, Arguments], Callable[..., Outputs]]
    has_backward: Callable[[Case], bool] = lambda case: True
    preparation: int = 0


def baselines(device: str) -> Iterator[Baseline]:
    for name in ("triton", "cuda"):
        yield _ours(name)
    # the reference is the oracle, not a competitor: on a GPU its scores would not fit
    if device == "cpu":
        yield _ours("reference")
    yield Baseline("eager", _every, _eager_missing, _eager)
    yield Baseline("compile", _every, _compiled_missing, _compiled("default"), preparation=1)
    yield Baseline("conv", lambda case: case.name == "patch_embed", _eager_missing, _conv)
    for backend in ("CUDNN_ATTENTION", "FLASH_ATTENTION"):
        yield _sdpa(backend)
    window = "attention-window"
    yield Baseline("flex", lambda case: case.name == window, _needs_gpu, _flex, preparation=1)
    yield Baseline("varlen", lambda case: case.name == "attention-packed", _varlen_missing, _varlen)
    for peer in PEERS:
        yield _outside(peer)
    if device == "cuda":
        mode = "max-autotune-no-cudagraphs"
        yield Baseline("compile-max", _every, _compiled_missing, _compiled(mode), preparation=2)


def _outside(peer: Peer) -> Baseline:
    return Baseline(
        peer.name,
        lambda case: case.name in peer.adapters,
        lambda case, arguments: peer.missing(case.name, arguments),
        lambda case, arguments: peer.adapters[case.name].call(arguments),
        lambda case: peer.adapters[case.name].backward,
    )


def _ours(name: str) -> Baseline:
    def missing(case: Case, arguments: Arguments) -> str | None:
        try:
            with torch.no_grad():
                getattr(ops, case.function)(**arguments, backend=name)
        except backends.Unsupported as error:
            return str(error).split("cannot serve this call: ")[-1]
        return None

    def call(case: Case, arguments: Arguments) -> Callable[..., Outputs]:
        function = getattr(ops, case.function)
        return lambda **given: function(**given, backend=name)

    return Baseline(
        name, lambda case: name in (*backends.TABLE[case.op], "reference"), missing, call
    )


def _every(case: Case) -> bool:
    return True


def _needs_gpu(case: Case, arguments: Arguments) -> str | None:
    return on_gpu(arguments)


def _eager_missing(case: Case, arguments: Arguments) -> str | None:
    """Explicit attention scores of long sequences fit on no card."""
    return "its N x N scores don't fit" if _scores(case, arguments) > 1 << 32 else None


def _compiled_missing(case: Case, arguments: Arguments) -> str | None:
    """The formula takes scores by chunks, each of which is compiled anew."""
    if _scores(case, arguments) > 1 << 28:
        return "its chunks of N x N scores would compile for minutes"
    return None


def _scores(case: Case, arguments: Arguments) -> int:
    if case.op != "attention3d":
        return 0
    batch, tokens, heads, _ = arguments["q"].shape
    return batch * heads * tokens**2


def _eager(case: Case, arguments: Arguments) -> Callable[..., Outputs]:
    function = getattr(ops, case.function)

    def run(**given: Any) -> Outputs:
        with testing.plain_torch():
            return function(**given)

    return run


def _compiled(mode: str) -> Callable[[Case, Arguments], Callable[..., Outputs]]:
    def call(case: Case, arguments: Arguments) -> Callable[..., Outputs]:
        _reset_compiler()
        function = getattr(ops, case.function)
        compiled = torch.compile(lambda **given: function(**given), fullgraph=True, mode=mode)

        def run(**given: Any) -> Outputs:
            with testing.plain_torch():
                return compiled(**given)

        return run

    return call


def _reset_compiler() -> None:
    torch._dynamo.reset()
    # a backward that is timed alone keeps its graph, which torch.compile refuses if it gave buffers away
    torch._functorch.config.donated_buffer = False


def _sdpa(kernel: str) -> Baseline:
    """torch's attention with one kernel forced: by default it picks a slower one on Hopper."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backend = getattr(SDPBackend, kernel)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            ).transpose(1, 2)

    def missing(case: Case, arguments: Arguments) -> str | None:
        if on_gpu(arguments):
            return on_gpu(arguments)
        with torch.no_grad(), contextlib.suppress(RuntimeError):
            run(**arguments)
            return None
        return "torch has no such kernel for this call"

    name = f"sdpa-{kernel.split('_')[0].lower()}"
    return Baseline(name, lambda case: case.name == "attention", missing, lambda *_: run)


def _conv(case: Case, arguments: Arguments) -> Callable[..., Outputs]:
    """Patch embedding as most models have it: a convolution as wide as its stride, then flatten and transpose."""

    def run(video: Tensor, weight: Tensor, bias: Tensor, pos_embed: Tensor | None = None) -> Tensor:
        tokens = F.conv3d(video, weight, bias, weight.shape[2:]).flatten(2).transpose(1, 2)
        return tokens if pos_embed is None else tokens + pos_embed

    return run


def _flex(case: Case, arguments: Arguments) -> Callable[..., Outputs]:
    """FlexAttention with the same window, its block mask made beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    _reset_compiler()
    grid, window, text = (arguments[name] for name in ("grid", "window_size", "text_tokens"))
    patches = grid[0] * grid[1] * grid[2]

    def axes(token: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return token // (grid[1] * grid[2]), token // grid[2] % grid[1], token % grid[2]

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        near = query >= 0
        for i, j, length, w in zip(axes(query), axes(key), grid, window, strict=True):
            start = (i - w // 2).clamp(0, length - w)
            near = near & (j >= start) & (j < start + w)
        return near | (query >= patches) | (key >= patches)

    tokens = patches + text
    mask = create_block_mask(sees, None, None, tokens, tokens, device=str(arguments["q"].device))
    compiled = torch.compile(flex_attention, fullgraph=True)

    def run(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        out = compiled(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), block_mask=mask)
        return out.transpose(1, 2)

    return run


def _varlen_missing(case: Case, arguments: Arguments) -> str | None:
    try:
        import torch.nn.attention.varlen
    except ImportError:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    return on_gpu(arguments)


def _varlen(case: Case, arguments: Arguments) -> Callable[..., Outputs]:
    """torch's own packed attention."""
    from torch.nn.attention.varlen import varlen_attn

    def run(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        packed = (x[0] for x in (q, k, v))
        return varlen_attn(*packed, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)[None]

    return run
