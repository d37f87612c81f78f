"""The command line. Each verb imports what it needs when it is called, so that `--help` answers at once."""

import json
from typing import Annotated

import typer

from . import __version__

__all__ = ["app", "main"]

app = typer.Typer(
    name="unet-fast",
    help="U-Net for microscopy: exact, fast, inside a memory budget.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"unet-fast {__version__}")
        raise typer.Exit


@app.callback()
def _frame(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print data on stdout and nothing else.")] = False,
) -> None:
    """Show versions, devices, native libraries, and which implementation each operation takes here and why."""
    from . import doctor

    found = doctor.examine()
    typer.echo(json.dumps(found, indent=2) if as_json else doctor.render(found))


def main() -> None:
    """Entry point of the `unet-fast` command. Exit codes: 0 ok, 2 usage."""
    app()
