"""The commands on diffusers' models: patch-report, and `check --diffusers`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from dit_kernels.cli.console import app, output


@app.command(name="patch-report")
def patch_report(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_CONFIG", help="A config.json, or the folder of a diffusers model."
        ),
    ],
) -> None:
    """Say what `dit_kernels.patch` replaces in a diffusers model, and what it leaves and why.

    Only the configuration is read; no weights are.

    Examples:

    * `dit-kernels patch-report transformer/config.json`
    * `dit-kernels patch-report path/to/Wan2.1-T2V-1.3B-Diffusers`
    """
    from dit_kernels.integrations.inspection import report_of_config

    output.print(str(report_of_config(model)), highlight=False, soft_wrap=True, markup=False)


def check_pipelines() -> None:
    """Print how far small random pipelines are from themselves when patched; exit code 1 if one is off."""
    from dit_kernels.integrations.pipelines import compare

    table = Table(show_edge=False, title="patched against unpatched", title_justify="left")
    for heading in ("pipeline", "dtype"):
        table.add_column(heading, no_wrap=True)
    for heading in ("op calls", "steps", "difference", "PSNR, dB"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    rows = list(compare())
    for row in rows:
        fine = "ok" if not row.put_back else f"[red]{row.put_back} put back[/red]"
        table.add_row(
            row.pipeline, row.dtype, str(row.replaced), str(row.steps), f"{row.difference:.1e}",
            "equal" if row.psnr == float("inf") else f"{row.psnr:.1f}", fine,
        )  # fmt: skip
    output.print(table)
    if any(row.put_back for row in rows):
        raise typer.Exit(1)
