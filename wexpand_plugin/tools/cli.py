"""The command line, `wexpand`: its commands stand in `commands` and `commands_compress`.

Exit codes: 0 all is well; 1 a problem was found or what was asked for cannot be done; 2 the command
line cannot be read. Errors are one sentence on standard error, with --debug a traceback.
"""

import os
from typing import Annotated

import typer

from .. import __version__
from . import commands, commands_compress
from .cli_errors import ErrorGroup

__all__ = ["app", "main"]

app = typer.Typer(
    name="wexpand",
    cls=ErrorGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"wexpand {__version__}")
        raise typer.Exit()


@app.callback()
def wexpand(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", envvar="WEXPAND_DEBUG", help="Show tracebacks of errors.")
    ] = False,
) -> None:
    """Language models with weights in few bits, sparse, or both, from llm-compressor to vLLM.

    \b
    A model that was pruned already, and is saved with its zeros:
      wexpand pack PRUNED OUT              make it small
      vllm serve OUT                       serve it
    A dense model, to a size that you choose (or, with -r, by a recipe):
      wexpand plan MODEL -d TEXT           what sizes are predicted to cost
      wexpand compress MODEL -d TEXT -o OUT --size 0.2
      wexpand inspect OUT                  what it weighs, and what a token reads
      wexpand verify OUT                   whether every byte is as written

    Exit codes: 0 all is well, 1 a problem was found or what was asked for cannot be done, 2 the
    command line cannot be read.
    """

for command in (
    commands_compress.compress,
    commands_compress.plan,
    commands.pack,
    commands.unpack,
    commands.inspect,
    commands.verify,
    commands.report,
    commands.synth,
):
    app.command()(command)
# lm-eval has options and a help of its own
app.command(
    "lm-eval",
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)(commands.lm_eval)


def main() -> None:
    """Entry point of `wexpand`."""
    # progress bars of libraries under our own are noise
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    app()


if __name__ == "__main__":
    main()
