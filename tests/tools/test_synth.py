"""`wexpand synth`: models of random weights that are sound, and as large as asked for."""

import math

import pytest
import torch
from commands import run

from wexpand_plugin.errors import WexpandError
from wexpand_plugin.format.model_dir import ModelDir
from wexpand_plugin.tools.inspect import inspect
from wexpand_plugin.tools.synth import Shape, synth
from wexpand_plugin.tools.verify import verify


@pytest.mark.parametrize("targets", ["mlp", "all"])
@pytest.mark.parametrize(("experts", "budget"), [(1, None), (4, None), (4, 0.7)])
def test_synth(tmp_path, experts, budget, targets):
    """Sound, of the size asked for, and both halves' reader runs it."""
    shape = Shape(hidden=64, ffn=172, layers=2, heads=4, kv_heads=2, vocab=300)
    synth(
        tmp_path / "a", shape, experts=experts, budget=budget, targets=targets, quiet=True,
        max_shard_bytes=200_000,
    )  # fmt: skip
    assert verify(tmp_path / "a") == []
    found = inspect(tmp_path / "a")
    assert len(found.linears) == (6 if targets == "mlp" else 14)
    assert found.sparsity == pytest.approx(0.8, abs=0.01)
    if budget is not None:
        assert 0.95 * budget < found.linear_bytes / found.dense_bytes <= budget
    else:
        assert all(linear.versions == experts * linear.out_features for linear in found.linears)
    pool = ModelDir(tmp_path / "a").linear("model.layers.0.mlp.down_proj").pool
    per_row = (pool.expert(0) != 0).sum(dim=1)
    assert per_row.min() >= per_row.max() - 1, "rows keep equally many (a random value may be 0)"

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    text = "any text, né?\n\t漢"
    ids = tokenizer(text, return_tensors="pt")
    assert tokenizer.decode(ids["input_ids"][0]) == text and ids["input_ids"].max() < 300
    with torch.no_grad():
        logits = model(ids["input_ids"]).logits.float()
    assert torch.isfinite(logits).all() and 0.1 < logits.std() < 10


@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
@pytest.mark.parametrize("values", ["int8", "int4", "int3"])
def test_synth_integers(tmp_path, values, sparsity, experts):
    """As sound as floats, in rows with an odd number of weights too, and as large."""
    shape = Shape(hidden=62, ffn=106, layers=1, heads=1, vocab=300)
    synth(
        tmp_path / "a", shape, experts=experts, sparsity=sparsity, values=values, value_group=32,
        quiet=True,
    )  # fmt: skip
    assert verify(tmp_path / "a") == []
    model = ModelDir(tmp_path / "a")
    for name, entry in model.config.linears.items():
        pool = model.linear(name).pool
        assert str(pool.codec) == f"{values}, groups of 32" and entry.dtype == "bfloat16"
        assert (pool.mask is None) == (sparsity == 0)
        deviation = pool.expert(0).std() * entry.in_features**0.5
        assert 0.9 < deviation < 1.2, "outputs keep the size of inputs"


@pytest.mark.parametrize(
    ("experts", "clusters", "parents", "budget"), [(1, 40, 7, None), (4, 9, 0, 0.9)]
)
def test_synth_clusters(tmp_path, experts, clusters, parents, budget):
    """Sound, with a bias for each, of the size asked for; and random tokens reach most."""
    shape = Shape(hidden=64, ffn=172, layers=1, heads=4, vocab=300)
    synth(tmp_path / "a", shape, experts=experts, clusters=clusters, budget=budget, quiet=True)
    assert verify(tmp_path / "a") == []
    model = ModelDir(tmp_path / "a")
    for name, entry in model.config.linears.items():
        assert (entry.experts, entry.clusters, entry.parents) == (experts, clusters, parents)
        stored = model.linear(name)
        assert stored.cluster_bias.decoded().std() == pytest.approx(0.1, rel=0.1)
        x = torch.randn(1000, entry.in_features, generator=torch.Generator().manual_seed(0))
        assert len(stored.router.route(x).unique()) > clusters * 0.9
    if budget is not None:
        found = inspect(tmp_path / "a")
        assert 0.95 * budget < found.linear_bytes / found.dense_bytes <= budget


def test_synth_command(tmp_path):
    options = ("--hidden", 64, "--ffn", 96, "--layers", 1, "--vocab", 300, "-q")
    run("synth", tmp_path / "a", "--seed", 3, *options)
    run("synth", tmp_path / "b", "--seed", 3, *options)
    run("synth", tmp_path / "c", "--seed", 4, *options)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c
    run("synth", tmp_path / "d", "--dense", "--dtype", "float32", *options)
    found = inspect(tmp_path / "d")
    assert not found.ours and found.sparsity == 0
    assert found.linears[0].dense_bytes == 64 * 64 * 4


@pytest.mark.parametrize(
    ("shape", "options", "match"),
    [
        (dict(hidden=60), {}, "hidden: 60 should be a multiple of 2 \\* heads = 16"),
        (dict(kv_heads=3), {}, "kv_heads: 3 should divide heads = 8"),
        (dict(vocab=100), {}, "vocab: 100 should be at least 258"),
        (dict(layers=0), {}, "layers: 0 should be at least 1"),
        ({}, dict(experts=0), "experts: 0 should be 1 to 256"),
        ({}, dict(experts=4, clusters=3), "clusters: 3 should be 4 .experts. to 4096"),
        ({}, dict(clusters=4097), "clusters: 4097 should be 16 .experts. to 4096"),
        ({}, dict(dtype="int4"), "dtype: 'int4' is not one of"),
        ({}, dict(values="int7"), "values: 'int7' is not one of"),
        ({}, dict(values="int4", value_group=12), "value_group: 12 should be a multiple of 8"),
        ({}, dict(targets="head"), "targets: 'head' is not one of mlp, all"),
        ({}, dict(budget=0.1), "budget: 0.1 is below 0.29"),
        ({}, dict(budget=math.inf), "budget: inf should be above 0 and finite"),
        ({}, dict(budget=0.5, experts=1), "budget: 0.5 should be left out with one expert"),
        ({}, dict(seed=2**70), "seed: .* should be 0 or above"),
    ],
)
def test_synth_refuses(tmp_path, shape, options, match):
    with pytest.raises(WexpandError, match=match):
        synth(tmp_path / "a", Shape(**shape), quiet=True, **options)
    assert not (tmp_path / "a").exists()
