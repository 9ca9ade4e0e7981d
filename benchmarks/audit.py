"""The binaries of every Triton kernel, compiled without a GPU: `python -m benchmarks.audit [OP ...]`.

Calls the public ops, forward and backward, at benchmark shapes with launches recorded (see `offline`),
compiles each kernel as that call specialises it, for each target, and reads registers, spills, shared
memory, widths of global access and matrix instructions from the binary. Writes `audit.md` and
`audit.json` beside this file; what has not changed since (by hash of source, specialisation, options and
Triton's version) is not compiled again.

Fails on a spill, on a memory-bound kernel for sm_90 where a narrower width moves more bytes than the 16-byte
loads do, and on a 16-bit dot kernel for sm_90 without HGMMA.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from benchmarks.cases import Arguments, Case, Random, cases_for
from benchmarks.offline import TARGETS, Launch, recorded
from benchmarks.shapes import SHAPES, Shape
from dit_kernels import backends, ops

SHAPES_AUDITED = tuple(name for name in SHAPES if not name.startswith("tiny-"))
HERE = Path(__file__).parent
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# per multiprocessor: registers, threads, blocks, shared memory in KiB
LIMITS = {
    "sm_80": (65536, 2048, 32, 164),
    "sm_90": (65536, 2048, 32, 228),
    "sm_100": (65536, 2048, 32, 228),
}


def _tokens(shape: Shape, randn: Random) -> Arguments:
    size = (shape.batch, shape.tokens, shape.channels)
    return {"residual": randn(*size), "branch": randn(*size)}


def _rows(shape: Shape, randn: Random, *rows: int) -> Arguments:
    gate, shift, scale = randn(*rows, 3 * shape.channels).chunk(3, dim=-1)
    return {"gate": gate, "shift": shift, "scale": scale}


def _affine(shape: Shape, randn: Random) -> Arguments:
    rows = _rows(shape, randn, shape.batch)
    return {**_tokens(shape, randn), **rows, "weight": randn(shape.channels), "bias": randn(shape.channels)}  # fmt: skip


def _tables(shape: Shape, randn: Random) -> Arguments:
    """Float32 modulation and tables on bfloat16 tokens."""
    rows = {name: row.float() for name, row in _rows(shape, randn, shape.batch).items()}
    tables = {f"{name}_table": randn(shape.channels).float() for name in rows}
    return {**_tokens(shape, randn), **rows, **tables}


def _row_a_token(shape: Shape, randn: Random) -> Arguments:
    return {**_tokens(shape, randn), **_rows(shape, randn, shape.batch, shape.tokens)}


def _row_index(shape: Shape, randn: Random) -> Arguments:
    index = torch.zeros(shape.batch, shape.tokens, dtype=torch.int32)
    return {**_tokens(shape, randn), **_rows(shape, randn, 2), "row_index": index}


def _sandwich(shape: Shape, randn: Random) -> Arguments:
    rows = _rows(shape, randn, shape.batch)
    del rows["shift"]
    return {**_tokens(shape, randn), **rows, "gate_act": "tanh", "branch_norm": "rms", "norm": "rms"}  # fmt: skip


# forms that the benchmarks do not time, at the shape of a model that has them
FORMS = {
    "cogvideox-5b": Case("adaln", "affine", "gated_adaln", _affine),
    "wan-14b-720p": Case("adaln", "tables", "gated_adaln", _tables),
    "wan-1.3b-480p": Case("adaln", "row-a-token", "gated_adaln", _row_a_token),
    "flux-1024": Case("adaln", "row-index", "gated_adaln", _row_index),
    "mochi": Case("adaln", "sandwich", "gated_adaln", _sandwich),
}


def launches(op: str, shape: str) -> Iterator[tuple[str, Launch]]:
    """(case, launch) of forward and backward of every benchmark case of the op."""
    forms = [FORMS[shape]] if shape in FORMS else []
    for case in (*cases_for(SHAPES[shape], (op,)), *forms):
        if case.op != op:
            continue
        kwargs = case.make(SHAPES[shape], lambda *size: torch.empty(size, dtype=torch.bfloat16))
        wanted = [v for v in kwargs.values() if isinstance(v, Tensor) and v.is_floating_point()]
        for tensor in wanted:
            tensor.requires_grad_()
        with recorded() as found:
            result = getattr(ops, case.function)(**kwargs, backend="triton")
            result = result if isinstance(result, tuple) else (result,)
            torch.autograd.grad(
                result, wanted, [torch.empty_like(t) for t in result], allow_unused=True
            )
        for launch in found:
            yield case.name, launch


def inspect(launch: Launch, target: str) -> dict[str, Any]:
    """Compile, and read the binary."""
    kernel = launch.compile(target)
    warps = kernel.metadata.num_warps
    shared = kernel.metadata.shared
    read = _amd if target.startswith("gfx") else _nvidia
    row = {"warps": warps, "shared": shared, **read(kernel, target, warps, shared)}
    dots = re.findall(r"(?:tt\.dot|warp_group_dot|tc_gen5_mma) .*", kernel.asm["ttgir"])
    row["dot16"] = any(re.search(r"xb?f16\b", line) for line in dots)
    return row


def _nvidia(kernel: Any, target: str, warps: int, shared: int) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
        sass = _run("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack, local = map(int, found.groups())
    # a stack frame without local loads or stores is an argument area of a call, not a spill
    spills = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    loads: collections.Counter[int] = collections.Counter()
    stores: collections.Counter[int] = collections.Counter()
    for name, modifiers in re.findall(r"\b(LDGSTS|LDG|STG)((?:\.[\w]+)*)", sass):
        (stores if name == "STG" else loads)[_bytes(modifiers)] += 1
    tensor = re.findall(r"\b(UTCHMMA|UTCQMMA|HGMMA|QGMMA|HMMA|QMMA)\b", sass)
    return {
        "registers": registers, "spills": spills + (stack + local > 0 and spills > 0),
        "loads": dict(sorted(loads.items())), "stores": dict(sorted(stores.items())),
        "tma": bool(re.search(r"\bUTMALDG", sass)), "matrix": max(set(tensor), key=tensor.count) if tensor else "",
        "occupancy": _occupancy(target, registers, warps, shared),
    }  # fmt: skip


def _bytes(modifiers: str) -> int:
    for bits in (256, 128, 64):
        if f".{bits}" in modifiers:
            return bits // 8
    return 2 if ".U16" in modifiers or ".S16" in modifiers else 1 if "8" in modifiers else 4


def _occupancy(target: str, registers: int, warps: int, shared: int) -> float:
    total, threads, blocks, kib = LIMITS[target]
    per_warp = -(-registers * 32 // 256) * 256
    resident = min(
        blocks, threads // (32 * warps), total // (per_warp * warps), kib * 1024 // (shared + 1024)
    )
    return round(resident * warps * 32 / threads, 2)


def _amd(kernel: Any, target: str, warps: int, shared: int) -> dict[str, Any]:
    text = kernel.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        return int(found[1]) if found else 0

    loads: collections.Counter[int] = collections.Counter()
    stores: collections.Counter[int] = collections.Counter()
    sizes = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "short": 2}
    for kind, what in re.findall(r"(?:global|buffer|flat)_(load|store)_(\w+)", text):
        size = next((n for name, n in sizes.items() if name in what), 1)
        (loads if kind == "load" else stores)[size] += 1
    registers = number("vgpr_count") + number("agpr_count")
    waves = min(8, 512 // max(8, -(-registers // 8) * 8))
    fit = min(waves * 4 // warps, 65536 // shared if shared else 32)
    return {
        "registers": registers, "spills": number("vgpr_spill_count") + number("sgpr_spill_count"),
        "loads": dict(sorted(loads.items())), "stores": dict(sorted(stores.items())), "tma": False,
        "matrix": "MFMA" if "v_mfma" in text else "", "occupancy": round(fit * warps / 32, 2),
    }  # fmt: skip


def _run(tool: str, *args: str) -> str:
    command = [str(TOOLS / tool), *args]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def problems(target: str, row: dict[str, Any]) -> list[str]:
    found = []
    if row["spills"]:
        found.append("spills")
    if target == "sm_90":
        moved = {int(size): int(size) * count for size, count in row["loads"].items()}
        if row["dot16"] and row["matrix"] != "HGMMA":
            found.append("a 16-bit dot without HGMMA")
        if not row["dot16"] and not row["tma"] and moved and max(moved, key=moved.__getitem__) < 16:
            found.append("most loads are narrower than 16 bytes")
    return found


def _widest(sizes: dict[Any, int]) -> str:
    return str(max(map(int, sizes))) if sizes else "-"


def render(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# Ahead-of-time audit of the Triton kernels",
        "",
        f"Generated by `make audit` with Triton {triton.__version__}; nothing here was run on a GPU. bfloat16; the shapes",
        "of `benchmarks/shapes.py`. Loads and stores: the widest global access in bytes. Occupancy: resident",
        "threads as a share of the multiprocessor's, by registers and shared memory. A kernel is listed once a",
        "target for all calls that specialise it alike, at the first of them.",
    ]
    for op in dict.fromkeys(row["op"] for row in rows):
        lines += [
            "",
            f"## {op}",
            "",
            "| call | kernel | target | warps | registers | spills | shared | occupancy | loads | stores | matrix |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for row in rows:
            if row["op"] == op:
                loads = "TMA" if row["tma"] else _widest(row["loads"])
                lines.append(
                    f"| {row['call']} | {row['kernel']} | {row['target']} | {row['warps']} | {row['registers']}"
                    f" | {row['spills']} | {row['shared']} | {row['occupancy']:.0%} | {loads}"
                    f" | {_widest(row['stores'])} | {row['matrix'] or '-'} |"
                )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="*", help="default: every op with a Triton backend")
    parser.add_argument(
        "--check", action="store_true", help="fail where the committed table would change"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    store = HERE / "audit.json"
    known = json.loads(store.read_text()) if store.exists() else {}
    names = [op for op, found in backends.TABLE.items() if "triton" in found]
    rows: list[dict[str, Any]] = []
    failures: list[str] = []
    fresh: dict[str, Any] = {}
    for op in names:
        skip = bool(options.ops) and op not in options.ops
        if skip:
            fresh |= {key: row for key, row in known.items() if row["op"] == op}
            rows += [row for row in known.values() if row["op"] == op]
            continue
        for shape in SHAPES_AUDITED:
            for case, launch in launches(op, shape):
                for target in TARGETS:
                    _, _, key = launch.source(target)
                    if key in fresh:
                        continue
                    row = known.get(key)
                    if row is None:
                        start = time.perf_counter()
                        row = {"op": op, "call": f"{case} {shape}", "kernel": launch.name, "target": target,
                               **inspect(launch, target)}  # fmt: skip
                        print(f"{op}: {row['call']} {launch.name} {target} {time.perf_counter() - start:.1f} s", flush=True)  # fmt: skip
                        known[key] = row
                        store.write_text(json.dumps(known, indent=0) + "\n")
                    fresh[key] = row
                    rows.append(row)
    for row in rows:
        failures += [
            f"{row['op']}: {row['call']} {row['kernel']} {row['target']}: {p}"
            for p in problems(row["target"], row)
        ]
    table = HERE / "audit.md"
    text = render(rows)
    if options.check and (not table.exists() or table.read_text() != text):
        failures.append("benchmarks/audit.md is not of this source: run `make audit` and commit it")
    store.write_text(json.dumps(fresh, indent=0) + "\n")
    table.write_text(text)
    print("\n".join(failures) or f"{len(rows)} binaries, no spill, no narrow load")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
