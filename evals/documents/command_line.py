"""The commands' own help, what a plan prints, and the recipe's keys, for docs/cli.md."""

import inspect
import json
import re
import textwrap
from typing import Any

from .results import results

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


def recipe_keys() -> str:
    """The keys of SparseExpansionModifier, their defaults, and its docstring's word on each."""
    from wexpand_plugin.compress.modifier import SparseExpansionModifier

    said = re.split(r"^:param (\w+): ", inspect.getdoc(SparseExpansionModifier) or "", flags=re.M)
    lines = []
    for name, text in zip(said[1::2], said[2::2], strict=True):
        field = SparseExpansionModifier.model_fields[name]
        default = ""
        if not field.is_required():
            default = f" ({json.dumps(field.get_default(call_default_factory=True))})"
        line = f"- `{name}`{default}: {' '.join(text.split())}"
        lines.append(
            textwrap.fill(
                line, 100, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
            )
        )
    return "\n".join(lines)


def plan_printed() -> str:
    """What a plan prints."""
    found = results("plan")
    return "\n".join(["```text", f"$ {found['command']}", *found["printed"], "```"])


TABLES = (commands, recipe_keys, plan_printed)
