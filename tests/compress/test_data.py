"""Calibration data: what is read, how it is cut, and what is refused before any work."""

import json

import pytest
from datasets import Dataset
from tiny import tokenizer

from wexpand_plugin.compress.data import calibration_rows, check_rows, load_text
from wexpand_plugin.errors import WexpandError

CHAT = [{"role": "user", "content": "t5 t6"}, {"role": "assistant", "content": "t7"}]
TEMPLATE = "{% for m in messages %}t{{ 10 + loop.index }} {{ m['content'] }} {% endfor %}"


def rows(texts, column="text", length=3, template=None):
    reader = tokenizer()
    reader.chat_template = template
    data = Dataset.from_dict({column: texts})
    found = calibration_rows(data, reader, samples=2, length=length, column=column, seed=0)
    return found["input_ids"][:]


def test_texts_are_joined_and_cut():
    assert rows(["t1 t2 t3 t4 t5 t6 t7"]) == [[1, 2, 3], [4, 5, 6]]
    assert rows(["", "t8 t8 t8", ""]) == [[8, 8, 8]], "an empty text is no text"
    with pytest.raises(WexpandError, match="2 tokens do not fill one row of 3"):
        rows(["t1 t2"])


def test_chats_are_rendered_by_the_template_of_the_tokenizer():
    assert rows([CHAT], "messages", 5, TEMPLATE) == [[11, 5, 6, 12, 7]]
    with pytest.raises(WexpandError, match="'messages' holds chats, .* has no chat template"):
        rows([CHAT], "messages")
    with pytest.raises(WexpandError, match=r"chat template refuses .*t5 t6.* \(no users here\)"):
        rows([CHAT], "messages", template="{{ raise_exception('no users here') }}")


def test_what_is_neither_text_nor_chat_is_named():
    with pytest.raises(WexpandError, match="column 'text' holds 'None' where a text"):
        rows([None, None])
    with pytest.raises(WexpandError, match=r"column 'text' holds '\[1, 2\]' where a text"):
        rows([[1, 2]])


def test_only_tokens_that_no_mask_leaves_out_are_counted():
    padded = {"input_ids": [[1, 2, 3, 0, 0], [0, 0, 4, 5, 6]]}
    assert check_rows(Dataset.from_dict(padded), 7, 5) == 10
    padded["attention_mask"] = [[1, 1, 1, 0, 0], [0, 0, 1, 1, 1]]
    assert check_rows(Dataset.from_dict(padded), 7, 5) == 6
    assert check_rows(Dataset.from_dict(padded), 7, 3) == 4, "the rest of a row is cut off"
    padded["loss_mask"] = [[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert check_rows(Dataset.from_dict(padded), None, 5) == 4


@pytest.mark.parametrize(
    "data, problem",
    [
        ({"input_ids": [[1], []]}, "input_ids of row 1 are empty"),
        ({"input_ids": [[1], [2, 7]]}, "row 1 holds token id 7, outside the 7 of the model's"),
        ({"input_ids": [[-1, 2]]}, "row 0 holds token id -1"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1]]}, r"attention_mask \[1\] should"),
        ({"input_ids": ["1 2"]}, "column 'input_ids' holds string where lists of whole numbers"),
        ({"input_ids": [[1.5]]}, "column 'input_ids' holds (float|double)"),
        ({"input_ids": [[[1]]]}, "column 'input_ids' holds List"),
        ({"input_ids": [[1]], "loss_mask": [[0.5]]}, "column 'loss_mask' holds (float|double)"),
    ],
)
def test_rows_that_would_fail_later(data, problem):
    with pytest.raises(WexpandError, match=problem):
        check_rows(Dataset.from_dict(data), 7, 5)


def test_files(tmp_path):
    for name, text, problem in [
        ("broken.jsonl", '{"text": "a"}\n{"text"', "cannot be read as json"),
        ("empty.jsonl", "", "empty.jsonl: is empty"),
        ("empty.txt", "", "empty.txt: is empty"),
        ("other.csv", "a,b\n1,2\n", "has no column 'text', only a, b"),
        ("notes.md", "# a", "ends in '.md'"),
    ]:
        (tmp_path / name).write_text(text)
        with pytest.raises(WexpandError, match=problem) as refused:
            load_text(str(tmp_path / name))
        assert "\n" not in str(refused.value)
    for missing in (str(tmp_path / "nowhere"), "./nowhere", "nowhere.txt"):
        with pytest.raises(WexpandError, match="nowhere.*: there is no such file"):
            load_text(missing)
    (tmp_path / "good.jsonl").write_text(json.dumps({"messages": CHAT}))
    assert load_text(str(tmp_path / "good.jsonl"), column="messages")["messages"][0] == CHAT
    (tmp_path / "good.txt").write_text("one\n\ntext")
    assert load_text(str(tmp_path / "good.txt"))["text"][:] == ["one\n\ntext"]
