"""`sparsity: auto`: settings chosen linear by linear, within the budget, saved and read back."""

import re

import pytest
import torch
import yaml
from test_modifier import calibration, logits, run, tiny
from tiny import block_linears
from transformers import AutoModelForCausalLM

from wexpand_plugin import SparseExpansionModifier, recipe
from wexpand_plugin.compress.plan_batches import plan_batches
from wexpand_plugin.compress.planning import Plan, plan_linears
from wexpand_plugin.errors import WexpandError
from wexpand_plugin.format.model_dir import ModelDir
from wexpand_plugin.hf.linear import RoutedLinear
from wexpand_plugin.method.dial import Candidate, Setting
from wexpand_plugin.method.prospects import Dial
from wexpand_plugin.tools.inspect import inspect
from wexpand_plugin.tools.inspect_table import table
from wexpand_plugin.tools.verify import verify

SLOW = pytest.mark.slow
AUTO = dict(sparsity="auto", num_experts=1, value_group=16)


def dial(budget=0.4, **values):
    keys = {"num_experts": 1, "value_group": 16, "size_budget": budget} | values
    return Dial.of(keys)


def planned(path, dial, **changes):
    model = AutoModelForCausalLM.from_pretrained(path, **changes)
    data = calibration()
    batches = [{"input_ids": torch.tensor([row])} for row in data["input_ids"]]
    batches = plan_batches(batches, torch.device("cpu"))
    return model, plan_linears(model, block_linears(model), batches, dial)


@pytest.mark.parametrize("kind", ["Llama", pytest.param("GPTNeoX", marks=SLOW)])
@pytest.mark.parametrize(
    ("budget", "keys"),
    [
        (0.15, dict()),
        (0.7, dict(tune_epochs=1)),
        (0.6, dict(values="float", tune_epochs=1)),
        pytest.param(0.2, dict(values="int8"), marks=SLOW),
        pytest.param(0.2, dict(mask_structure="2:4", targets=["re:.*mlp.*"]), marks=SLOW),
        pytest.param(0.11, dict(mask_structure="unstructured"), marks=SLOW),
    ],
    ids=str,
)  # fmt: skip
def test_meets_the_budget_saves_and_reloads_equal(kind, budget, keys, tmp_path, said):
    path = tiny(kind, tmp_path / "dense")
    model = run(path, tmp_path / "out", size_budget=budget, **AUTO | keys)
    assert verify(tmp_path / "out") == []
    routed = {n: m for n, m in model.named_modules() if isinstance(m, RoutedLinear)}
    targets = [n for n in block_linears(AutoModelForCausalLM.from_pretrained(path))
               if "targets" not in keys or "mlp" in n]  # fmt: skip
    weights = AutoModelForCausalLM.from_pretrained(path)
    dense = sum(4 * weights.get_submodule(n).weight.numel() for n in targets)
    stored = sum(
        routed[n].stored_bytes() if n in routed else 4 * weights.get_submodule(n).weight.numel()
        for n in targets
    )
    # rows of 32 columns that are cut by one threshold for all may end anywhere in a byte
    least = 0.6 if keys.get("mask_structure") == "unstructured" else 0.75
    assert least * budget < stored / dense <= budget
    end = next(line for line in said if line.startswith(f"Compressed {len(routed)} linears to"))
    assert any("zeros and bits chosen for" in line for line in said)
    if left := len(targets) - len(routed):  # the budget counts what stays dense, and so does this
        assert f"\n{left} more stay dense, " in table(inspect(tmp_path / "out"))
        assert f"; {stored / dense:.3f} together with {left} that stay dense" in end
    saved = ModelDir(tmp_path / "out").config
    kinds = {str(entry.codec).partition(", ")[0] for entry in saved.linears.values()}
    kept = re.search(r"kept values in (.*)\.", (tmp_path / "out" / "README.md").read_text())[1]
    assert set(re.findall(r"(?:int|float)\d+", kept)) == kinds
    scaled = any(entry.codec.scaled for entry in saved.linears.values())
    assert kept.count(" groups of 16") == scaled
    predicted = saved.made_by["predicted_loss"]
    sizes, losses = zip(*saved.made_by["dial"]["curve"], strict=True)
    assert list(losses) == sorted(losses, reverse=True) and min(sizes) < budget
    why = saved.made_by["dial"]["linears"]
    assert predicted.keys() <= why.keys() == set(targets)
    assert all(own["next"] or own["last"] for own in why.values())
    assert predicted.keys() == routed.keys() == saved.linears.keys()
    assert all(loss >= 0 for loss in predicted.values()) and sum(predicted.values()) > 0
    if kind == "Llama":  # linears that vLLM runs as one layer have values of one kind
        for group in (("gate_proj", "up_proj"), ("q_proj", "k_proj", "v_proj")):
            for layer in (0, 1):
                same = {saved.linears[n].values if n in saved.linears else "dense"
                        for n in targets if n.split(".")[2] == str(layer) and n.endswith(group)}
                assert len(same) <= 1
    if "values" in keys:
        kind = "float32" if keys["values"] == "float" else keys["values"]
        assert {entry.values for entry in saved.linears.values()} == {kind}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)


def test_what_a_token_reads_is_bounded_alone(tmp_path):
    """With one expert it is what is stored."""
    path = tiny("Llama", tmp_path / "dense")
    for name in ("read", "size"):
        torch.manual_seed(0)  # of the order of the calibration rows
        run(path, tmp_path / name, **{f"{name}_budget": 0.2}, **AUTO)
    read, size = (inspect(tmp_path / name) for name in ("read", "size"))
    assert read.linears == size.linears and 0.15 < read.bytes_per_token / read.dense_bytes <= 0.2


