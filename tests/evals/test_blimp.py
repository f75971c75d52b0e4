"""Clamping, its controls, the choice of pairs and their scores, on models small enough to check."""

import json

import pytest
import torch
from torch import nn

from evals.paper import blimp
from evals.paper.blimp import DENSE, RANDOM, TOP, clamped, log_probabilities, lost, nearest, pairs
from evals.paper.frame import Skipped, run
from evals.paper.study import Study
from evals.perplexity import load_model
from evals.pocket import MODEL


def test_only_the_negative_side_of_the_named_neurons_is_clamped():
    torch.manual_seed(0)
    gate, other, x = nn.Linear(8, 6), nn.Linear(8, 6), torch.randn(3, 20, 8)
    dense, beside = gate(x), other(x)
    with clamped({gate: torch.tensor([1, 4])}):
        y, untouched = gate(x), other(x)
    assert torch.equal(y[..., [0, 2, 3, 5]], dense[..., [0, 2, 3, 5]])
    assert torch.equal(y[..., [1, 4]], dense[..., [1, 4]].clamp(min=0))
    assert (dense[..., [1, 4]] < 0).any() and (dense[..., [1, 4]] > 0).any()
    assert torch.equal(untouched, beside)
    assert torch.equal(gate(x), dense)


def test_the_nearest_others_are_taken_once_each():
    values = torch.tensor([1.0, 1.1, 5.0, 4.0, 0.9, 5.2, 1.02])
    found = nearest(values, torch.tensor([0, 2, 5]))
    # 5.2 chooses before 5.0, which is left 1.1; and 1.0 has 1.02
    assert found.tolist() == [6, 1, 3]


def write_sets(folder, count=30):
    folder.mkdir()
    for name, field in (("a", "syntax"), ("b", "syntax/semantics")):
        items = [
            {"sentence_good": f"{name} {i} good", "sentence_bad": f"{name} {i} bad", "field": field}
            for i in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, items)), encoding="utf8")


def test_pairs_are_drawn_by_the_seed(tmp_path):
    write_sets(tmp_path / "blimp")
    first = pairs(tmp_path / "blimp", 5, 0)
    assert first == pairs(tmp_path / "blimp", 5, 0) != pairs(tmp_path / "blimp", 5, 1)
    assert [pair.field for pair in first] == ["syntax"] * 5 + ["syntax_semantics"] * 5
    assert len(set(first)) == 10
    assert all(pair.good.removesuffix("good") == pair.bad.removesuffix("bad") for pair in first)


def test_a_sentence_scores_the_same_alone_and_in_a_batch():
    study = Study(str(MODEL))
    model, tokenizer = load_model(str(MODEL)), study.tokenizer
    sentences = ["import os", "def f(x):\n    return x + 1", "class A: pass", "x"]
    together = log_probabilities(model, tokenizer, sentences)
    for sentence, found in zip(sentences, together, strict=True):
        ids = [tokenizer.bos_token_id, *tokenizer.encode(sentence, add_special_tokens=False)]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(dim=-1)
        own = logits[range(len(ids) - 1), ids[1:]].sum()
        torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-4)


def test_accuracy_lost_is_in_paired_standard_errors():
    one = {"right": {DENSE: {"syntax": "1111", "semantics": "1100"},
                     TOP: {"syntax": "1010", "semantics": "1100"},
                     RANDOM: {"syntax": "1111", "semantics": "1100"}}}  # fmt: skip
    gaps = torch.tensor([0, 1, 0, 1, 0, 0, 0, 0]).double()
    assert lost(one, DENSE, TOP) == pytest.approx(float(gaps.mean() / (gaps.std() / 8**0.5)))
    assert lost(one, DENSE, RANDOM) == 0


def test_a_model_of_code_is_skipped_with_a_word(tmp_path, capsys):
    with pytest.raises(Skipped, match="model of code"):
        blimp.measure(Study(str(MODEL), tmp_path), 0)
    # the frame needs the number of its blocks, nothing more
    run("blimp", Study(str(MODEL), tmp_path), 0, tmp_path)
    assert not list(tmp_path.iterdir())
    assert "pocket, blimp: skipped, a model of code" in capsys.readouterr().out


def test_missing_data_is_named(tmp_path):
    with pytest.raises(Skipped, match="should have blimp/"):
        blimp.measure(Study("another model", tmp_path), 0)
