"""The scoring recipe on tiny random models: real oneshot runs from a saved directory."""

import json
import re
import zlib
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.factory import ModifierFactory
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy import stats
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from wexpand_plugin.compress.calibration import identity
from wexpand_plugin.compress.neuron_scores import fingerprint, load_scores
from wexpand_plugin.compress.scoring import NeuronScoringModifier
from wexpand_plugin.errors import WexpandError
from wexpand_plugin.method.neurons import neuron_scores, wasserstein_neurons
from wexpand_plugin.method.row_sample import RowSample

RECIPES = Path(__file__).parents[2] / "recipes"
VOCABULARY, ROWS, LENGTH = 96, 12, 32
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96}
SMALL |= {"num_hidden_layers": 2, "num_attention_heads": 4}
MLP = ["re:.*mlp.*"]


@pytest.fixture(autouse=True)
def registered():
    ModifierFactory.register("NeuronScoringModifier", NeuronScoringModifier)


def save_model(directory, kind):
    torch.manual_seed(0)
    if kind == "llama":
        config = LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=False)
        model = LlamaForCausalLM(config)
    else:
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, bos_token_id=0, eos_token_id=0))
    with torch.no_grad():
        for parameter in model.parameters():  # biases start as zero, and weights very small
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory)
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")), pad_token="w0"
    )
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def neox(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("neox"), "neox")


def calibration(rows=ROWS, length=LENGTH):
    ids = torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))
    return Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": (ids >= 0).tolist()})


def compress(model, output, recipe, dataset=None, **kwargs):
    dataset = calibration() if dataset is None else dataset
    kwargs = {"num_calibration_samples": len(dataset), "max_seq_length": LENGTH} | kwargs
    return oneshot(
        model=str(model),
        dataset=dataset,
        recipe=recipe,
        output_dir=str(output),
        shuffle_calibration_samples=False,
        **kwargs,
    )


@pytest.fixture(scope="module")
def saved(llama, tmp_path_factory):
    """A model directory with the scores of its MLP linears."""
    output = tmp_path_factory.mktemp("scored")
    compress(llama, output, [NeuronScoringModifier(targets=MLP)])
    return output


def recorded_inputs(directory, dataset):
    """The inputs of every linear in a plain forward of the saved model: name -> [tokens, in], in
    the order of a sample of all rows."""
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()
    inputs = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(
                lambda _m, args, _out, name=name: inputs.setdefault(name, []).append(args[0][0])
            )
    ids = [torch.tensor([row["input_ids"]]) for row in dataset]
    with torch.no_grad():
        for row in ids:
            model(row)
    samples = {}
    for name in inputs:
        # linears that read the same tensor share the sample of the first
        first = re.sub("[kv]_proj", "q_proj", name.replace("up_proj", "gate_proj"))
        samples[name] = RowSample(ROWS * LENGTH, 3 + zlib.crc32(first.encode()))
    for name, sample in samples.items():
        for row, x in zip(ids, inputs[name], strict=True):
            sample.add(x, identity(row))
    return model, {name: sample.rows for name, sample in samples.items()}


@pytest.mark.parametrize("kind", ["llama", "neox"])
def test_scores_equal_a_direct_computation(kind, request, tmp_path):
    source = request.getfixturevalue(kind)
    compress(source, tmp_path / "out", [NeuronScoringModifier(percent=5, pairs=100, seed=3)])

    before = load_file(source / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)

    model, inputs = recorded_inputs(source, calibration())
    scores = load_scores(tmp_path / "out", model)
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    names = [n for n in names if n not in ("lm_head", "embed_out")]
    assert list(scores.linears) == names and not scores.skipped
    assert len(names) == (14 if kind == "llama" else 8)
    for name in names:
        linear = model.get_submodule(name)
        expected = neuron_scores(inputs[name], linear.weight, linear.bias, pairs=100, seed=3)
        assert scores.linears[name].tokens == ROWS * LENGTH
        for field, value in scores.of(name)._asdict().items():
            if value is not None:
                torch.testing.assert_close(
                    value.double(), getattr(expected, field), rtol=2e-3, atol=2e-4, msg=field
                )


