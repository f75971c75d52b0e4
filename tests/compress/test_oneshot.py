"""`compress`: what is refused before work starts, and one run from files to a directory."""

import json

import pytest
import transformers
from test_modifier import logits, tiny
from tiny import tokenizer

pytest.importorskip("llmcompressor")
import wexpand_plugin  # noqa: E402, F401
from wexpand_plugin.compress.oneshot import check_recipe, compress  # noqa: E402
from wexpand_plugin.errors import WexpandError  # noqa: E402

HEAD = "a_stage:\n  b_modifiers:\n    SparseExpansionModifier:\n"
GOOD = HEAD + "      sparsity: 0.6\n      num_experts: 2\n      targets: ['re:.*mlp.*']\n"


@pytest.mark.parametrize(
    "text,message",
    [
        (
            HEAD + "      sparsty: 0.5\n",
            r"SparseExpansionModifier\.sparsty: unknown key; .*sparsity",
        ),
        (HEAD + "      sparsity: half\n", r"\.sparsity: 'half': Input should be a valid number"),
        (HEAD + "      sparsity: 2\n", "sparsity: 2.0 should be between 0 and 1"),
        (HEAD + "      num_experts: 4\n", r"\.sparsity: Field required"),
        (HEAD, "has no values; give at least one key"),
        ("", "is empty"),
        ("a_stage:\n  b_modifiers: {}\n", "holds no modifier"),
        ("SparseExpansionModifier:\n  sparsity: 0.5\n", "should end in _stage"),
        ("a_stage:\n  mods:\n    X: {a: 1}\n", "should end in _modifiers"),
        (GOOD.replace("ExpansionMod", "ExpansoinMod"), "Did you mean SparseExpansionModifier"),
        ("a_stage: [\n", "not YAML"),
    ],
)
def test_recipes_that_cannot_work(text, message, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    with pytest.raises(WexpandError, match=message) as refused:
        check_recipe(recipe)
    assert str(recipe) in str(refused.value) and "\n" not in str(refused.value)


def test_every_recipe_of_the_repository_is_accepted(recipes):
    for recipe in sorted(recipes.glob("*.yaml")):
        check_recipe(recipe)


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
    # and the result is refused as an input, by its name
    with pytest.raises(WexpandError, match="already compressed .*wexpand"):
        compress(**inputs | {"model": str(tmp_path / "out"), "output": tmp_path / "again"})


def test_mistakes_are_found_before_work(inputs, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    (tmp_path / "short.txt").write_text("t1 t2")
    for change, message in [
        ({"output": tmp_path / "full"}, "output: .* is not empty"),
        ({"recipe": tmp_path / "no.yaml"}, "there is no such recipe file"),
        ({"dataset": str(tmp_path / "short.txt")}, "do not fill one row of 32"),
        ({"dataset": str(tmp_path / "recipe.yaml")}, "ends in '.yaml'"),
        ({"text_column": "words"}, "has no column 'words', only text"),
        ({"model": str(tmp_path / "nowhere")}, "model: "),
    ]:
        with pytest.raises(WexpandError, match=message):
            compress(**inputs | change)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*partial*"))


def test_an_interrupted_run_leaves_nothing(inputs, tmp_path, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("wexpand_plugin.checkpoint.finalize", stop)
    with pytest.raises(KeyboardInterrupt):
        compress(**inputs)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*partial*"))
