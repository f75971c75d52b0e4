"""`wexpand` as the tests of its commands run it."""

from typer.testing import CliRunner

from wexpand_plugin.tools.cli import app


def run(*arguments, code: int = 0):
    """Run in this process; returns the result, whose exit code must be `code`."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def sentence(result) -> str:
    """The one line on standard error of a failed command."""
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("wexpand: ") and "Traceback" not in lines[0]
    return lines[0]