def test_the_summary_is_complete(llama, tmp_path):
    compress(llama, tmp_path / "out", [NeuronScoringModifier(targets=MLP, percent=5)])
    folder = tmp_path / "out" / "neuron_scores"
    assert sorted(p.name for p in folder.iterdir()) == [
        "neuron_scores.json",
        "neuron_scores.safetensors",
    ]
    summary = json.loads((folder / "neuron_scores.json").read_text())
    assert summary["model"] == str(llama) and summary["architecture"] == "LlamaForCausalLM"
    expected = {"percent": 5, "sample_tokens": 16384, "pairs": 50_000, "seed": 0}
    assert summary["settings"] == expected
    scores = load_scores(folder)
    assert summary["linears"].keys() == scores.linears.keys() and len(scores.linears) == 6
    for name, about in summary["linears"].items():
        own = scores.of(name)
        assert about["shape"] == ([64, 96] if "down" in name else [96, 64])
        chosen = wasserstein_neurons(own.wd, 5)
        assert about["wasserstein_neurons"] == chosen.tolist() and len(chosen) in (3, 5)
        assert [top["neuron"] for top in about["top"]] == chosen.tolist()[:10]
        assert about["top"][0]["wd"] == pytest.approx(own.wd.max().item(), rel=1e-4)
        assert about["quantiles"]["md_ratio"]["0.5"] == pytest.approx(
            own.md_ratio.double().quantile(0.5).item(), rel=1e-4
        )
        for other in ("md", "md_ratio", "kurtosis", "abs_skew"):
            correlation = about["correlation_with_wd"][other]
            values = own.skew.abs() if other == "abs_skew" else getattr(own, other)
            assert correlation["pearson"] == pytest.approx(
                stats.pearsonr(own.wd, values).statistic, abs=1e-4
            )
            assert correlation["spearman"] == pytest.approx(
                stats.spearmanr(own.wd, values).statistic, abs=1e-4
            )
            assert 0 <= about["chosen_by_other_scores_too"][other] <= 1
        assert about["share_of_neurons"]["constant"] == 0


def test_sharing_does_not_change_a_sample_and_saves_memory(llama, tmp_path):
    """gate and up read one tensor: one sample, and the same scores as each alone."""
    samples = []

    class Watched(NeuronScoringModifier):
        def score_linears(self):
            first = {self._names[m]: self._names[f] for m, f in self._first.items()}
            samples.append((first, {self._names[m]: s for m, s in self._samples.items()}))
            super().score_linears()
            assert not self._samples and not self._readers.last

    compress(llama, tmp_path / "all", [Watched(sample_tokens=100)])
    blocks = [block for block in samples if block[0]]
    assert len(blocks) == 2 and all(len(first) == 7 for first, _ in blocks)
    for first, kept in blocks:
        first = {n.rsplit(".", 1)[-1]: f.rsplit(".", 1)[-1] for n, f in first.items()}
        assert [first[n] for n in ("q_proj", "k_proj", "v_proj")] == ["q_proj"] * 3
        assert first["gate_proj"] == first["up_proj"]
        assert len(kept) == len(set(first.values())) == 4
        assert all(len(sample.rows) == 100 for sample in kept.values())
    alone = NeuronScoringModifier(sample_tokens=100, targets=["re:.*q_proj"])
    compress(llama, tmp_path / "one", [alone])
    together = load_scores(tmp_path / "all")
    for name, linear in load_scores(tmp_path / "one").linears.items():
        assert torch.equal(linear.scores.wd, together.of(name).wd)
        assert linear.tokens == 100


def test_a_sample_is_close_to_all_tokens(llama, tmp_path):
    compress(llama, tmp_path / "all", [NeuronScoringModifier(targets=MLP)])
    compress(llama, tmp_path / "some", [NeuronScoringModifier(targets=MLP, sample_tokens=300)])
    everything, some = load_scores(tmp_path / "all"), load_scores(tmp_path / "some")
    for name in everything.linears:
        assert not torch.equal(everything.of(name).std, some.of(name).std)
        torch.testing.assert_close(everything.of(name).std, some.of(name).std, rtol=0.15, atol=0)


