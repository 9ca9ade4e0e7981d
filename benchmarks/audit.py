"""The binaries of every Triton kernel, compiled without a GPU: `python -m benchmarks.audit [OP ...]`.

Calls the public ops, forward and backward, at benchmark shapes with launches recorded (see `offline`),
compiles each kernel as that call specialises it, for each target with the tiles that the target gets, and
reads registers, spills, shared memory, widths of global access and matrix instructions from the binary.
Writes `audit.md` and `audit.json` beside this file. What is there already is not compiled again: it is found
by a hash of the kernel's code, of what the call specialises and of the target, whichever Triton compiled it.

Fails on
    a spill
    a block that does not fit a multiprocessor
    sm_90, no matrix product: narrower loads move more bytes than those of 16, or, where the rows of the
        tensors that a kernel mainly reads are not that aligned, than those of the widest that they allow
    sm_90, a 16-bit matrix product without HGMMA
    with --check: a committed table that is not of this source, for the ops and targets that are in it
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import math
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from benchmarks.cases import Arguments, Case, Random, cases_for
from benchmarks.offline import TARGETS, Launch, recorded
from benchmarks.shapes import SHAPES, Shape
from dit_kernels import backends, ops
from dit_kernels.ops import triton_tuning

SHAPES_AUDITED = tuple(name for name in SHAPES if not name.startswith("tiny-"))
HERE = Path(__file__).parent
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# a block's shared memory in KiB; sm_80's tiles are also those of sm_86, sm_89 and sm_120, which have the least
SHARED = {"sm_80": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}
TENSOR_COLUMNS = 512  # of sm_100's memory for matrix products

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


def _attend(dim: int, window: tuple[int, int, int] | None = None, **options: Any) -> Callable[[Shape, Random], Arguments]:  # fmt: skip
    """Attention at the shape's grid with other head dims and forms. `kv_heads`: of 4 query heads."""

    def make(shape: Shape, randn: Random) -> Arguments:
        text, kv_heads = options.get("text_tokens", 0), options.get("kv_heads", 4)
        q, k, v = randn(1, shape.patches + text, 4 + 2 * kv_heads, dim).split(
            [4, kv_heads, kv_heads], dim=2
        )
        given = {name: value for name, value in options.items() if name != "kv_heads"}
        if window:
            given["window_size"] = window
        if "cu_seqlens" in options:
            starts = (0, shape.patches // 3, shape.patches + text)
            given["cu_seqlens"] = torch.tensor(starts, dtype=torch.int32)
            given["max_seqlen"] = shape.patches + text
        elif window or text or "causal_time" in options:
            given["grid"] = shape.grid
        return {"q": q, "k": k, "v": v, **given}

    return make


# head dims that the table of tiles names, and of its widest row one between and the last
_DIMS = (64, 72, 80, 88, 96, 112, 128, 192, 256)
_WINDOW = (6, 8, 8)
_ATTENTION = (
    *(Case("attention3d", f"d{d}", "attention3d", _attend(d)) for d in _DIMS),
    *(Case("attention3d", f"d{d} window", "attention3d", _attend(d, _WINDOW)) for d in _DIMS),
    *(
        Case("attention3d", f"d{d} {name}", "attention3d", _attend(d, **options))
        for d in (64, 112, 128, 192)
        for name, options in {
            "window text": dict(window=_WINDOW, text_tokens=256),
            "window causal": dict(window=_WINDOW, causal_time=True),
            "causal": dict(causal_time=True),
            "packed": dict(cu_seqlens=True),
            "grouped": dict(kv_heads=1),
        }.items()
    ),
)

# forms that the benchmarks do not time, at the shape of a model that has them
FORMS: dict[str, tuple[Case, ...]] = {
    "cogvideox-5b": (Case("adaln", "affine", "gated_adaln", _affine),),
    "wan-14b-720p": (Case("adaln", "tables", "gated_adaln", _tables),),
    "wan-1.3b-480p": (Case("adaln", "row-a-token", "gated_adaln", _row_a_token), *_ATTENTION),
    "flux-1024": (Case("adaln", "row-index", "gated_adaln", _row_index),),
    "mochi": (Case("adaln", "sandwich", "gated_adaln", _sandwich),),
}


def _calls(op: str, shape: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """(case, forward and backward of it) of every benchmark case of the op."""
    for case in (*cases_for(SHAPES[shape], (op,)), *FORMS.get(shape, ())):
        if case.op != op:
            continue
        kwargs = case.make(SHAPES[shape], lambda *size: torch.empty(size, dtype=torch.bfloat16))
        leaves = [v for v in kwargs.values() if isinstance(v, Tensor) and v.is_floating_point()]
        for tensor in leaves:
            if tensor.is_leaf:
                tensor.requires_grad_()
        yield case.name, functools.partial(_call, getattr(ops, case.function), kwargs, leaves)


def _call(function: Callable[..., Any], kwargs: Arguments, leaves: list[Tensor]) -> None:
    result = function(**kwargs, backend="triton")
    result = result if isinstance(result, tuple) else (result,)
    torch.autograd.grad(result, leaves, [torch.empty_like(t) for t in result], allow_unused=True)


def launches(op: str, shape: str, target: str = "sm_90") -> Iterator[tuple[str, Launch]]:
    """(case, launch) of forward and backward of every benchmark case of the op."""
    for case, call in _calls(op, shape):
        with recorded(target) as found:
            call()
        for launch in found:
            yield case, launch


def candidates(op: str, shape: str, target: str, done: set[tuple[str, str]]) -> Iterator[tuple[str, Launch]]:  # fmt: skip
    """The same with each of the tiles that the tuner would try, for the classes of shapes that are not done."""
    for case, call in _calls(op, shape):
        with recorded(target), triton_tuning.noted() as asked:
            call()
        for (kernel, name), (key, default) in asked.items():
            if (kernel, name) in done or kernel not in triton_tuning.CANDIDATES:
                continue
            done.add((kernel, name))
            with recorded(target) as found:
                for tiles in triton_tuning.CANDIDATES[kernel](key, default):
                    with triton_tuning.tried(kernel, name, tiles):
                        call()
            for launch in found:
                yield case, launch


def inspect(launch: Launch, target: str) -> dict[str, Any]:
    """Compile, and read the binary."""
    kernel = launch.compile(target)
    warps = kernel.metadata.num_warps
    shared = kernel.metadata.shared
    read = _amd if target.startswith("gfx") else _nvidia
    row = {"tile": launch.tile, "warps": warps, "shared": shared, **read(kernel, target, warps, shared)}  # fmt: skip
    dots = re.findall(r"(?:tt\.dot|warp_group_dot|tc_gen5_mma) .*", kernel.asm["ttgir"])
    row["dot16"] = any(re.search(r"xb?f16\b", line) for line in dots)
    row["aligned"] = math.gcd(_alignment(_read(kernel.asm["ttir"], launch.tensors)), launch.run)
    return row


def _read(ttir: str, tensors: list[Tensor]) -> list[Tensor]:
    """Those of a kernel's tensors that it loads from: loads are followed back to the pointers they come from."""
    header = next(line for line in ttir.splitlines() if "tt.func public" in line)
    pointers = re.findall(r"%(\w+): !tt\.ptr", header)
    comes_from = dict(
        re.findall(r"%(\w+) = tt\.(?:addptr|splat|broadcast|expand_dims|bitcast) %(\w+)", ttir)
    )
    found = set()
    for name in re.findall(r"tt\.load %(\w+)", ttir):
        while name in comes_from:
            name = comes_from[name]
        found.add(name)
    pairs = zip(pointers, tensors, strict=True)
    return [tensor for name, tensor in pairs if name in found]


def _alignment(tensors: list[Tensor]) -> int:
    """The widest access in bytes, at most 16, that the rows of the larger of these tensors allow."""
    most = max((t.numel() * t.element_size() for t in tensors), default=0)
    widest = 16
    for t in tensors:
        size = t.element_size()
        if 2 * t.numel() * size < most:
            continue
        strides = [s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1]
        unit = 1 in strides
        steps = [s * size for s in strides if s != 1] if unit else [size]
        widest = math.gcd(widest, t.data_ptr(), *steps)
    return widest


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
    for name, modifiers in re.findall(r"\b(LDGSTS|LDG|STG)\b((?:\.[\w]+)*)", sass):
        (stores if name == "STG" else loads)[_bytes(modifiers)] += 1
    tensor = re.findall(r"\b(UTCHMMA|UTCQMMA|HGMMA|QGMMA|HMMA|QMMA)\b", sass)
    return {
        "registers": registers, "spills": spills + (stack + local > 0 and spills > 0),
        "loads": dict(sorted(loads.items())), "stores": dict(sorted(stores.items())),
        "tma": bool(re.search(r"\bUTMALDG", sass)), "matrix": max(set(tensor), key=tensor.count) if tensor else "",
        "occupancy": _occupancy(target, registers, warps, shared, kernel.metadata.tmem_size or 0),
    }  # fmt: skip


def _bytes(modifiers: str) -> int:
    for bits in (256, 128, 64):
        if f".{bits}" in modifiers:
            return bits // 8
    return 2 if ".U16" in modifiers or ".S16" in modifiers else 1 if "8" in modifiers else 4


def _occupancy(target: str, registers: int, warps: int, shared: int, columns: int) -> float:
    total, threads, blocks, kib = LIMITS[target]
    per_warp = -(-registers * 32 // 256) * 256
    resident = min(
        blocks, threads // (32 * warps), total // (per_warp * warps), kib * 1024 // (shared + 1024)
    )
    if columns:
        resident = min(resident, TENSOR_COLUMNS // columns)
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
    # to memory; scalar registers that go to lanes of a vector register instead take no load and no store
    spills = len(re.findall(r"\bscratch_(?:load|store)_", text)) or number(
        "private_segment_fixed_size"
    )
    registers = number("vgpr_count")  # the accumulation registers are counted in it
    waves = min(8, 512 // max(8, -(-registers // 8) * 8))
    fit = min(waves * 4 // warps, 65536 // shared if shared else 32)
    return {
        "registers": registers, "spills": spills,
        "loads": dict(sorted(loads.items())), "stores": dict(sorted(stores.items())), "tma": False,
        "matrix": "MFMA" if "v_mfma" in text else "", "occupancy": round(fit * warps / 32, 2),
    }  # fmt: skip


def _run(tool: str, *args: str) -> str:
    command = [str(TOOLS / tool), *args]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def problems(row: dict[str, Any]) -> list[str]:
    found = []
    if row["spills"]:
        found.append("spills")
    if row["occupancy"] == 0 or row["shared"] > 1024 * SHARED[row["target"]]:
        found.append(f"a block does not fit: {row['shared']} bytes of shared memory")
    if row["target"] == "sm_90":
        moved = {int(size): int(size) * count for size, count in row["loads"].items()}
        if row["dot16"] and row["matrix"] != "HGMMA":
            found.append("a 16-bit matrix product without HGMMA")
        if not row["dot16"] and not row["tma"] and moved:
            main = max(moved, key=lambda size: moved[size])
            if main < row["aligned"]:
                found.append(f"most bytes come by loads of {main} where {row['aligned']} fit")
    return found


def _widest(sizes: dict[Any, int]) -> str:
    return str(max(map(int, sizes))) if sizes else "-"


def _table(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    yield "| call | kernel | target | tile | warps | registers | spills | shared | occupancy | loads | stores | matrix |"
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|"
    for row in rows:
        loads = "TMA" if row["tma"] else _widest(row["loads"])
        if row["aligned"] < 16:
            loads += f" ({row['aligned']})"
        cells = (
            row["call"], row["kernel"], row["target"], row["tile"] or "-", row["warps"], row["registers"],
            row["spills"], row["shared"], f"{row['occupancy']:.0%}", loads, _widest(row["stores"]),
            row["matrix"] or "-",
        )  # fmt: skip
        yield "| " + " | ".join(map(str, cells)) + " |"


def render(rows: list[dict[str, Any]]) -> str:
    versions = " and ".join(sorted({row["triton"] for row in rows}))
    lines = [
        "# Ahead-of-time audit of the Triton kernels",
        "",
        f"Generated by `make audit` from binaries that Triton {versions} compiled; nothing here was run on a GPU.",
        "bfloat16; the shapes of `benchmarks/shapes.py`. Tile: the kernel's BLOCK sizes. Loads and stores: the widest",
        "global access in bytes; in brackets what the rows of the tensors it mainly reads allow, where less than 16.",
        "Spills: instructions that move registers to or from memory.",
        "Occupancy: resident threads as a share of the multiprocessor's, by registers, shared and tensor memory. Calls",
        "that specialise a kernel alike share a row, named after the first of them.",
    ]
    there = {(row["op"], row["target"]) for row in rows}
    for op in dict.fromkeys(row["op"] for row in rows):
        missing = [target for target in TARGETS if (op, target) not in there]
        if missing:
            lines += ["", f"{op} has not been compiled for {', '.join(missing)} yet."]
    for op in dict.fromkeys(row["op"] for row in rows):
        lines += [
            "",
            f"## {op}",
            "",
            *_table(r for r in rows if r["op"] == op and not r["candidate"]),
        ]
        tried = [r for r in rows if r["op"] == op and r["candidate"]]
        if tried:
            lines += ["", "What the tuner tries beside the defaults:", "", *_table(tried)]
    return "\n".join(lines) + "\n"


def wanted(op: str, target: str, tuned: bool) -> Iterator[tuple[str, str, Launch, bool]]:
    """(key, call, launch, whether it is no default but a candidate) of every distinct binary."""
    seen = set()
    done: set[tuple[str, str]] = set()
    found = [(shape, False, launches(op, shape, target)) for shape in SHAPES_AUDITED]
    if tuned:
        found += [(shape, True, candidates(op, shape, target, done)) for shape in SHAPES_AUDITED]
    for shape, candidate, calls in found:
        for case, launch in calls:
            key = launch.key(target)
            if key not in seen:
                seen.add(key)
                yield key, f"{case} {shape}", launch, candidate


def save(path: Path, rows: dict[str, dict[str, Any]]) -> None:
    """One row a line, all or nothing."""
    lines = [f"{json.dumps(key)}: {json.dumps(row)}" for key, row in rows.items()]
    new = path.with_suffix(".new")
    new.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    new.replace(path)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.audit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )  # fmt: skip
    names = [op for op, found in backends.TABLE.items() if "triton" in found]
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {' '.join(names)}; default: all")
    parser.add_argument("--target", action="append", choices=TARGETS, help="default: all")
    parser.add_argument(
        "--candidates", action="store_true", help="also the tiles that the tuner tries; once in the table, they stay"
    )  # fmt: skip
    parser.add_argument(
        "--check", action="store_true", help="fail where the committed table would change, and leave it"
    )  # fmt: skip
    options = parser.parse_args()
    unknown = set(options.ops) - set(names)
    if unknown:
        parser.error(f"no op {unknown.pop()!r}; there are {' '.join(names)}")
    torch.set_num_threads(1)
    store, table = HERE / "audit.json", HERE / "audit.md"
    known = json.loads(store.read_text()) if store.exists() else {}
    # ops share kernels: each op has its row of a binary, compiled once
    same = {name.partition(" ")[2]: row for name, row in known.items()}
    rows: dict[str, dict[str, Any]] = {}
    for op in names:
        # the launches of a call in order, each for every target
        found = {}
        for target in TARGETS:
            before = {k: r for k, r in known.items() if (r["op"], r["target"]) == (op, target)}
            left_out = (options.ops and op not in options.ops) or target not in (
                options.target or TARGETS
            )
            if left_out or (options.check and not before):
                found |= before
                continue
            tuned = options.candidates or any(row["candidate"] for row in before.values())
            for key, call, launch, candidate in wanted(op, target, tuned):
                row = known.get(f"{op} {key}") or same.get(key)
                if row is None:
                    start = time.perf_counter()
                    row = {"op": op, "call": call, "kernel": launch.name, "target": target,
                           "candidate": candidate, "triton": triton.__version__, **inspect(launch, target)}  # fmt: skip
                    seconds = time.perf_counter() - start
                    print(f"{op}: {call} {launch.name} {target} {seconds:.1f} s {' '.join(problems(row))}", flush=True)  # fmt: skip
                    known[f"{op} {key}"] = same[key] = row
                    if not options.check:
                        save(store, known)
                found[f"{op} {key}"] = {**row, "op": op, "call": call, "candidate": candidate}
        rows |= _by_call(found)
    failures = [
        f"{row['op']}: {row['call']} {row['kernel']} {row['target']}: {problem}"
        for row in rows.values()
        if not row["candidate"]
        for problem in problems(row)
    ]
    text = render(list(rows.values()))
    if not options.check:
        save(store, rows)
        table.write_text(text)
    elif not table.exists() or table.read_text() != text:
        failures.append(
            f"benchmarks/{table.name} is not of this source: run `make audit` and commit it"
        )
    print("\n".join(failures) or f"{len(rows)} binaries: no spill, no narrow load")
    return 1 if failures else 0


def _by_call(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The targets of a call's kernel beside one another, in the order of the calls."""
    order: dict[tuple[str, str], int] = {}
    for row in found.values():
        order.setdefault((row["call"], row["kernel"]), len(order))
    pairs = sorted(found.items(), key=lambda pair: order[pair[1]["call"], pair[1]["kernel"]])
    return dict(pairs)


if __name__ == "__main__":
    sys.exit(main())
