"""README and docs say what evals/results say."""

import re

import pytest

from evals.documents import TABLES, accuracy, picture
from evals.documents.fill import DOCUMENTS, fill, outside

AGAIN = "run 'make docs' (python -m evals.documents)"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_blocks_are_as_the_results_say(path):
    text = path.read_text(encoding="utf8")
    assert fill(text, TABLES) == text, AGAIN


def test_the_plot_shows_the_results():
    assert picture.drawn() == picture.series(), AGAIN


def test_rows_that_are_still_to_come(monkeypatch):
    """Each in its place, by the bits that it stores, with what is known of it."""
    rows = {
        "dense": {"loss": 3.0, "bits_stored": 16, "others": {"stories": 2.0}},
        "GPTQ 3 bits": {"loss": 3.5},
        "30% int4": {"loss": 3.25, "bits_stored": 4.0, "others": {"stories": 2.125}},
        "2:4 int4 tuned": {"loss": 3.4, "bits_stored": 3.125},
        "2:4 int4 tuned as a whole": {"loss": 3.35, "bits_stored": 3.125},
        "int4 groups of 64": {"loss": 3.06, "bits_stored": 4.25},
        "int3": {"loss": 3.3, "bits_stored": 3.5},
    }
    monkeypatch.setattr(accuracy, "results", lambda name: {"rows": rows, "model": "A"})
    assert accuracy.real_model().splitlines()[2:] == [
        "| `values: int4` groups of 64 | 4.25 | 0.060 | | |",
        "| 30% zeros, int4 values | 4.00 | 0.250 | | |",
        "| `values: int3` | 3.50 | 0.300 | | |",
        "| llm-compressor's GPTQModifier, 3 bits | 3.25 | 0.500 | | |",
        "| 2:4, int4 values | 3.12 | | 0.400 | 0.350 |",
    ]
    assert accuracy.real_model_others().splitlines()[-1] == "| 30% zeros, int4 values | 0.125 |"
    curve = {"dense": rows["dense"], "mlp: ours 3.25 tuned": {"loss": 3.2, "bits_stored": 3.2},
             "all: GPTQ 3": {"loss": 3.5, "bits_stored": 3.25},
             "mlp: llama.cpp Q8_0": {"loss": 3.0, "bits_stored": 8.5}}  # fmt: skip
    monkeypatch.setattr(picture, "results", lambda name: {"rows": curve})
    assert picture.series() == {
        "all": {"GPTQ": {"3": (3.25, 0.5)}},
        "mlp": {"ours, tuned": {"3.25": (3.2, 0.2)}, "llama.cpp": {"Q8_0": (8.5, 0.0)}},
    }
    del rows["dense"]["others"]
    assert "nothing has been measured yet" in accuracy.real_model_others()


def test_more_text_stands_beside_fewer_epochs(monkeypatch):
    """In a table of its own, and not among rows of the usual text."""
    rows = {"dense": {"loss": 3.0}} | {
        f"50% int4{how}": {"loss": loss, "bits_stored": 3.125}
        for how, loss in (
            ("", 3.5), (" tuned as a whole", 3.25), (" tuned in 4 epochs", 3.2),
            (" tuned in 4 and 1 epochs, 131072 tokens", 3.125),
        )
    }  # fmt: skip
    monkeypatch.setattr(accuracy, "results", lambda name: {"rows": rows})
    assert accuracy.real_model_more_text().splitlines()[2:] == [
        "| 50% zeros, int4 values | 65,536 | 4 | 0 | 0.200 |",
        "| 50% zeros, int4 values | 65,536 | 8 | 2 | 0.250 |",
        "| 50% zeros, int4 values | 131,072 | 4 | 1 | 0.125 |",
    ]
    assert list(accuracy.real_model_points()) == ["50% int4"]
    monkeypatch.setattr(accuracy, "results", lambda name: {"rows": {"dense": {"loss": 3.0}}})
    assert "has not been measured yet" in accuracy.real_model_more_text()


def test_every_table_stands_somewhere():
    text = "".join(path.read_text(encoding="utf8") for path in DOCUMENTS)
    assert {name for name in TABLES if f"<!-- table: {name} -->" not in text} == set()


# code, addresses, versions and numbers of articles
NOT_MEASURED = re.compile(
    r"```.*?```|^    .*?$|`[^`]*`|\]\([^)]*\)|[+-]0\.0\b|"
    r"(vLLM|Python|arXiv|llm-compressor|capability)\s+[\d.]+(( to|,| and| or) [\d.]+)*",
    re.DOTALL | re.MULTILINE,
)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_no_number_is_copied_by_hand(path):
    """A measured one has decimals, or is a factor."""
    text = NOT_MEASURED.sub("", outside(path.read_text(encoding="utf8")))
    found = re.findall(r"(?<![\w.-])(?:\d+\.\d+|\d[\d.]*x)(?![\w.])", text)
    assert found == [], "write it through a marker, see docs/contributing.md"


def test_links_lead_somewhere():
    for path in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text(encoding="utf8")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_every_recipe_is_explained(recipes):
    text = (DOCUMENTS[0].parent / "docs" / "cli.md").read_text(encoding="utf8")
    assert {r.stem for r in recipes.glob("*.yaml") if f"| `{r.stem}` |" not in text} == set()


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


def test_every_key_of_a_recipe_is_listed():
    from llmcompressor.modifiers import Modifier

    from wexpand_plugin.compress.modifier import SparseExpansionModifier

    listed = set(re.findall(r"^- `(\w+)`", TABLES["recipe_keys"](), re.MULTILINE))
    assert listed == SparseExpansionModifier.model_fields.keys() - Modifier.model_fields.keys()
