"""The command line ``mogle-rt``. Each of its commands is a function in another module."""

from __future__ import annotations

from typing import Annotated

import typer

from mogle_rt import __version__
from mogle_rt.apps.bundle_commands import convert, examples, info, quantize
from mogle_rt.apps.cost_command import cost
from mogle_rt.apps.data_sets.batch_command import batch
from mogle_rt.apps.data_sets.calibrate_command import calibrate
from mogle_rt.apps.data_sets.evaluate_command import evaluate
from mogle_rt.apps.edit_command import edit
from mogle_rt.apps.embed_command import embed
from mogle_rt.apps.generate_command import generate
from mogle_rt.apps.program import HELP_OPTIONS, run_app
from mogle_rt.apps.serve_command import serve
from mogle_rt.apps.several_values import SeveralMasks
from mogle_rt.export.__main__ import main as export

app = typer.Typer(
    name="mogle-rt",
    help="Draw faces from semantic masks and prompts: an optimised runtime for Face-MoGLE.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings=HELP_OPTIONS,
)
for _name, _command in (
    ("convert", convert),
    ("quantize", quantize),
    ("info", info),
    ("cost", cost),
    ("generate", generate),
    ("batch", batch),
    ("edit", edit),
    ("embed", embed),
    ("evaluate", evaluate),
    ("calibrate", calibrate),
    ("serve", serve),
    ("export", export),
    ("examples", examples),
):
    app.command(_name, cls=SeveralMasks if _command is generate else None)(_command)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"mogle-rt {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line."""
    run_app(app)
