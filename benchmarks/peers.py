"""Outside kernels that some of the cases have: one small adapter each, used where the package imports.

An adapter calls the package as its own documentation does. `accurate` in the results says whether what it
computes is within the accuracy rule. `make peers` downloads those that fit a machine without a network:

    python -m benchmarks.peers FOLDER [--install SITE]
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Arguments

Outputs = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Adapter:
    """How a package computes a case.

    Args:
        call: the case's arguments -> the function that is timed.
        backward: whether it has one.
        misfit: why it can't serve these arguments, or None.
    """

    call: Callable[[Arguments], Callable[..., Outputs]]
    backward: bool = True
    misfit: Callable[[Arguments], str | None] = lambda arguments: None


@dataclass(frozen=True)
class Peer:
    """A package with the cases that it has a kernel for."""

    name: str
    package: str  # for pip
    module: str
    adapters: dict[str, Adapter]

    def missing(self, case: str, arguments: Arguments) -> str | None:
        return (
            _import_failure(self.package, self.module)
            or on_gpu(arguments)
            or self.adapters[case].misfit(arguments)
        )


def on_gpu(arguments: Arguments) -> str | None:
    given = (value for value in arguments.values() if isinstance(value, Tensor))
    return None if next(given).is_cuda else "needs a GPU"


@functools.cache
def _import_failure(package: str, module: str) -> str | None:
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return f"{package} is not installed"
    try:
        importlib.import_module(module)
    except Exception as error:  # a half-working installation must not end the run
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        return f"{package} does not import: {type(error).__name__}: {reason}"
    return None


def _one_row(arguments: Arguments) -> str | None:
    rows = arguments["scale"].shape[0]
    return None if rows == 1 else f"its norm takes one weight a call; here are {rows} samples"


def _no_text(arguments: Arguments) -> str | None:
    return "it has no text tokens" if arguments["text_tokens"] else None


def _sage_misfit(arguments: Arguments) -> str | None:
    dim = arguments["q"].shape[-1]
    return None if dim in (64, 96, 128) else f"head dim {dim} is not 64, 96 or 128"


def _liger_swiglu(arguments: Arguments) -> Callable[..., Outputs]:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return lambda x: LigerSiLUMulFunction.apply(*(h.contiguous() for h in x.chunk(2, dim=-1)))


def _liger_adaln(arguments: Arguments) -> Callable[..., Outputs]:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return lambda x, shift, scale: LigerLayerNormFunction.apply(x, 1 + scale[0], shift[0], 1e-6)


def _liger_adaln_rms(arguments: Arguments) -> Callable[..., Outputs]:
    from liger_kernel.ops.modulated_rms_norm import LigerModulatedRMSNormFunction

    def run(x: Tensor, shift: Tensor, scale: Tensor, norm: str) -> Tensor:
        # "gemma" computes in float32; in_place would overwrite the gradient that is passed again
        options = (1e-6, 0.0, "gemma", False)
        return LigerModulatedRMSNormFunction.apply(x, None, scale, shift, *options)

    return run


def _quack_adaln(arguments: Arguments) -> Callable[..., Outputs]:
    from quack.rmsnorm import layernorm_fwd

    def run(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return layernorm_fwd(x[0], 1 + scale[0].float(), shift[0].float(), eps=1e-6)[None]

    return run


def _quack_adaln_rms(arguments: Arguments) -> Callable[..., Outputs]:
    from quack import rmsnorm

    def run(x: Tensor, shift: Tensor, scale: Tensor, norm: str) -> Tensor:
        return rmsnorm(x[0], scale[0], bias=shift[0], eps=1e-6, weight_offset=1.0)[None]

    return run


def _apex_adaln(arguments: Arguments) -> Callable[..., Outputs]:
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine

    channels = arguments["x"].shape[-1]
    return lambda x, shift, scale: fused_layer_norm_affine(
        x, 1 + scale[0], shift[0], (channels,), eps=1e-6
    )


def _cudnn_adaln(arguments: Arguments) -> Callable[..., Outputs]:
    """cuDNN's own adaptive layer norm, its graph built beforehand; scale and shift are float32 there."""
    import cudnn

    x = arguments["x"]
    kinds = {
        torch.bfloat16: cudnn.data_type.BFLOAT16, torch.float16: cudnn.data_type.HALF,
        torch.float32: cudnn.data_type.FLOAT,
    }  # fmt: skip
    single = cudnn.data_type.FLOAT
    handle = cudnn.create_handle()
    graph = cudnn.pygraph(
        io_data_type=kinds[x.dtype], intermediate_data_type=single, compute_data_type=single,
        handle=handle,
    )  # fmt: skip
    batch, _, channels = x.shape
    row = {"dim": [batch, 1, channels], "stride": [channels, channels, 1], "data_type": single}
    x_in = graph.tensor(
        name="x", dim=list(x.shape), stride=list(x.stride()), data_type=kinds[x.dtype]
    )
    scale_in, shift_in = graph.tensor(name="scale", **row), graph.tensor(name="shift", **row)
    eps = torch.full((1, 1, 1), 1e-6)
    eps_in = graph.tensor(
        name="eps", dim=[1, 1, 1], stride=[1, 1, 1], is_pass_by_value=True, data_type=single
    )
    y_out, _, _ = graph.adalayernorm(
        norm_forward_phase=cudnn.norm_forward_phase.INFERENCE, input=x_in, scale=scale_in,
        bias=shift_in, epsilon=eps_in,
    )  # fmt: skip
    y_out.set_output(True).set_data_type(kinds[x.dtype])
    graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    workspace = torch.empty(graph.get_workspace_size(), dtype=torch.uint8, device=x.device)

    def run(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        y = torch.empty_like(x)
        rows = {scale_in: 1 + scale.float(), shift_in: shift.float().contiguous()}
        # else it runs on the default stream, which no graph captures
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
        graph.execute({x_in: x, **rows, eps_in: eps, y_out: y}, workspace, handle=handle)
        return y

    return run


def _sage(arguments: Arguments) -> Callable[..., Outputs]:
    from sageattention import sageattn

    return lambda q, k, v: sageattn(q, k, v, tensor_layout="NHD")


def _natten(arguments: Arguments) -> Callable[..., Outputs]:
    from natten import na3d

    grid, window = tuple(arguments["grid"]), tuple(arguments["window_size"])

    def run(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        # it reads strided views wrongly
        cubes = (x.unflatten(1, grid).contiguous() for x in (q, k, v))
        return na3d(*cubes, kernel_size=window).flatten(1, 3)

    return run


def _flash(module: str) -> Callable[[Arguments], Callable[..., Outputs]]:
    def adapter(arguments: Arguments) -> Callable[..., Outputs]:
        attention = importlib.import_module(module).flash_attn_func
        return lambda q, k, v: _first(attention(q, k, v))

    return adapter


def _flash_packed(module: str) -> Callable[[Arguments], Callable[..., Outputs]]:
    def adapter(arguments: Arguments) -> Callable[..., Outputs]:
        attention = importlib.import_module(module).flash_attn_varlen_func

        def run(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
            rows = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
            return _first(attention(q[0], k[0], v[0], *rows))[None]

        return run

    return adapter


def _first(result: Any) -> Tensor:
    """FlashAttention 3 returned (out, lse) in its first versions."""
    return result[0] if isinstance(result, tuple) else result


def _xformers(arguments: Arguments) -> Callable[..., Outputs]:
    from xformers.ops import memory_efficient_attention

    return lambda q, k, v: memory_efficient_attention(q, k, v)


def _xformers_packed(arguments: Arguments) -> Callable[..., Outputs]:
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    bias = BlockDiagonalMask.from_seqlens(arguments["cu_seqlens"].diff().tolist())
    return lambda q, k, v, cu_seqlens, max_seqlen: memory_efficient_attention(
        q, k, v, attn_bias=bias
    )


def _transformer_engine(arguments: Arguments) -> Callable[..., Outputs]:
    from transformer_engine.pytorch import DotProductAttention

    _, _, heads, dim = arguments["q"].shape
    attention = DotProductAttention(heads, dim, qkv_format="bshd", attn_mask_type="no_mask")
    return lambda q, k, v: attention(q, k, v).unflatten(-1, (heads, dim))


PEERS = (
    Peer("liger", "liger-kernel", "liger_kernel.ops", {
        "swiglu": Adapter(_liger_swiglu),
        "adaln": Adapter(_liger_adaln, misfit=_one_row),
        "adaln-rms": Adapter(_liger_adaln_rms),
    }),
    Peer("quack", "quack-kernels", "quack", {
        "adaln": Adapter(_quack_adaln, backward=False, misfit=_one_row),
        "adaln-rms": Adapter(_quack_adaln_rms, misfit=_one_row),
    }),
    Peer("apex", "apex", "apex.normalization.fused_layer_norm", {
        "adaln": Adapter(_apex_adaln, misfit=_one_row),
    }),
    Peer("cudnn", "nvidia-cudnn-frontend", "cudnn", {"adaln": Adapter(_cudnn_adaln, backward=False)}),
    Peer("sage", "sageattention", "sageattention", {
        "attention": Adapter(_sage, backward=False, misfit=_sage_misfit),
    }),
    Peer("natten", "natten", "natten", {"attention-window": Adapter(_natten, misfit=_no_text)}),
    Peer("flash-2", "flash-attn", "flash_attn", {
        "attention": Adapter(_flash("flash_attn")),
        "attention-packed": Adapter(_flash_packed("flash_attn")),
    }),
    Peer("flash-3", "flash-attn-3", "flash_attn_interface", {
        "attention": Adapter(_flash("flash_attn_interface")),
        "attention-packed": Adapter(_flash_packed("flash_attn_interface")),
    }),
    Peer("xformers", "xformers", "xformers.ops", {
        "attention": Adapter(_xformers), "attention-packed": Adapter(_xformers_packed),
    }),
    Peer("te", "transformer-engine", "transformer_engine.pytorch", {
        "attention": Adapter(_transformer_engine),
    }),
)  # fmt: skip

# pure Python or small; the others need a compiler or are larger than what travels to a bare machine
TRAVEL = ("liger-kernel", "sageattention", "diffusers", "nvidia-cudnn-frontend")
# what a bare GPU machine runs
TARGET = ("--python-version", "3.12", "--implementation", "cp")
GLIBC = (28, 27, 17)
MOST_BYTES = 60 << 20


def download(folder: Path) -> int:
    """Fill the folder with the wheels of `TRAVEL`; exit code 1 if they are too large together."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in GLIBC]
    command = (sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check")
    subprocess.run(
        [*command, "--no-deps", "--only-binary=:all:", *TARGET, *platforms, "--dest", str(folder),
         *TRAVEL],
        check=True,
    )  # fmt: skip
    wheels = sorted(folder.glob("*.whl"))
    for wheel in wheels:
        print(f"{wheel.stat().st_size / 2**20:6.1f} MiB  {wheel.name}")
    total = sum(wheel.stat().st_size for wheel in wheels)
    print(f"{total / 2**20:6.1f} MiB in {folder}; `make gpu` installs from it")
    if total > MOST_BYTES:
        print(f"more than the {MOST_BYTES >> 20} MiB that travel", file=sys.stderr)
        return 1
    return 0


def install(folder: Path, site: Path) -> int:
    """Each wheel of the folder for itself, without a network; exit code 1 if one does not fit this Python."""
    command = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    left_out = []
    wheels = sorted(folder.glob("*.whl"))
    for wheel in wheels:
        options = ("--no-index", "--no-deps", "--no-compile", "--upgrade", "--target", str(site))
        result = subprocess.run([*command, *options, str(wheel)], check=False)
        print(f"{'installed' if result.returncode == 0 else 'NOT installed'}: {wheel.name}")
        if result.returncode:
            left_out.append(wheel.name.partition("-")[0])
    names = f", not {', '.join(left_out)}" if left_out else ""
    print(f"{len(wheels) - len(left_out)} of {len(wheels)} wheels installed{names}")
    return int(bool(left_out))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("make peers", description="Download the wheels of peers.")
    parser.add_argument("folder", type=Path, help="of the wheels")
    parser.add_argument("--install", type=Path, metavar="SITE", help="install them there instead")
    given = parser.parse_args(arguments)
    return install(given.folder, given.install) if given.install else download(given.folder)


if __name__ == "__main__":
    sys.exit(main())
