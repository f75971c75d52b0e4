"""inspect counts what is on disk, and what a token reads."""

import random
import shutil

import pytest
import tiny
import torch
from corruptions import (
    corrupted,
    edit_config,
    edit_tensors,
    flip_bit,
    map_out_of_range,
    shards,
)
from transformers import AutoModelForCausalLM

from wexpand_plugin.errors import WexpandError
from wexpand_plugin.format.model_dir import ModelDir
from wexpand_plugin.format.rowpool import RowPool
from wexpand_plugin.format.values import codec
from wexpand_plugin.hf.linear import RoutedLinear
from wexpand_plugin.hf.saving import wrap_save_pretrained
from wexpand_plugin.tools.inspect import inspect
from wexpand_plugin.tools.inspect_table import table
from wexpand_plugin.tools.report.data import collect
from wexpand_plugin.tools.report.numbers import tuned
from wexpand_plugin.tools.verify import verify


def test_inspect_counts_what_is_on_disk(sound):
    found = inspect(sound)
    assert found.ours and len(found.linears) == 14
    model, names = ModelDir(sound), {linear.name for linear in found.linears}
    on_disk = {n: t for n, t in model.tensors() if n.rpartition(".")[0] in names}
    assert found.linear_bytes == sum(tensor.nbytes for tensor in on_disk.values())
    assert found.disk_bytes == sum(file.stat().st_size for file in shards(sound))
    assert found.sparsity == pytest.approx(0.5, abs=0.03)
    kinds = found.as_dict()["bytes"]
    for kind, ending in (("row_map", "row_map"), ("mask", "weight_mask"), ("values", ".weight"),
                         ("scale", "weight_scale"), ("bias", ".bias")):  # fmt: skip
        assert kinds[kind] == sum(t.nbytes for n, t in on_disk.items() if n.endswith(ending))
    linears = {linear.name.partition("layers.")[2]: linear for linear in found.linears}
    linear = linears["0.mlp.gate_proj"]
    assert linear.dense_bytes == tiny.HIDDEN * tiny.FFN * 4 and linear.values == "float32"
    assert linear.tokens == [10, 11, 12] and 0.99 < linear.balance < 1
    assert linears["0.mlp.up_proj"].values == "int8, groups of 8"
    assert linears["1.mlp.down_proj"].values == "int3, groups of 16"
    only = inspect(sound, [linear.name])
    assert only.linears == [linear] and only.disk_bytes == found.disk_bytes


