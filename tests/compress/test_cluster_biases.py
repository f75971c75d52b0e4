"""`num_clusters` in real runs on tiny models: biases that help, stored as calibrated with."""

import re

import pytest
import torch
from llmcompressor import oneshot
from test_modifier import calibration, logits, run, tiny
from tiny import tokenizer
from transformers import AutoModelForCausalLM

from wexpand_plugin.compress.modifier import SparseExpansionModifier
from wexpand_plugin.errors import WexpandError
from wexpand_plugin.format.model_dir import ModelDir
from wexpand_plugin.format.router import StoredRouter
from wexpand_plugin.hf.linear import RoutedLinear
from wexpand_plugin.method.clusters import fit_router
from wexpand_plugin.tools.verify import verify

SLOW = pytest.mark.slow
MLP = ["re:.*mlp.*", "re:.*layers.*fc.*"]


def routed(model) -> dict[str, RoutedLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, RoutedLinear)}


def one(experts: int, clusters: int, **keys) -> dict:
    return dict(num_experts=experts, num_clusters=clusters, targets=MLP) | keys


@pytest.mark.parametrize(
    "kind,keys",
    [
        ("Llama", one(1, 40, values="int4", value_group=16, sparsity=0.5)),
        ("GPTNeoX", one(2, 8, targets=["Linear"])),
        ("Qwen2", one(3, 12, size_budget=1.1, budget_scope="model")),
        pytest.param("Llama", one(1, 1), marks=SLOW),
        pytest.param("Gemma2", one(1, 4, mask_structure="2:4", sparsity=0.5), marks=SLOW),
        pytest.param("OPT", one(1, 4, tune_epochs=2), marks=SLOW),
        pytest.param("Qwen3", one(4, 4, targets=["Linear"]), marks=SLOW),
        pytest.param("Mistral", one(2, 40, size_budget=1.5, budget_scope="layer"), marks=SLOW),
        pytest.param("Llama", one(1, 40, tune_epochs=2, values="int8"), marks=SLOW),
    ],
    ids=str,
)
def test_what_is_stored_is_what_was_calibrated_with(kind, keys, tmp_path):
    model = run(tiny(kind, tmp_path / "dense"), tmp_path / "out", **keys)
    experts, clusters = keys["num_experts"], keys["num_clusters"]
    found = routed(model)
    assert found and verify(tmp_path / "out") == []
    for name, module in found.items():
        assert (module.experts, module.clusters) == (experts, clusters)
        assert len(module.tokens) == clusters and sum(module.tokens) == 24 * 48
        assert module.cluster_biases.values.any()
        assert (module.router is None) == (clusters == 1)
        assert (module.cluster_expert is not None) == (1 < experts < clusters)
        stored = ModelDir(tmp_path / "out").linear(name)
        assert stored.cluster_bias.values.shape == (clusters, module.out_features)
        if clusters > 1:
            assert stored.router.parents == (7 if clusters == 40 else 0)
            assert stored.router.weight.dtype == torch.float16
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(reloaded), logits(model))
    if "size_budget" in keys:
        size, dense = (sum(map(f, found.values())) for f in (_stored, RoutedLinear.dense_bytes))
        assert 0.9 * keys["size_budget"] * dense < size <= keys["size_budget"] * dense


def _stored(module: RoutedLinear) -> int:
    return module.stored_bytes()


@pytest.mark.parametrize(
    "kind,keys",
    [
        ("Qwen2", dict(num_experts=1)),
        pytest.param("Llama", dict(num_experts=1, tune_epochs=4), marks=SLOW),
        pytest.param("GPTNeoX", dict(num_experts=2), marks=SLOW),
    ],
    ids=str,
)
def test_biases_come_closer_to_the_dense_model(kind, keys, tmp_path):
    path = tiny(kind, tmp_path / "dense")
    dense = logits(AutoModelForCausalLM.from_pretrained(path))
    errors = [0.0, 0.0]
    for order in range(2):  # of the calibration rows; in one alone there is luck
        for place, clusters in enumerate((0, 12)):
            torch.manual_seed(order)
            model = run(path, num_clusters=clusters, targets=MLP, data=calibration(48), **keys)
            errors[place] += float((logits(model) - dense).norm() / dense.norm())
    assert errors[1] < (0.99 if "tune_epochs" in keys else 0.97) * errors[0]


