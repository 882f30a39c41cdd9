"""The program `kvserve` and its commands.

Holds no state. What a command needs is imported inside it, so that `--help` and `--version` answer
at once and also where MLX cannot be loaded.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from kvserve import __version__
from kvserve.cli.cache import commands as cache
from kvserve.cli.serve import serve

app = typer.Typer(
    name="kvserve",
    no_args_is_help=True,
    add_completion=False,
    # Boxes and colours for people; plain lines for a pipe or a log.
    rich_markup_mode="rich" if sys.stdout.isatty() else None,
    # A pretty traceback prints local variables, and those hold what users wrote.
    pretty_exceptions_enable=False,
)
app.command()(serve)
app.add_typer(cache.app, name="cache")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvserve {__version__}")
        raise typer.Exit


@app.callback()
def kvserve(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Serve local language models and never read a prompt twice."""


@app.command()
def doctor() -> None:
    """Say what kvserve finds on this machine; exit with 1 if something it needs is broken."""
    from kvserve.cli.doctor import examine, report

    raise typer.Exit(report(examine()))


def main() -> None:
    """Run the command line and exit."""
    try:
        app()
    except BrokenPipeError:
        # The reader of our output has left, as `head` does. Keep the interpreter's own last flush
        # from saying so.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