@pytest.mark.parametrize(("experts", "clusters", "parents"), [(1, 40, 7), (2, 8, 0)])
def test_inspect_counts_clusters(tmp_path, experts, clusters, parents):
    """On disk all biases, read per token one, and of two levels of a router one of each."""
    model = tiny.expanded(
        tmp_path / "a", experts=experts, clusters=clusters, parents=parents, match="mlp"
    )
    found = inspect(tmp_path / "a")
    on_disk = dict(ModelDir(tmp_path / "a").tensors())
    gate = next(linear for linear in found.linears if linear.name.endswith("0.mlp.gate_proj"))
    assert (gate.experts, gate.clusters, len(gate.tokens)) == (experts, clusters, clusters)
    own = {n.removeprefix(f"{gate.name}."): t for n, t in on_disk.items() if gate.name in n}
    assert gate.stored_bytes == sum(tensor.nbytes for tensor in own.values())
    biases = own["cluster_bias"].nbytes + own["cluster_bias_scale"].nbytes
    named = own["cluster_expert"].nbytes if experts > 1 else 0
    router = own["router_weight"].nbytes + own["router_bias"].nbytes
    assert (gate.bytes["cluster_bias"], gate.bytes["router"]) == (biases, router + named)
    rows = parents + -(-clusters // parents) if parents else clusters
    module = model.get_submodule(gate.name)
    tokens = torch.zeros(experts)
    for cluster, count in enumerate(module.tokens):
        tokens[cluster % experts] += count
    right = module.pool.bytes_per_token(tokens if experts > 1 else None)
    right += 3 * tiny.FFN + rows * (2 * tiny.HIDDEN + 4) + (experts > 1)
    assert gate.bytes_per_token == pytest.approx(right)
    up = next(linear for linear in found.linears if linear.name.endswith("0.mlp.up_proj"))
    assert up.bytes["cluster_bias"] == 0
    assert verify(tmp_path / "a") == []
    text = table(found)
    assert "clusters  experts" in text and "cluster_bias " in text


def test_bytes_per_token_against_the_rows_themselves(sound):
    """The pool's rows of each expert, weighted by tokens; a group's router once."""
    found = {linear.name: linear for linear in inspect(sound).linears}
    model = AutoModelForCausalLM.from_pretrained(sound)
    # bits of a value, scales of a row, routers that are its group's first linear's
    cases = {"0.mlp.gate_proj": (32, 0, 1), "0.mlp.up_proj": (8, 5, 0),
             "0.self_attn.q_proj": (32, 0, 1), "1.mlp.down_proj": (3, 4, 1)}  # fmt: skip
    for name, (bits, scales, routers) in cases.items():
        module = model.get_submodule(f"model.layers.{name}")
        total, versions, kept = 0.0, module.pool.version_map().tolist(), module.pool.kept()
        for expert, tokens in enumerate(module.tokens):
            rows = sum(
                (int(kept[version]) * bits + 7) // 8 + (module.in_features + 7) // 8 + 2 * scales
                for version in versions[expert]
            )
            total += tokens / sum(module.tokens) * (rows + module.out_features)
        router = module.experts * (2 * module.in_features + 4) * routers  # float16 in the file
        bias = module.bias.nbytes if module.bias is not None else 0
        assert found[f"model.layers.{name}"].bytes_per_token == pytest.approx(total + router + bias)


@pytest.mark.parametrize("how", [None, codec("int4", 8)], ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_inspect_one_expert(tmp_path, sparsity, how):
    """No row map, with or without masks: a token reads everything."""
    model = tiny.expand(tiny.dense("qwen2"), experts=1, sparsity=sparsity)
    for name, module in list(model.named_modules()):
        if how is not None and isinstance(module, RoutedLinear):
            pool = RowPool.pack(module.pool.rows(), codec=how)
            model.set_submodule(name, RoutedLinear.from_pool(pool, bias=module.bias))
    wrap_save_pretrained(model, {})
    model.save_pretrained(tmp_path / "a")
    found = inspect(tmp_path / "a")
    names = [name for name in ModelDir(tmp_path / "a").headers if ".mlp." in name]
    assert (
        found.bytes_per_token
        == found.linear_bytes
        == sum(tensor.nbytes for _, tensor in ModelDir(tmp_path / "a").tensors(names))
    )
    assert (found.bytes_by_kind()["mask"] == 0) == (sparsity == 0)


def test_inspect_dense(tmp_path):
    model = tiny.prune(tiny.dense("qwen2", torch.bfloat16), 0.5)
    model.save_pretrained(tmp_path / "dense")
    found = inspect(tmp_path / "dense")
    assert not found.ours and len(found.linears) == 14
    assert found.linear_bytes == found.dense_bytes == found.bytes_per_token
    assert found.sparsity == pytest.approx(0.5, abs=0.02)
    one = inspect(tmp_path / "dense", ["model.layers.1.mlp.up_proj"])
    assert one.dense_bytes == tiny.HIDDEN * tiny.FFN * 2
    with pytest.raises(WexpandError, match="has no linear lm_head"):
        inspect(tmp_path / "dense", ["lm_head"])


def test_inspect_reads_no_values(sound, tmp_path):
    """Damaged values do not matter to it: they are not read. Wrong sizes do."""
    path = corrupted(sound, tmp_path / "a", lambda p, r: flip_bit(p, r, ("proj.weight",)), 3)
    assert verify(path) and inspect(path).linear_bytes == inspect(sound).linear_bytes
    path = corrupted(sound, tmp_path / "b", map_out_of_range, 0)
    with pytest.raises(WexpandError, match="row_map"):
        inspect(path)


def test_inspect_of_an_expert_that_is_not_there(tmp_path):
    tiny.expanded(tmp_path / "a", experts=2, clusters=8)
    edit_tensors(tmp_path / "a", random.Random(0), ("cluster_expert",), lambda t: t + 9)
    with pytest.raises(WexpandError, match="cluster_expert: 8 of 0 to 10 should be 8 of 0 to 1"):
        inspect(tmp_path / "a")


@pytest.mark.parametrize(
    ("config", "problem"), [("wexpand", "'wexpand' should be an object"), (None, "is no matrix")]
)
def test_a_config_that_is_none(sound, tmp_path, config, problem):
    path = shutil.copytree(sound, tmp_path / "a")
    edit_config(path, lambda v: v.update(quantization_config=config))
    with pytest.raises(WexpandError, match=problem):
        inspect(path)


@pytest.mark.parametrize(
    "said", [{"dial": None}, {"dial": {"linears": [1]}}, {"predicted_loss": {"a": "x"}},
             {"predicted_loss": [1]}, {"tuned": {"a": 1}}, {"tuned": [2]}],
)  # fmt: skip
def test_whatever_is_said_of_how_it_was_made(sound, tmp_path, said):
    """Nothing depends on it, so it may be anything."""
    path = shutil.copytree(sound, tmp_path / "a")
    edit_config(path, lambda v: v["quantization_config"]["made_by"].update(said), seal=True)
    assert verify(path) == []
    assert "all tensors" in table(inspect(path))
    assert not tuned(collect(path))