def test_ignore_and_output_dir(llama, tmp_path):
    modifier = NeuronScoringModifier(
        targets="Linear",
        ignore=["lm_head", "re:.*self_attn.*", "model.layers.0.mlp.up_proj"],
        output_dir=str(tmp_path / "scores"),
    )
    compress(llama, tmp_path / "out", [modifier])
    names = set(load_scores(tmp_path / "scores").linears)
    assert names == {
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.gate_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.1.mlp.down_proj",
    }
    assert (tmp_path / "scores" / "neuron_scores.json").is_file()
    assert set(load_scores(tmp_path / "out").linears) == names


def test_a_target_may_be_a_class_that_holds_linears(llama, tmp_path):
    compress(llama, tmp_path / "out", [NeuronScoringModifier(targets="LlamaMLP")])
    assert len(load_scores(tmp_path / "out").linears) == 6


@pytest.mark.parametrize("pipeline", ["basic", "sequential", "independent"])
def test_every_pipeline_and_batches(llama, tmp_path, pipeline):
    compress(
        llama,
        tmp_path / "out",
        [NeuronScoringModifier(targets=MLP)],
        pipeline=pipeline,
        batch_size=4,
    )
    scores = load_scores(tmp_path / "out")
    assert [linear.tokens for linear in scores.linears.values()] == [ROWS * LENGTH] * 6