@pytest.mark.parametrize("scope", ["model", pytest.param("layer", marks=SLOW)])
def test_experts_share_what_reading_leaves(scope, tmp_path):
    path = tiny("Llama", tmp_path / "dense")
    keys = AUTO | dict(num_experts=3, budget_scope=scope, tune_epochs=int(scope == "layer"))
    run(path, tmp_path / "out", read_budget=0.15, size_budget=0.3, **keys)
    assert verify(tmp_path / "out") == []
    found = inspect(tmp_path / "out")
    assert len({(linear.values, linear.sparsity) for linear in found.linears}) > 1
    every = inspect(path)
    left = sum(x.stored_bytes for x in every.linears if x.name not in
               {linear.name for linear in found.linears})  # fmt: skip
    assert 0.12 < (found.bytes_per_token + left) / every.dense_bytes <= 0.15
    assert 0.25 < (found.linear_bytes + left) / every.dense_bytes <= 0.3
    assert any(linear.versions > linear.out_features for linear in found.linears)


def test_a_plan_changes_nothing_and_more_bytes_cost_less(tmp_path):
    path = tiny("Llama", tmp_path)
    model, plan = planned(path, dial())
    before = logits(AutoModelForCausalLM.from_pretrained(path))
    assert torch.equal(logits(model), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    losses = []
    for budget in (0.12, 0.16, 0.2, 0.3, 0.5, 1.0):
        choice = plan.choose(budget)
        assert sum(c.stored for c in choice.values()) <= budget * plan.dense_bytes
        losses.append(sum(c.loss for c in choice.values()))
    assert losses == sorted(losses, reverse=True) and losses[-1] == 0
    # half of them zeros and 4 bits lose more than 4 bits, and 8 bits next to nothing
    for group in plan.groups:
        for candidates in group.values():
            of = {c.setting: c.loss for c in candidates}
            assert of["int4", 0.5] > of["int4", 0.0] > 20 * of["int8", 0.0] > 0
    with pytest.raises(WexpandError, match="size_budget: 0.01 is below 0.0"):
        plan.choose(0.01)


def test_the_least_size_can_be_chosen():
    """Divided by the dense bytes and multiplied again, a size of whole bytes may come out lower."""
    for dense in range(2, 3000, 7):
        groups = [{"a": [Candidate(Setting("int2", 0.9), 1.0, dense // 2 - 1 or 1, 1)]}]
        plan = Plan(groups, {"a": dense}, 1, 1, 1.0, 1.0)
        assert list(plan.choose(plan.least)) == ["a"]


def test_hessians_in_turns_are_the_same(tmp_path, monkeypatch):
    path = tiny("Llama", tmp_path)
    _, whole = planned(path, dial())
    monkeypatch.setattr("wexpand_plugin.compress.planning.HESSIAN_BYTES", 1)
    _, turns = planned(path, dial(max_bytes=1))  # sparsities one by one as well
    for one, other in zip(whole.groups, turns.groups, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            for a, b in zip(one[name], other[name], strict=True):
                assert (a.setting, a.stored) == (b.setting, b.stored)
                assert a.loss == pytest.approx(b.loss, rel=0.02, abs=1e-9)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (dict(num_experts=16), "read_budget: None should be above 0 .* num_experts 16: zeros and"),
        (dict(read_budget=1.5), "read_budget: 1.5 should be above 0 and below 1 with sparsity"),
        (
            dict(num_experts=2, read_budget=0.2, mask_structure="unstructured"),
            "mask_structure: unstructured should be row or N:M",
        ),
        (
            dict(num_experts=2, read_budget=0.2, tune_epochs=1),
            "budget_scope: 'model' should be layer with tune_epochs",
        ),
        (dict(sparsity=0.5, read_budget=0.3, size_budget=None), "read_budget: 0.3 should be null"),
        (dict(num_clusters=64), "num_clusters: 64 should be 0 with sparsity auto"),
        (dict(size_budget=None), "size_budget: None should be above 0 and below 1 with sparsity"),
        (dict(size_budget=1.5), "size_budget: 1.5 should be above 0 and below 1 with sparsity"),
        (dict(budget_scope="layer"), "budget_scope: 'layer' should be model with sparsity auto"),
        (dict(values="int7"), "values: 'int7' should be auto, float or one of int8, int6"),
        (dict(value_group=12), "value_group: 12 should be a multiple of 8"),
        (dict(sparsity="much"), "should be a number, or auto"),
    ],
    ids=str,
)
def test_contradictory_keys(keys, message):
    with pytest.raises((WexpandError, ValueError), match=message):
        SparseExpansionModifier(**{**AUTO, "size_budget": 0.2} | keys)


def test_the_recipe_turns_the_dial():
    stage = yaml.safe_load(open(recipe("dial")))
    ((_, modifiers),) = next(iter(stage.values())).items()
    modifier = SparseExpansionModifier(**modifiers["SparseExpansionModifier"])
    assert (modifier.sparsity, modifier.values, modifier.num_experts) == ("auto", "auto", 1)


def test_a_budget_that_no_settings_meet_is_refused_before_calibration(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "llmcompressor.pipelines.CalibrationPipeline.from_modifiers",
        lambda *_: pytest.fail("calibration began"),
    )
    path = tiny("Llama", tmp_path)
    with pytest.raises(WexpandError, match=r"size_budget: 0.05 is below 0.0\d+, the smallest"):
        run(path, **AUTO | dict(size_budget=0.05))
    with pytest.raises(WexpandError, match=r"read_budget: 0.05 is below 0.0\d+, the least that a"):
        run(path, **AUTO | dict(read_budget=0.05))
    with pytest.raises(WexpandError, match=r"read_budget: 0.2 is below 0.\d+, what a token reads"):
        run(path, sparsity=0.5, num_experts=3, read_budget=0.2)
