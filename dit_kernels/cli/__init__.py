"""The command line: train, train-codec, generate, evaluate, demo, info, check, bench, patch-report.

A file a group of commands. Imports of torch and of the extras' libraries are inside the commands,
so that --help is quick.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

# they register their commands
from dit_kernels.cli import console, generate, kernels, patched, train
from dit_kernels.cli.console import app

__all__ = ["app", "console", "generate", "kernels", "main", "patched", "train"]

# What typer raises for a wrong command line; it exports only this subclass of it.
UsageError: type[BaseException] = typer.BadParameter.__mro__[1]


def main() -> None:
    """Run the command line; wrong input ends in one line on stderr and exit code 2."""
    try:
        code = app(standalone_mode=False)
    except UsageError as error:
        code = console.fail(error.format_message())  # type: ignore[attr-defined]
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library not in console.EXTRAS:
            raise
        code = console.fail(
            f"this command needs {library}, which is not installed; "
            f'type: pip install "dit-kernels[{console.EXTRAS[library]}]"'
        )
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        code = console.fail(f"{error.strerror or error}{where if error.strerror else ''}")
    except (ValueError, RuntimeError) as error:
        code = console.fail(console.in_options(str(error), sys.argv[1:]))
    sys.exit(code or 0)


def show_version(wanted: bool) -> None:
    """Print the package's version, and end."""
    if wanted:
        from dit_kernels import __version__

        print(f"dit-kernels {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Fused kernels for Diffusion Transformers, and a small text-to-video model built on them.

    Start here:

    * `dit-kernels generate "a seven moving left"` makes a video from a caption
    * `dit-kernels train` trains such a model
    * `dit-kernels info` says what this machine can run, and what to type for the rest

    `dit-kernels COMMAND --help` explains a command, with examples.
    """
    if context.invoked_subcommand is None:
        console.output.print(context.get_help(), highlight=False)
