"""The binaries of the CUDA kernels, compiled without a GPU: `python -m benchmarks.audit_cuda`.

Calls the public ops, forward and backward, at the benchmark shapes in each dtype with launches recorded by
the emulator's extension: these kernels, with their template arguments, threads and dynamic shared memory,
are the ones that default configurations reach. nvcc compiles each source for each architecture, and
registers, spills, shared memory, widths of global access and matrix instructions are read from the machine
code. Writes `audit_cuda.md` and `audit_cuda.json` beside this file; a source is compiled again when it, a
header it includes, the flags, the compiler's version or the way it is read changed.

Fails on a spill; on a kernel most of whose bytes come by loads narrower than 16: those inside its loops, or
all where it has no loop that loads; on a product of 16-bit tiles without tensor cores; and on a kernel of
rows without asynchronous copies. --check compiles nothing and fails also where the committed table is not of
these sources.
"""

from __future__ import annotations

import argparse
import collections
import functools
import hashlib
import importlib.util
import inspect
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

os.environ["DIT_KERNELS_EMULATE"] = "1"

import torch
from torch import Tensor

from benchmarks.cases import cases_for
from benchmarks.shapes import SHAPES
from dit_kernels import backends, ops
from dit_kernels.ops import cuda_extension

HERE = Path(__file__).parent
ROOT = HERE.parent
ARCHS = ("80", "89", "90a", "100")
# per multiprocessor: registers, threads, blocks, shared memory in KiB, of which a block can have all but one
LIMITS = {
    "80": (65536, 2048, 32, 164),
    "89": (65536, 1536, 24, 100),
    "90a": (65536, 2048, 32, 228),
    "100": (65536, 2048, 32, 228),
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# kernels whose narrow loads are no fault, and why
NARROW: dict[str, str] = {}
NARROW_STORES = {
    "add_rows_kernel": "a thread has four sums: 8 bytes in 16 bits",
    "patch_embed_bwd_weight_kernel": "accumulators go as the tensor cores hold them, once a program",
    "final_layer_bwd_weight_kernel": "the same",
    "qk_norm_rope_bwd_angles_kernel": "a thread has one angle",
}
# 16-bit products of tiles belong on tensor cores; the next rows belong on their way while these are computed
PRODUCTS = (
    "patch_embed_fwd_kernel", "patch_embed_bwd_video_kernel", "patch_embed_bwd_weight_kernel",
    "final_layer_fwd_kernel", "final_layer_bwd_rows_kernel", "final_layer_bwd_weight_kernel",
)  # fmt: skip
PREFETCHED = ("adaln_fwd_kernel", "adaln_bwd_kernel")
NARROW_TYPES = ("__nv_bfloat16", "__half")

Row = dict[str, Any]
Call = tuple[str, tuple[int, int, int], tuple[int, int, int], int]


def calls(op: str, arch: str = "90a") -> Iterator[tuple[str, Call]]:
    """(label, launch) of each kernel that the op reaches at the benchmark shapes, once a configuration."""
    kernels, seen = cuda_extension.kernels(), set()
    kibibytes = LIMITS[arch][3] - 1
    shared_memory = cuda_extension.shared_memory
    cuda_extension.shared_memory = lambda tensor: kibibytes * 1024
    module = backends.load(op, "cuda")
    for name, plans in vars(module).items():
        if name.endswith("_plans"):
            plans.clear()  # a plan is of one device
    try:
        yield from _calls(op, kernels, seen)
    finally:
        cuda_extension.shared_memory = shared_memory


def _calls(op: str, kernels: Any, seen: set[Any]) -> Iterator[tuple[str, Call]]:
    for dtype, (name, shape) in itertools.product(DTYPES, SHAPES.items()):
        for case in cases_for(shape, (op,)):
            kwargs = case.make(shape, lambda *size, of=dtype: torch.empty(size, dtype=of))
            wanted = [v for v in kwargs.values() if isinstance(v, Tensor) and v.is_floating_point()]
            for tensor in wanted:
                tensor.requires_grad_()
            kernels.record(True)
            try:
                result = getattr(ops, case.function)(**kwargs, backend="cuda")
                result = result if isinstance(result, tuple) else (result,)
                torch.autograd.grad(
                    result, wanted, [torch.empty_like(t) for t in result], allow_unused=True
                )
                found = kernels.recorded()
            except backends.Unsupported as reason:
                print(f"{case.name} {name}: {reason}", flush=True)
                continue
            finally:
                kernels.record(False)
            for kernel, grid, block, shared in found:
                if (kernel, block, shared) not in seen:
                    seen.add((kernel, block, shared))
                    yield f"{case.name} {name}", (kernel, grid, block, shared)


def sources(source: Path) -> list[Path]:
    """The file and the headers of this folder that it includes, directly or not."""
    found = [source]
    for path in found:
        for name in re.findall(r'^#include "(.+)"', path.read_text(), re.MULTILINE):
            header = ROOT / "csrc" / name
            if header.exists() and header not in found and "emulator" not in name:
                found.append(header)
    return found


def key(source: Path, flags: list[str], version: str) -> str:
    text = "".join(path.read_text() for path in sources(source))
    text += "".join(
        inspect.getsource(step) for step in (compiled, _static, demangled, read, _bytes)
    )
    return hashlib.sha256(f"{text} {flags} {version}".encode()).hexdigest()[:16]


def build_flags() -> list[str]:
    flags = re.search(
        r"set\(DK_CUDA_FLAGS (.*?)\)", (ROOT / "CMakeLists.txt").read_text(), re.DOTALL
    )
    assert flags is not None
    return flags[1].split()


@functools.cache
def unasked() -> int:
    """Bytes of dynamic shared memory up to which a launch is left as it is."""
    found = re.search(r"kUnasked = (\d+) \* 1024", (ROOT / "csrc" / "common.cuh").read_text())
    assert found is not None
    return 1024 * int(found[1])


def compiler() -> tuple[Path, str]:
    """nvcc as setup.py finds it, and its version."""
    spec = importlib.util.spec_from_file_location("build_of_the_project", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    nvcc = build.toolkit_nvcc() or build.packaged_nvcc()
    if nvcc is None:
        packages = " ".join(f'"{package}"' for package in build.NVCC_PACKAGES)
        sys.exit(f"no nvcc: put one on PATH, or pip install {packages}")
    version = re.search(r"V[\d.]+", _run(nvcc, "--version"))
    assert version is not None
    return nvcc, version[0]


def compiled(source: Path, arch: str, nvcc: Path, flags: list[str]) -> dict[str, Row]:
    """What the machine code of each kernel of the source says."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        _run(nvcc, "-cubin", f"-arch=sm_{arch}", *flags, "-I", ROOT / "csrc", source, "-o", cubin)
        usage = _run(_tool("cuobjdump"), "-res-usage", cubin)
        sass = _run(_tool("nvdisasm"), "-c", cubin)
    resources = dict(
        re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", usage),
    )
    code = dict(
        re.findall(r"^\.text\.(\S+):\n(.*?)(?=^\.text\.|\Z)", sass, re.MULTILINE | re.DOTALL)
    )
    names = dict(zip(resources, demangled(list(resources)), strict=True))
    rows = {}
    for mangled, text in resources.items():
        used = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", text)}
        rows[names[mangled]] = {"registers": used["REG"], "shared": _static(used, arch), **read(code[mangled])}  # fmt: skip
    return rows


def _static(used: dict[str, int], arch: str) -> int:
    """Without the KiB that the system keeps: from sm_90 on it is counted in where a kernel has any."""
    return max(0, used["SHARED"] - (1024 if int(arch.rstrip("a")) >= 90 else 0))


def demangled(names: list[str]) -> list[str]:
    """As the emulator names kernels: template arguments without namespaces, return type and parameters."""
    run = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)  # fmt: skip
    result = []
    for name in run.stdout.splitlines():
        name = re.sub(r"_GLOBAL__N__\w+?::|\(anonymous namespace\)::|dk::|^void ", "", name)
        depth = 0
        for i, character in enumerate(name):
            depth += (character == "<") - (character == ">")
            if depth == 0 and character == "(":
                name = name[:i]
                break
        result.append(name)
    return result


def read(sass: str) -> Row:
    lines = sass.splitlines()
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"(\.L_x_\d+):", line))}
    inside = [False] * len(lines)
    for i, line in enumerate(lines):
        if m := re.search(r"\bBRA(?:\.\w+)*\s.*`\((\.L_x_\d+)\)", line):
            start = labels.get(m[1], i)
            for j in range(start, i):
                inside[j] = True
    loads: dict[bool, collections.Counter[int]] = {True: collections.Counter(), False: collections.Counter()}  # fmt: skip
    stores: collections.Counter[int] = collections.Counter()
    for i, line in enumerate(lines):
        if m := re.search(r"\b(LDGSTS|LDG|STG|LD|ST)\b((?:\.\w+)*)", line):
            size = _bytes(m[2])
            if m[1] in ("STG", "ST"):
                stores[size] += 1
            else:
                loads[inside[i]][size] += 1
    main = loads[True] or loads[False]
    moved = {size: size * count for size, count in main.items()}
    matrix = re.findall(r"\b(UTCHMMA|HGMMA|HMMA|QGMMA)\b", sass)
    everything = loads[True] + loads[False]
    return {
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "main_load": max(moved, key=lambda size: moved[size]) if moved else 0,
        "load": max(everything, default=0), "store": max(stores, default=0),
        "asynchronous": "LDGSTS" in sass, "tma": "UTMALDG" in sass,
        "matrix": max(set(matrix), key=matrix.count) if matrix else "",
    }  # fmt: skip


def _bytes(modifiers: str) -> int:
    for bits in (256, 128, 64):
        if f".{bits}" in modifiers:
            return bits // 8
    return 2 if ".U16" in modifiers or ".S16" in modifiers else 1 if "8" in modifiers else 4


def occupancy(arch: str, row: Row, threads: int, dynamic: int) -> float:
    """Resident threads as a share of what a multiprocessor holds."""
    registers, most, blocks, kib = LIMITS[arch]
    warps = -(-threads // 32)
    per_warp = -(-row["registers"] * 32 // 256) * 256
    resident = min(
        blocks, most // (32 * warps), registers // (per_warp * warps),
        kib * 1024 // (row["shared"] + dynamic + 1024),
    )  # fmt: skip
    return resident * warps * 32 / most


def problems(row: Row) -> list[str]:
    found = []
    if row["spills"]:
        found.append("spills")
    name, _, arguments = row["kernel"].partition("<")
    if 0 < row["main_load"] < 16 and not row["tma"] and name not in NARROW:
        found.append(f"most bytes come by loads of {row['main_load']}")
    if 0 < row["store"] < 16 and name not in NARROW_STORES:
        found.append(f"no store is wider than {row['store']}")
    if name in PRODUCTS and arguments.startswith(NARROW_TYPES) and not row["matrix"]:
        found.append("a 16-bit product without tensor cores")
    if name in PREFETCHED and not (row["asynchronous"] or row["tma"]):
        found.append("no asynchronous copies")
    block = row["shared"] + row["dynamic"]
    if row["occupancy"] == 0 or block > 1024 * (LIMITS[row["arch"]][3] - 1):
        found.append("not even one block fits")
    if row["dynamic"] <= unasked() and block > 48 * 1024:
        found.append(f"{block} bytes of shared memory, for which the launcher does not ask")
    return found


def render(rows: list[Row], version: str, archs: list[str]) -> str:
    """A line for each kernel, threads and shared memory; what differs between targets in their order."""
    lines = [
        "# Ahead-of-time audit of the CUDA kernels",
        "",
        f"Generated by `make audit` with nvcc {version}; nothing here was run on a GPU. The kernels that the public ops",
        "launch at the shapes of `benchmarks/shapes.py` in bfloat16, float16 and float32, each at the first call that",
        "reaches it, for "
        + ", ".join(f"sm_{arch}" for arch in archs)
        + ": in this order where they differ.",
        "Loads and stores: the widest global access in bytes, main: what brings most bytes, in the loops of a kernel",
        "that has them. Occupancy: resident threads as a share of the multiprocessor's, by registers and shared memory.",
    ]

    def each(found: list[Row], show: Callable[[Row], str]) -> str:
        values = {row["arch"]: show(row) for row in found}
        if len(set(values.values())) == 1:
            return next(iter(values.values()))
        return " ".join(values.get(arch, "·") for arch in archs)

    def where(found: list[Row]) -> str:
        on = [row["arch"] for row in found]
        return "" if on == archs else " on " + ", ".join(f"sm_{arch}" for arch in on)

    for op, of_op in itertools.groupby(rows, lambda row: row["op"]):
        lines += [
            "",
            f"## {op}",
            "",
            "| call | kernel | threads | registers | spills | shared | occupancy | main | loads | stores | async | matrix |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for (call, kernel, threads, _), group in itertools.groupby(
            of_op, lambda row: (row["call"], row["kernel"], row["threads"], row["dynamic"])
        ):
            found = list(group)
            lines.append(
                f"| {call}{where(found)} | `{kernel}` | {threads} | {each(found, lambda r: str(r['registers']))}"
                f" | {each(found, lambda r: str(r['spills']))}"
                f" | {each(found, lambda r: str(r['shared'] + r['dynamic']))}"
                f" | {each(found, lambda r: format(r['occupancy'], '.0%'))}"
                f" | {each(found, lambda r: str(r['main_load'] or '-'))}"
                f" | {each(found, lambda r: str(r['load'] or '-'))}"
                f" | {each(found, lambda r: str(r['store'] or '-'))}"
                f" | {each(found, lambda r: 'UTMALDG' if r['tma'] else 'LDGSTS' if r['asynchronous'] else '-')}"
                f" | {each(found, lambda r: r['matrix'] or '-')} |"
            )
    return "\n".join(lines) + "\n"


def _tool(name: str) -> Path:
    """cuobjdump and nvdisasm come with Triton."""
    spec = importlib.util.find_spec("triton")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name


def _run(*command: object) -> str:
    run = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{run.stdout}{run.stderr}")
    return run.stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compile nothing; fail where the table is old")  # fmt: skip
    parser.add_argument("--archs", default=",".join(ARCHS), help="targets of the table; default: %(default)s")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at a time; default: %(default)s")  # fmt: skip
    options = parser.parse_args()
    if reason := cuda_extension.unavailable():
        sys.exit(f"{reason}: {cuda_extension.FIXES[reason]}")
    torch.set_num_threads(1)
    store = HERE / "audit_cuda.json"
    known: dict[str, Any] = json.loads(store.read_text()) if store.exists() else {}
    flags = build_flags()
    # a check needs no compiler: the table says which one made it
    nvcc, version = (Path(), known.get("version", "")) if options.check else compiler()
    archs = known.get("archs", []) if options.check else options.archs.split(",")
    binaries: dict[str, dict[str, Row]] = {arch: {} for arch in archs}
    fresh: dict[str, Any] = {"version": version, "archs": archs}
    failures = [] if archs else ["there is no table: run `make audit` and commit it"]
    stale = {}
    for arch in archs:
        for source in sorted((ROOT / "csrc").glob("*.cu")):
            name, hashed = f"{source.stem} sm_{arch}", key(source, flags, version)
            if known.get(name, {}).get("key") != hashed:
                stale[name] = (source, arch, hashed)
            else:
                fresh[name] = known[name]
    if options.check:
        failures += [f"{name}: the table is of other sources, flags or compiler: run `make audit` and commit it" for name in stale]  # fmt: skip
        stale = {}
    with ThreadPoolExecutor(options.jobs) as pool:
        found = {
            pool.submit(compiled, source, arch, nvcc, flags): (name, hashed)
            for name, (source, arch, hashed) in stale.items()
        }
        for done in as_completed(found):
            name, hashed = found[done]
            fresh[name] = {"key": hashed, "kernels": done.result()}
            print(name, flush=True)
            # after an interruption the rest is known
            store.write_text(json.dumps({**known, **fresh}, indent=0, sort_keys=True) + "\n")
    for name, entry in fresh.items():
        if isinstance(entry, dict):
            binaries[name.rpartition("_")[2]] |= entry["kernels"]
    rows: list[Row] = []
    if not failures:
        for op in (op for op, names in backends.TABLE.items() if "cuda" in names):
            labels: dict[Any, str] = {}
            of_op = []
            for arch in archs:
                for call, (kernel, _, block, dynamic) in calls(op, arch):
                    if kernel not in binaries[arch]:
                        sys.exit(
                            f"{kernel} is in no binary for {arch}: dit_kernels._C_emulated is of other sources; `make install`"
                        )
                    threads = block[0] * block[1] * block[2]
                    call = labels.setdefault((kernel, threads, dynamic), call)
                    row = {"op": op, "call": call, "kernel": kernel, "arch": arch, "threads": threads, "dynamic": dynamic,
                           **binaries[arch][kernel]}  # fmt: skip
                    row["occupancy"] = occupancy(arch, row, threads, dynamic)
                    failures += [f"{op}: {call} {kernel} sm_{arch}: {p}" for p in problems(row)]
                    of_op.append(row)
            places = {key: place for place, key in enumerate(labels)}
            rows += sorted(of_op, key=lambda row: places[row["kernel"], row["threads"], row["dynamic"]])  # fmt: skip
        text, table = render(rows, version, archs), HERE / "audit_cuda.md"
        if options.check and (not table.exists() or table.read_text() != text):
            failures.append("benchmarks/audit_cuda.md is not of these calls: run `make audit` and commit it")  # fmt: skip
        if not options.check:
            # what another target was compiled to stays known
            store.write_text(json.dumps({**known, **fresh}, indent=0, sort_keys=True) + "\n")
            table.write_text(text)
    print("\n".join(failures) or f"{len(rows)} kernels, no spill, no narrow load")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
