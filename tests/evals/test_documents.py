"""README and docs say what evals/results say."""

import pytest

from evals.documents import TABLES, picture
from evals.documents.fill import DOCUMENTS, fill

AGAIN = "run 'make docs' (python -m evals.documents)"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_blocks_are_as_the_results_say(path):
    text = path.read_text(encoding="utf8")
    assert fill(text, TABLES) == text, AGAIN


def test_the_plot_shows_the_results():
    assert picture.drawn() == picture.series(), AGAIN


def test_every_table_stands_somewhere():
    text = "".join(path.read_text(encoding="utf8") for path in DOCUMENTS)
    assert {name for name in TABLES if f"<!-- table: {name} -->" not in text} == set()


def test_blocks_are_replaced_and_nothing_else():
    text = "a\n<!-- table: t -->\nold\n<!-- end -->\nb <!-- end --> c\n"
    new = fill(text, {"t": lambda: "new\n\n"})
    assert new == text.replace("old", "new")
    empty = text.replace("old\n", "")
    assert fill(empty, {"t": lambda: "new"}) == new


@pytest.mark.parametrize(
    "text,message",
    [
        ("<!-- table: t -->\n", "has no partner"),
        ("<!-- end -->\n", "has no partner"),
        ("<!-- table: t -->\n<!-- table: t -->\n<!-- end -->\n", "has no partner"),
        ("<!-- table: u -->\n<!-- end -->\n", "table 'u' is not one of t"),
    ],
)
def test_markers_that_cannot_work(text, message):
    with pytest.raises(ValueError, match=message):
        fill(text, {"t": lambda: ""})
