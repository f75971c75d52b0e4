"""examples/pack_and_serve.py on a tiny model."""

import pytest
import run_example
import tiny
import torch

from wexpand_plugin.format.model_dir import ModelDir


@pytest.mark.slow
def test_pack_and_serve(root, tmp_path):
    # heads of 64, which vLLM has attention for in bfloat16
    model = tiny.dense(dtype=torch.bfloat16, hidden_size=128, num_attention_heads=2)
    tiny.prune(model)
    model.save_pretrained(tmp_path / "Tiny")
    tiny.tokenizer().save_pretrained(tmp_path / "Tiny")
    printed = run_example.run(
        root / "examples" / "pack_and_serve.py", tmp_path, MODEL_ID="./Tiny",
        PROMPTS=["t5 t6 t7"], MAX_MODEL_LEN=64, MAX_TOKENS=4,
    )  # fmt: skip
    assert "'t5 t6 t7' -> '" in printed and ModelDir(tmp_path / "Tiny-Packed").ours