@pytest.mark.parametrize("experts,layer", [(1, 1), (2, 0)])
def test_later_linears_are_calibrated_on_rounded_biases(experts, layer, tmp_path):
    """The tokens that a linear counted in each cluster are those of the inputs it has in use: with
    one expert in the next block, else in the same."""
    mlp = ["re:.*layers.0.mlp.*", "re:.*layers.1.*q_proj"]
    model = run(tiny("Llama", tmp_path / "dense"), **one(experts, 6, targets=mlp))
    layers, seen = model.model.layers, []
    linear = layers[1].self_attn.q_proj if layer else layers[0].mlp.down_proj
    width = linear.in_features
    linear.register_forward_pre_hook(lambda m, args: seen.append(args[0].reshape(-1, width)))
    with torch.no_grad():
        for row in calibration()["input_ids"]:
            model(input_ids=torch.tensor([row]))
    counts = torch.bincount(linear.router.route(torch.cat(seen)), minlength=6)
    assert (counts - torch.tensor(linear.tokens)).abs().sum() <= 4


def test_tuning_trains_biases(tmp_path):
    path, found = tiny("Llama", tmp_path / "dense"), []
    for epochs in (0, 2):
        torch.manual_seed(0)
        keys = one(1, 4, tune_epochs=epochs, targets=["re:.*layers.0.mlp.up_proj"])
        (module,) = routed(run(path, **keys)).values()
        found.append(module)
    plain, tuned = (module.cluster_biases.decoded() for module in found)
    assert torch.equal(found[0].router.weight, found[1].router.weight)
    assert not torch.equal(plain, tuned) and (plain - tuned).norm() < plain.norm()


@pytest.mark.parametrize("clusters", [16, 40, 256])
def test_calibration_routes_as_what_is_stored(clusters):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(6000, 48, generator=generator) + 3 * torch.randn(20, 1, 48).repeat(
        1, 300, 1
    ).flatten(0, 1)
    router = fit_router(rows, clusters, restarts=1)
    same = router.route(rows) == StoredRouter(*router).route(rows)
    assert same.float().mean() > 0.9995


def test_the_log_counts_clusters(tmp_path, said):
    run(tiny("Llama", tmp_path / "dense"), **one(1, 5, targets=["re:.*layers.0.mlp.*"]))
    assert any("blocks: 1 expert of 5 clusters, " in line and "% zeros (row)" in line
               for line in said)  # fmt: skip
    lines = [line for line in said if "gate_proj + up_proj: 1 expert of 5 clusters, tok" in line]
    assert len(lines) == 1
    assert sum(map(int, re.search(r"of each (\d+)/(\d+)/(\d+)", lines[0]).groups())) <= 24 * 48


@pytest.mark.parametrize(
    "keys,message",
    [
        (one(1, 5000), "num_clusters: 5000 should be 0, or 1 (num_experts) to 4096"),
        (one(4, 3), "num_clusters: 3 should be 0, or 4 (num_experts) to 4096"),
        (one(1, 1153), "calibration: 1152 tokens are too few for num_clusters 1153, which needs"),
        (one(2, 300, size_budget=1.0), "size_budget: 1.0 is below"),
    ],
)
def test_impossible_values_are_refused_before_work(keys, message, tmp_path, monkeypatch):
    def pipeline(*args, **kwargs):
        pytest.fail("calibration began")

    monkeypatch.setattr("llmcompressor.pipelines.CalibrationPipeline.from_modifiers", pipeline)
    with pytest.raises(ValueError, match=re.escape(message)):
        run(tiny("Llama", tmp_path / "dense"), **keys)


def test_clusters_of_one_token(tmp_path):
    """A cluster for nearly every token: nothing to learn a bias from, and nothing breaks."""
    model = run(tiny("Llama", tmp_path / "dense"), **one(1, 700, targets=["re:.*0.mlp.down_proj"]))
    (module,) = routed(model).values()
    assert min(module.tokens) <= 1 and module.cluster_biases.decoded().isfinite().all()


def test_fewer_distinct_inputs_than_clusters(tmp_path):
    """The first linears of a model read one of 94 token embeddings, plus nothing."""
    with pytest.raises(
        WexpandError, match="q_proj.*num_clusters: 200 clusters cannot be made from"
    ):
        oneshot(
            model=str(tiny("Llama", tmp_path / "dense")), dataset=calibration(),
            recipe=[SparseExpansionModifier(sparsity=0.5, **one(1, 200, targets=["re:.*q_proj"]))],
            processor=tokenizer(), max_seq_length=64, num_calibration_samples=24,
        )  # fmt: skip
