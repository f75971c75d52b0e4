"""`compress`: what is refused before work starts, and one run from files to a directory."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_modifier import logits, tiny
from tiny import tokenizer

from wexpand_plugin.compress import precision
from wexpand_plugin.compress.oneshot import compress
from wexpand_plugin.errors import WexpandError
from wexpand_plugin.format.model_dir import ModelDir
from wexpand_plugin.tools.inspect import inspect

GOOD = (
    "a_stage:\n  b_modifiers:\n    SparseExpansionModifier:\n"
    "      sparsity: 0.6\n      num_experts: 2\n      targets: ['re:.*mlp.*']\n"
)


@pytest.fixture
def inputs(tmp_path):
    model = tiny("Llama", tmp_path / "dense")
    tokenizer().save_pretrained(model)
    text = tmp_path / "text.jsonl"
    words = [" ".join(f"t{(i * 7 + j * j) % 90 + 2}" for j in range(60)) for i in range(60)]
    text.write_text("".join(json.dumps({"text": w}) + "\n" for w in words))
    (tmp_path / "recipe.yaml").write_text(GOOD)
    return dict(model=str(model), recipe=tmp_path / "recipe.yaml", dataset=str(text),
                output=tmp_path / "out", samples=16, max_seq_length=32)  # fmt: skip


def test_from_files_to_a_directory(inputs, tmp_path):
    assert compress(**inputs) == tmp_path / "out"
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "recipe.yaml"} <= names
    assert not list(tmp_path.glob(".out*"))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert logits(model).isfinite().all()
    called = inspect(tmp_path / "out").made_by["compress"]
    assert {key: called[key] for key in ("dataset", "samples", "max_seq_length")} == {
        key: inputs[key] for key in ("dataset", "samples", "max_seq_length")
    }
    # and the result is refused as an input, by its name
    with pytest.raises(WexpandError, match="already compressed .*wexpand"):
        compress(**inputs | {"model": str(tmp_path / "out"), "output": tmp_path / "again"})


def test_all_files_of_the_model_but_code_come_along(inputs, tmp_path):
    """As with `wexpand pack`: processors, licence, and the tokenizer byte for byte; its card beside
    ours."""
    model, out = Path(inputs["model"]), tmp_path / "out"
    names = ("LICENSE", "preprocessor_config.json", "chat_template.jinja", "tokenizer.json",
             "processor_config.json", "tokenizer_config.json")  # fmt: skip
    for name in ("README.md", *names[:3]):
        (model / name).write_text(name)
    (model / "processor_config.json").write_text("{}")
    (model / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.25}')
    (model / "own.py").write_text("")
    compress(**inputs)
    for name in names:
        assert (out / name).read_bytes() == (model / name).read_bytes(), name
    assert not (out / "own.py").exists()
    assert json.loads((out / "generation_config.json").read_text())["temperature"] == 0.25
    assert "SparseExpansionModifier" in (out / "recipe.yaml").read_text()
    assert (out / "README.base_model.md").read_text() == "README.md"
    card = (out / "README.md").read_text()
    assert "# dense, compressed" in card and "sparsity: 0.6" in card and "num_experts: 2" in card


def test_mistakes_are_found_before_work(inputs, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    (tmp_path / "short.txt").write_text("t1 t2")
    (tmp_path / "strange.jsonl").write_text('{"input_ids": [5, 96]}\n{"input_ids": [96]}\n')
    (tmp_path / "empty").mkdir()
    strange = tmp_path / "strange.yaml"
    strange.write_text(GOOD, encoding="utf16")
    untold = tiny("Llama", tmp_path / "untold")
    damaged = shutil.copytree(inputs["model"], tmp_path / "damaged")
    with open(damaged / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    other = tmp_path / "other"
    transformers.T5Config().save_pretrained(other)
    for change, message in [
        ({"output": tmp_path / "full"}, "is not empty; name a directory that does not exist"),
        ({"recipe": tmp_path / "no.yaml"}, "recipe: .*no.yaml' is neither a file nor one of"),
        ({"dataset": str(tmp_path / "short.txt")}, "do not fill one row of 32"),
        ({"dataset": str(tmp_path / "recipe.yaml")}, "ends in '.yaml'"),
        ({"text_column": "words"}, "has no column 'words', only text"),
        ({"model": str(tmp_path / "nowhere")}, "nowhere: is neither a directory nor the id of a"),
        ({"model": str(untold)}, "model: .*untold' has no tokenizer"),
        ({"model": str(damaged)}, "model.safetensors: not a complete safetensors file"),
        ({"model": str(other)}, "other' is of type t5, of which transformers has no causal"),
        ({"model": str(tmp_path / "full")}, "full: holds no config.json"),
        ({"dataset": str(tmp_path / "empty")}, "a directory that holds no saved data set"),
        ({"dataset": str(tmp_path / "strange.jsonl")}, "holds token id 96, outside the 96 of"),
        ({"recipe": strange}, "strange.yaml: not text in UTF-8"),
        ({"seed": -1}, "seed: -1 should be 0 or above"),
        ({"dtype": "bf16"}, "dtype: 'bf16' is not one of auto, float32, bfloat16, float16"),
    ]:
        with pytest.raises(WexpandError, match=message):
            compress(**inputs | change)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*partial*"))


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        ("layers.1.mlp.up_proj", lambda w: None, r"{} is missing from its files; LlamaFor"),
        ("layers.0.mlp.up_proj", lambda w: w[:8].clone(), r"{}: shape \[8, 32\] should be \["),
        ("norm", lambda w: w * torch.nan, "{} holds NaN or infinite values; repair"),
    ],
    ids=["missing", "misshapen", "nan"],
)
def test_a_model_whose_files_are_not_whole(inputs, tmp_path, name, change, problem):
    """transformers would go on with random values, and what is no target is saved hours later."""
    file, name = Path(inputs["model"]) / "model.safetensors", f"model.{name}.weight"
    tensors = load_file(file)
    tensors[name] = change(tensors[name])
    save_file({n: t for n, t in tensors.items() if t is not None}, file, {"format": "pt"})
    with pytest.raises(WexpandError, match=problem.format(re.escape(name))):
        compress(**inputs)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*out*"))


def test_a_dtype_that_nothing_is_stored_in(inputs):
    tiny("Llama", Path(inputs["model"]), torch.float64)
    with pytest.raises(WexpandError, match="embed_tokens.weight is in torch.float64; convert"):
        compress(**inputs)


def test_fewer_tokens_than_asked_for_are_said(inputs, said):
    compress(**inputs | {"samples": 1000})
    assert any("3584 tokens in 112 rows calibrate, fewer than 1000 rows of 32" in s for s in said)


@pytest.mark.parametrize("asked", ["auto", "float32"])
def test_a_model_is_saved_in_its_own_dtype(inputs, tmp_path, monkeypatch, said, asked):
    """Whatever is computed in: float32 on a CPU without instructions for bfloat16."""
    tiny("Llama", Path(inputs["model"]), torch.bfloat16)
    monkeypatch.setattr(precision, "_cpu_multiplies", lambda dtype: dtype != torch.bfloat16)
    inputs["recipe"].write_text(GOOD + "      size_budget: 0.7\n      shrinkage: 0.1\n")
    compress(**inputs | {"dtype": asked})
    why = ", as this CPU has no torch.bfloat16 instructions" * (asked == "auto")
    assert any(f"Computing in torch.float32{why}; saving in torch.bfloat16" in s for s in said)
    model = ModelDir(tmp_path / "out")
    floats = {name: h.dtype for name, h in model.headers.items() if h.dtype.is_floating_point}
    assert {d for n, d in floats.items() if "router" not in n} == {torch.bfloat16}
    assert model.config_json["dtype"] == "bfloat16"
    sizes = inspect(model.path)
    assert 0.6 < sizes.linear_bytes / sizes.dense_bytes <= 0.7, "of what is saved"


def test_tied_weights_stay_tied_in_another_dtype(inputs, tmp_path):
    """The head and the embeddings, which are one parameter with two names."""
    dense = tiny("Mistral", Path(inputs["model"]), torch.bfloat16)
    compress(**inputs | {"recipe": None, "size": 0.4, "dtype": "float32"})
    model = ModelDir(tmp_path / "out")
    assert "lm_head.weight" not in model.headers
    head = "model.embed_tokens.weight"
    assert model.headers[head].dtype == torch.bfloat16
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    own = transformers.AutoModelForCausalLM.from_pretrained(dense)
    assert torch.equal(loaded.get_parameter(head), own.get_parameter(head))


def test_tokenised_rows_are_cut_and_batched(inputs, tmp_path):
    """Of unequal lengths, with masks, and beside columns that are no tokens."""
    lengths = [40, 8, 24, 33, 32, 16, 40, 40]
    rows = [
        {"input_ids": [(i * n + i) % 90 + 2 for i in range(n)], "text": "words", "labels": [1],
         "loss_mask": [0] * 4 + [1] * (n - 4)}
        for n in lengths
    ]  # fmt: skip
    data = tmp_path / "tokens.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    compress(**inputs | {"dataset": str(data), "batch_size": 3})
    about = inspect(tmp_path / "out").made_by["data"]
    assert about["batches"] == 3 and about["tokens_counted"] == sum(min(n, 32) - 4 for n in lengths)


def test_no_code_of_the_model_runs(inputs, tmp_path):
    """Neither its config's class nor its tokenizer's, although files and names are there."""
    model = Path(inputs["model"])
    (model / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Own: ...\n")
    for name, keys in (
        ("config.json", {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["own.Own", None]}),
    ):
        values = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps(values | {"auto_map": keys}))
    compress(**inputs)
    assert (tmp_path / "out" / "config.json").exists() and not (tmp_path / "ran").exists()


def test_an_interrupted_run_leaves_nothing(inputs, tmp_path, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("wexpand_plugin.hf.saving.seal", stop)
    with pytest.raises(KeyboardInterrupt):
        compress(**inputs)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*partial*"))
