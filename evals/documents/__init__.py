"""README and docs that print their own numbers: `python -m evals.documents`, or `make docs`.

Every table and every measured number of README.md and docs/*.md stands in a block that a function
here writes from evals/results/*.json (`fill`): `accuracy` and `speed` have one small function per
table, `curve` sets the dial beside other quantisers, `spending` compares ways to spend bytes,
`costs` gathers what the method costs, `targets` says what was aimed at, `versions` what is tested
with what, `command_line` writes the help of every command, `picture` and `evidence` draw plots,
`large` shows what is computed and not measured. A number of a new run gets into the documents by
that command and in no other way;
tests/evals/test_documents.py fails while they differ.
"""

from collections.abc import Callable

from . import (
    accuracy,
    command_line,
    costs,
    curve,
    evidence,
    large,
    speed,
    spending,
    targets,
    versions,
)

__all__ = ["TABLES"]

MODULES = (
    accuracy, curve, spending, evidence, costs, speed, large, targets, versions, command_line,
)  # fmt: skip
TABLES: dict[str, Callable[[], str]] = {
    function.__name__: function for module in MODULES for function in module.TABLES
}
"""name in a marker -> what writes the block"""