def test_before_a_pruning_modifier(llama, tmp_path):
    """The scores are those of the dense weights, and the pruned model is refused as theirs."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {
                "scoring_stage": {
                    "scoring_modifiers": {"NeuronScoringModifier": {"targets": MLP, "seed": 0}}
                },
                "sparsity_stage": {
                    "sparsity_modifiers": {
                        "WandaPruningModifier": {"sparsity": 0.5, "ignore": ["re:.*lm_head"]}
                    }
                },
            }
        )
    )
    pruned = compress(llama, tmp_path / "out", str(recipe))
    assert (pruned.model.layers[0].mlp.up_proj.weight == 0).float().mean() > 0.4
    compress(llama, tmp_path / "alone", [NeuronScoringModifier(targets=MLP)])
    scores, alone = load_scores(tmp_path / "out"), load_scores(tmp_path / "alone")
    for name in alone.linears:
        assert torch.equal(scores.of(name).wd, alone.of(name).wd)
    dense = AutoModelForCausalLM.from_pretrained(llama)
    assert load_scores(tmp_path / "out", dense).linears.keys() == alone.linears.keys()
    with pytest.raises(WexpandError, match="gate_proj has other weights than the ones scored"):
        load_scores(tmp_path / "out", AutoModelForCausalLM.from_pretrained(tmp_path / "out"))


def test_the_shipped_recipe_runs(llama, tmp_path):
    compress(llama, tmp_path / "out", str(RECIPES / "neuron_scores.yaml"))
    assert len(load_scores(tmp_path / "out").linears) == 14
    recipe = yaml.safe_load((RECIPES / "neuron_scores.yaml").read_text())
    keys = recipe["scoring_stage"]["scoring_modifiers"]["NeuronScoringModifier"]
    shown = set(NeuronScoringModifier.model_fields) - set(Modifier.model_fields)
    assert set(keys) | {"output_dir"} == shown
    for name, value in keys.items():
        default = getattr(NeuronScoringModifier(), name)
        assert value in (default, [default]), name


def test_targets_that_match_nothing_fail_before_any_work(llama, tmp_path):
    with pytest.raises(WexpandError, match=r"targets: \['re:.*dense_h_to_4h'\] .* match no"):
        compress(llama, tmp_path / "out", [NeuronScoringModifier(targets="re:.*dense_h_to_4h")])
    with pytest.raises(WexpandError, match="no torch.nn.Linear of LlamaForCausalLM; it has 15"):
        compress(llama, tmp_path / "out", [NeuronScoringModifier(ignore=["Linear"])])
    assert not (tmp_path / "out").exists()


def test_too_few_tokens(llama, tmp_path):
    with pytest.raises(WexpandError, match="none of 6 linears saw 32 calibration tokens"):
        compress(
            llama,
            tmp_path / "out",
            [NeuronScoringModifier(targets=MLP)],
            dataset=calibration(rows=1, length=20),
        )


def test_a_bad_weight_names_the_linear(llama, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = torch.nan
    model.save_pretrained(tmp_path / "broken")
    for file in llama.glob("tokenizer*"):
        (tmp_path / "broken" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(WexpandError, match="layers.1.mlp.up_proj.weight: holds NaN"):
        compress(tmp_path / "broken", tmp_path / "out", [NeuronScoringModifier(targets=MLP)])


@pytest.mark.parametrize(
    "arguments, key",
    [
        ({"sample_token": 64}, "sample_token"),
        ({"sample_tokens": 31}, "sample_tokens"),
        ({"pairs": 0}, "pairs"),
        ({"percent": 0}, "percent"),
        ({"percent": 101}, "percent"),
        ({"seed": -1}, "seed"),
        ({"max_bytes": 10}, "max_bytes"),
    ],
)
def test_recipe_values_are_checked(arguments, key):
    with pytest.raises(ValidationError, match=key):
        NeuronScoringModifier(**arguments)


class TestFiles:
    """What `load_scores` refuses."""

    def test_other_models(self, saved, neox):
        model = AutoModelForCausalLM.from_pretrained(neox)
        with pytest.raises(WexpandError, match="GPTNeoXForCausalLM: model.layers.0.mlp.gate_proj"):
            load_scores(saved, model)

    def test_other_shapes_and_weights(self, saved, llama):
        model = AutoModelForCausalLM.from_pretrained(llama)
        load_scores(saved, model)
        load_scores(saved / "neuron_scores" / "neuron_scores.safetensors", model)
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[5, 7] += 0.01
        with pytest.raises(WexpandError, match="layers.1.mlp.up_proj has other weights"):
            load_scores(saved, model)
        model.model.layers[1].mlp.up_proj = torch.nn.Linear(64, 95)
        with pytest.raises(WexpandError, match=r"shape \[95, 64\], scored was \[96, 64\]"):
            load_scores(saved, model)

    def test_linears_that_were_not_scored(self, saved):
        with pytest.raises(WexpandError, match="q_proj: has no neuron scores"):
            load_scores(saved).of("model.layers.0.self_attn.q_proj")

    def test_missing_and_foreign_files(self, llama, tmp_path):
        with pytest.raises(WexpandError, match="holds no neuron scores"):
            load_scores(tmp_path)
        with pytest.raises(WexpandError, match="not neuron scores"):
            load_scores(llama / "model.safetensors")
        (tmp_path / "neuron_scores.safetensors").write_bytes(b"nonsense")
        with pytest.raises(WexpandError, match="cannot be read as safetensors"):
            load_scores(tmp_path)

    @pytest.mark.parametrize(
        "damage, message",
        [
            (lambda t, m: t.pop("model.layers.0.mlp.up_proj.wd"), "up_proj.wd is missing"),
            (
                lambda t, m: t.update({"model.layers.0.mlp.up_proj.md": torch.zeros(3)}),
                r"up_proj.md is torch.float32 \[3\], it should be torch.float32 \[96\]",
            ),
            (
                lambda t, m: t["model.layers.0.mlp.up_proj.wd"].fill_(torch.nan),
                "up_proj.wd holds NaN",
            ),
            (lambda t, m: m.update(format_version=2), "format_version 2 is unknown"),
            (lambda t, m: m.pop("architecture"), "metadata is damaged"),
            (lambda t, m: m.update(linears=[1]), "metadata is damaged"),
        ],
    )
    def test_damage_is_named(self, saved, tmp_path, damage, message):
        file = saved / "neuron_scores" / "neuron_scores.safetensors"
        with safe_open(file, framework="pt") as opened:
            header = json.loads(opened.metadata()["wexpand_neuron_scores"])
        tensors = load_file(file)
        damage(tensors, header)
        metadata = {"wexpand_neuron_scores": json.dumps(header)}
        save_file(tensors, tmp_path / "neuron_scores.safetensors", metadata=metadata)
        with pytest.raises(WexpandError, match=message):
            load_scores(tmp_path)


def test_fingerprints_ignore_dtype_but_neither_shape_nor_values():
    weight = torch.randn(40, 30).bfloat16()
    assert fingerprint(weight) == fingerprint(weight.float()) and len(fingerprint(weight)) == 16
    assert fingerprint(weight) != fingerprint(weight.view(30, 40))
    other = weight.clone()
    other[39, 29] += 1
    assert fingerprint(weight) != fingerprint(other)
    assert fingerprint(torch.zeros(1, 1)) != fingerprint(torch.ones(1, 1))
