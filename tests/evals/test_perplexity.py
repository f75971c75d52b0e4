"""The held-out loss, against the definition and against transformers' own loss."""

import json
import math
import subprocess
import sys

import pytest
import torch
from transformers import AutoTokenizer

from evals.perplexity import held_out_loss, load_model, read_texts
from evals.pocket import corpus


@pytest.fixture(scope="module")
def model(pocket):
    return load_model(pocket)


def test_equals_the_loss_of_transformers(model, pocket, short_texts):
    found = held_out_loss(model, pocket, short_texts, context=32, batch_size=3, progress=False)
    tokenizer = AutoTokenizer.from_pretrained(pocket)
    rows = corpus.token_rows(short_texts, tokenizer, 32).to(model.device)
    with torch.no_grad():
        losses = [model(input_ids=row[None], labels=row[None]).loss.item() for row in rows]
    assert found.loss == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert found.tokens == len(rows) * 31
    bytes_per_token = sum(len(text.encode()) for text in short_texts) / rows.numel()
    assert found.bits_per_byte == pytest.approx(found.loss / math.log(2) / bytes_per_token)


def test_a_model_that_knows_nothing(pocket, short_texts):
    uniform = load_model(pocket)
    with torch.no_grad():
        for parameter in uniform.parameters():
            parameter.zero_()
    found = held_out_loss(uniform, pocket, short_texts, context=32, progress=False)
    assert found.loss == pytest.approx(math.log(uniform.config.vocab_size), abs=1e-5)


@pytest.mark.slow
def test_the_pocket_model_has_learnt_and_windows_are_spread(model, pocket):
    found = held_out_loss(model, pocket, tokens=8192, context=256, progress=False)
    assert found.tokens == 32 * 255
    assert 1.5 < found.loss < 3.5


def test_too_little_text(model, pocket):
    with pytest.raises(ValueError, match="shorter than one window of 256"):
        held_out_loss(model, pocket, ["x = 1\n"])


def test_texts_from_files(tmp_path):
    (tmp_path / "a.txt").write_text("first\n\nsecond\n")
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n\n{"text": "two", "id": 2}\n')
    assert read_texts(str(tmp_path / "a.txt")) == ["first\n\nsecond\n"]
    assert read_texts(str(tmp_path / "b.jsonl")) == ["one", "two"]
    with pytest.raises(FileNotFoundError, match="no file .*c.jsonl"):
        read_texts(str(tmp_path / "c.jsonl"))


@pytest.mark.slow
def test_the_command(pocket, root, tmp_path, short_texts, model):
    text, result = tmp_path / "text.jsonl", tmp_path / "out" / "result.json"
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in short_texts))
    command = [sys.executable, "-m", "evals.perplexity", str(pocket), "--dataset", str(text)]
    options = ["--context", "32", "--json", str(result)]
    done = subprocess.run([*command, *options], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = json.loads(result.read_text())
    found = held_out_loss(model, pocket, short_texts, context=32, progress=False)
    assert written["loss"] == pytest.approx(found.loss, abs=1e-6)
    assert f"loss {found.loss:.4f} nats per token" in done.stdout
