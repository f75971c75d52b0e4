"""examples/compress_qwen3.py on a tiny model; `serve/test_example.py` runs the other one."""

import json

import pytest
import run_example
import tiny

from wexpand_plugin.format.model_dir import ModelDir


@pytest.mark.slow
def test_compress_qwen3(root, tmp_path):
    tiny.dense().save_pretrained(tmp_path / "Tiny")
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(tmp_path / "Tiny")
    (tmp_path / "chats").mkdir()
    content = " ".join(f"t{i * i % 90 + 2}" for i in range(64))
    chat = json.dumps({"messages": [{"role": "user", "content": content}]})
    (tmp_path / "chats" / "train.jsonl").write_text(f"{chat}\n" * 64)
    printed = run_example.run(
        root / "examples" / "compress_qwen3.py", tmp_path, MODEL_ID="./Tiny", DATASET_ID="./chats",
        DATASET_SPLIT="train", NUM_CALIBRATION_SAMPLES=32, MAX_SEQUENCE_LENGTH=64,
    )  # fmt: skip
    assert "wrote Tiny-Quarter" in printed
    assert ModelDir(tmp_path / "Tiny-Quarter").ours
