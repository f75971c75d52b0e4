"""Blocks of a markdown file that a function writes.

    <!-- table: NAME -->
    what the function NAME returned
    <!-- end -->

Each marker is a line of its own. Everything else in the file is written by hand.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

__all__ = ["DOCUMENTS", "fill", "outside"]

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
"""the files with such blocks"""

_BLOCK = re.compile(r"^<!-- table: (\S+) -->\n(.*?)^<!-- end -->$", re.DOTALL | re.MULTILINE)
_MARKER = re.compile(r"^<!-- (table: .*|end) -->$", re.MULTILINE)


def fill(text: str, tables: Mapping[str, Callable[[], str]]) -> str:
    """`text` with every block written anew.

    :raises ValueError: a block without an end, or a name that is not in `tables`
    """
    blocks = _BLOCK.findall(text)
    if 2 * len(blocks) != len(_MARKER.findall(text)):
        raise ValueError("a '<!-- table: NAME -->' or '<!-- end -->' has no partner")
    if unknown := {name for name, _ in blocks} - tables.keys():
        raise ValueError(f"table {min(unknown)!r} is not one of {', '.join(sorted(tables))}")

    def block(match: re.Match[str]) -> str:
        name = match.group(1)
        return f"<!-- table: {name} -->\n{tables[name]().strip()}\n<!-- end -->"

    return _BLOCK.sub(block, text)


def outside(text: str) -> str:
    """What of `text` was written by hand."""
    return _BLOCK.sub("", text)
