"""The text of the pocket model: the split, the excerpts, and the token rows."""

import hashlib

import pytest
import torch
from transformers import AutoTokenizer

from evals.pocket import corpus


@pytest.fixture(scope="module")
def tokenizer(pocket):
    return AutoTokenizer.from_pretrained(pocket)


@pytest.fixture(scope="module")
def held_out():
    return corpus.files("validation")


def test_the_split_depends_on_paths_only(held_out):
    train, validation = ({name for name, _ in files} for files in (corpus.files("train"), held_out))
    assert not train & validation
    assert 0.02 < len(validation) / len(train | validation) < 0.1
    for name in train | validation:
        assert not name.startswith("site-packages/")
        chosen = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 20 == 0
        assert chosen == (name in validation)


def test_dataset_has_the_files(held_out):
    data = corpus.dataset("validation")
    assert list(zip(data["path"], data["text"], strict=True)) == held_out


def test_an_unknown_split_is_named():
    with pytest.raises(ValueError, match="'test' is not one of train, validation"):
        corpus.files("test")


def test_excerpts_start_at_a_line_of_a_held_out_file(held_out):
    passages = corpus.excerpts("validation", count=20, characters=300, seed=3)
    assert passages == corpus.excerpts("validation", count=20, characters=300, seed=3)
    assert passages != corpus.excerpts("validation", count=20, characters=300, seed=4)
    for passage in passages:
        assert len(passage) == 300
        assert any(f"\n{passage}" in f"\n{text}" for _, text in held_out)


def test_token_rows_are_one_stream(tokenizer, short_texts):
    rows = corpus.token_rows(short_texts, tokenizer, length=17)
    stream = []
    for text in short_texts:
        stream += [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert rows.shape == (len(stream) // 17, 17)
    assert torch.equal(rows.flatten(), torch.tensor(stream[: rows.numel()]))
    decoded = tokenizer.decode(rows.flatten(), skip_special_tokens=True)
    assert "".join(short_texts).startswith(decoded)


def test_token_rows_of_too_little_text(tokenizer):
    assert corpus.token_rows(["x = 1\n"], tokenizer, length=64).shape == (0, 64)
    with pytest.raises(ValueError, match="length: 1 "):
        corpus.token_rows(["x = 1\n"], tokenizer, length=1)
