"""The commands' own help, for docs/cli.md."""

from typing import Any

__all__ = ["TABLES"]

WIDTH = 96


def _help(command: Any, name: str) -> str:
    context = command.context_class(
        command, info_name=name, terminal_width=WIDTH, max_content_width=WIDTH,
        help_option_names=["-h", "--help"],
    )  # fmt: skip
    return "\n".join(line.rstrip() for line in command.get_help(context).splitlines())


def commands() -> str:
    """`wexpand --help` of every command."""
    import typer

    from wexpand_plugin.tools.cli import app

    group = typer.main.get_command(app)
    pages = [f"```text\n{_help(group, 'wexpand')}\n```"]
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        pages.append(f"## {name}\n\n```text\n{_help(command, f'wexpand {name}')}\n```")
    return "\n\n".join(pages)


TABLES = (commands,)
