"""Commands about the kernels: info, check, bench."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from dit_kernels.cli.console import EXTRAS, app, output


@app.command()
def info() -> None:
    """Say what this machine can run, and for each missing part the reason and what to type.

    Example:

    * `dit-kernels info`
    """
    from importlib.metadata import PackageNotFoundError, version
    from importlib.util import find_spec

    import torch

    from dit_kernels import backends

    asked = asked_backend(backends)
    versions = Table("", "version", show_edge=False)
    versions.add_row("python", sys.version.split()[0])
    for package in ("dit-kernels", "torch", "triton", "diffusers"):
        try:
            versions.add_row(package, version(package))
        except PackageNotFoundError:
            versions.add_row(package, "not installed")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(index)
            versions.add_row(
                f"GPU {index}",
                f"{found.name}, {found.total_memory / 2**30:.0f} GiB, "
                f"compute capability {found.major}.{found.minor}",
            )
    else:
        versions.add_row("GPU", "none that torch can use")
    if asked:
        versions.add_row("DIT_KERNELS_BACKEND", asked)
    output.print(versions)
    output.print()
    table = Table("backend", "here", "why not", "what to type", show_edge=False)
    for backend in backends.report():
        table.add_row(
            backend.name, "yes" if backend.available else "no", backend.reason, backend.fix
        )
    output.print(table)
    missing = [library for library in EXTRAS if find_spec(library) is None]
    for extra in dict.fromkeys(EXTRAS[library] for library in missing):
        names = ", ".join(library for library in missing if EXTRAS[library] == extra)
        output.print(
            f'\n{names} not installed; type: pip install "dit-kernels[{extra}]"', markup=False
        )


@app.command()
def check(
    diffusers: Annotated[
        bool,
        typer.Option(
            "--diffusers",
            help="Instead generate with small random diffusers pipelines, patched and unpatched.",
        ),
    ] = False,
) -> None:
    """Compare every backend that runs here with the reference; exit code 1 if one is off.

    An error is allowed up to twice that of the plain PyTorch formula in the same precision, both
    measured against float64. A row shows, of all cases of an op, the tensor that comes nearest to
    what is allowed.

    Examples:

    * `dit-kernels check`
    * `TRITON_INTERPRET=1 dit-kernels check` runs Triton's kernels too, without a GPU
    * `dit-kernels check --diffusers` compares Wan, CogVideoX, LTX, Flux and SD3.5 with themselves
    """
    from dit_kernels import backends

    asked_backend(backends)
    if diffusers:
        from dit_kernels.cli.patched import check_pipelines

        check_pipelines()
        return
    from dit_kernels import check as checks

    # narrow enough for 80 columns: what does not fit a terminal is cut, and the verdict comes last
    table = Table(
        box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False,
        title="error, and what is allowed", title_justify="left",
    )  # fmt: skip
    for heading in ("op", "backend", "dtype"):
        table.add_column(heading, no_wrap=True)
    for heading in ("forward", "allowed", "backward", "allowed"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("")
    rows = list(checks.run())
    groups: dict[tuple[str, ...], dict[str, checks.Row]] = {}
    for row in rows:
        groups.setdefault((row.op, row.backend, row.dtype), {})[row.direction] = row
    for name, group in groups.items():
        cells = [
            text
            for direction in ("forward", "backward")
            for text in (f"{group[direction].error:.1e}", f"{group[direction].allowed:.1e}")
        ]
        fine = all(row.ok for row in group.values())
        table.add_row(*name, *cells, "ok" if fine else "[red]OFF[/red]")
    output.print(table)
    wrong = [row for row in rows if not row.ok]
    for row in wrong:
        output.print(
            f"{row.backend} {row.dtype}: {row.case} is off by {row.error:.2e}, allowed {row.allowed:.2e}"
        )
    output.print(
        f"{sum(row.compared for row in rows)} tensors compared, "
        + (f"{len(wrong)} rows off" if wrong else "all within what is allowed")
    )
    if wrong:
        raise typer.Exit(1)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def bench(context: typer.Context) -> None:
    """Time every op against eager PyTorch, torch.compile and the best outside kernels.

    `dit-kernels bench --help` lists the options. The suite is part of the repository, not of the
    installed package.
    """
    root = Path(__file__).parent.parent.parent
    if not (root / "benchmarks" / "bench.py").is_file():
        raise ValueError(
            "the benchmark suite is in the repository: clone it, then type `make bench`"
        )
    sys.path.insert(0, str(root))
    from benchmarks import bench as suite

    raise typer.Exit(suite.main(context.args))


def asked_backend(backends: Any) -> str:
    """What DIT_KERNELS_BACKEND says, or nothing.

    Raises:
        ValueError: it names no backend.
    """
    name = os.environ.get("DIT_KERNELS_BACKEND", "")
    if name:
        backends.check_name("DIT_KERNELS_BACKEND", name)
    return name
