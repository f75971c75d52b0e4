"""config.json's quantization_config: what is read, and what is refused, with its sentence."""

import hashlib
import json
import re

import pytest
import torch
from samples import NAME, linear

from wexpand_plugin.errors import WexpandError
from wexpand_plugin.format.config import (
    KINDS,
    CheckpointConfig,
    GroupEntry,
    digest_of,
    parse_config,
)
from wexpand_plugin.format.linear import StoredLinear
from wexpand_plugin.format.rowpool import RowPool
from wexpand_plugin.format.values import codec


def sealed(**changes) -> dict:
    """A valid quantization_config, changed and sealed again so that only the change is wrong.

    `group__KEY` changes the input group, `entry__KEY` the linear; KeyError removes a key.
    """
    entry, _ = linear()
    group = GroupEntry(in_features=12, experts=2, tokens=[7, 9], linears={NAME: entry})
    values = CheckpointConfig(groups=[group]).model_dump(mode="json")
    places = {
        "group": values["groups"][0],
        "entry": values["groups"][0]["linears"][NAME],
    }
    for key, value in changes.items():
        where, _, target = key.rpartition("__")
        place = places.get(where, values)
        if value is KeyError:
            del place[target]
        else:
            place[target] = value
    rest = {key: value for key, value in values.items() if key != "digest"}
    text = json.dumps(rest, sort_keys=True)  # the rule of docs/checkpoint-format.md
    return values | {"digest": hashlib.sha256(text.encode()).hexdigest()}


LINEAR = f"groups.0.linears.{NAME}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format_version 2 is not 1, the one this version"),
        ({"format_version": KeyError}, "format_version None is not 1"),
        ({"quant_method": "gptq"}, "quantization_config.quant_method: 'gptq'"),
        ({"code": "import os"}, "quantization_config.code: 'import os': Extra inputs"),
        ({"checksums": {}}, "quantization_config.checksums: {}: Extra inputs"),
        ({"groups": KeyError}, "quantization_config.groups"),
        ({"groups": {}}, "quantization_config.groups: {}"),
        ({"groups": [5]}, "quantization_config.groups.0: 5"),
        ({"group__linears": {}}, "groups.0.linears: {}: Dictionary should have at least 1"),
        ({"group__linears": []}, "groups.0.linears: []"),
        ({"group__linears": {NAME: 5}}, f"{LINEAR}: 5"),
        ({"group__linears": KeyError}, "groups.0.linears"),
        ({"group__code": 1}, "groups.0.code: 1: Extra inputs"),
        ({"group__in_features": KeyError}, "groups.0.in_features"),
        ({"group__in_features": 0}, "in_features: 0: Input should be greater"),
        ({"group__in_features": 2**31}, "in_features: 2147483648"),
        ({"group__experts": "two"}, "experts: 'two'"),
        ({"group__experts": 257}, "experts: 257: Input should be less than or equal to 256"),
        ({"group__tokens": [1, 2, 3]}, "tokens has 3 counts for 2 clusters"),
        ({"group__clusters": 1}, "clusters 1 should be at least experts 2"),
        ({"group__clusters": 0}, "clusters: 0: Input should be greater than 0"),
        ({"group__clusters": 4097}, "clusters: 4097: Input should be less than or equal to 4096"),
        ({"group__clusters": "many"}, "clusters: 'many'"),
        ({"group__clusters": 3}, "tokens has 2 counts for 3 clusters"),
        ({"group__parents": -1}, "parents: -1: Input should be greater"),
        ({"group__parents": 1}, "parents 1 should be 0 or 2 to the 2 clusters"),
        ({"group__parents": 3}, "parents 3 should be 0 or 2 to the 2 clusters"),
        ({"entry__clusters": 2}, f"{NAME}: clusters should stand in its group alone"),
        ({"entry__parents": 0}, f"{NAME}: parents should stand in its group alone"),
        ({"entry__cluster_bias": "some"}, f"{LINEAR}.cluster_bias: 'some'"),
        ({"group__tokens": [1, -2]}, "groups.0.tokens.1: -2"),
        ({"entry__in_features": 12}, f"{NAME}: in_features should stand in its group alone"),
        ({"entry__experts": 2}, f"{NAME}: experts should stand in its group alone"),
        ({"entry__nnz": -1}, f"{LINEAR}.nnz: -1"),
        ({"entry__nnz": 73}, "nnz 73 exceeds versions * in_features = 72"),
        ({"entry__versions": 7}, "versions 7 should be 3 to 6"),
        ({"entry__versions": 2}, "versions 2 should be 3 to 6"),
        ({"entry__elements": 47}, "elements 47 should be 48 to 48"),
        ({"entry__dtype": "int4"}, f"{LINEAR}.dtype: 'int4': Input should be 'float32', "),
        ({"entry__values": "int7"}, f"{LINEAR}.values: 'int7'"),
        ({"entry__values": "int4"}, "value_group 0 does not go with int4"),
        ({"entry__value_group": 8}, "value_group 8 does not go with float32"),
        ({"entry__values": "int8", "entry__value_group": 12}, "12 should be a multiple of 8"),
        ({"entry__values": "int4", "entry__value_group": 8}, "elements 48 should be 24 to 30"),
        ({"entry__bias": "perhaps"}, f"{LINEAR}.bias: 'perhaps'"),
        ({"entry__bias": KeyError, "entry__nnz": None}, f"{LINEAR}.nnz: None"),
        ({"entry__tokens": [1, 2]}, f"{LINEAR}.tokens: [1, 2]: Extra inputs"),
    ],
)
def test_config_refuses(changes, message):
    with pytest.raises(WexpandError, match=re.escape(message)) as error:
        parse_config(sealed(**changes), "DIR/config.json")
    assert str(error.value).startswith("DIR/config.json: ") and "\n" not in str(error.value)


def test_a_linear_stands_in_one_group():
    values = sealed()
    values["groups"] *= 2
    with pytest.raises(WexpandError, match=f"{NAME} stands in two groups"):
        parse_config(values)


def test_the_layout_before_the_first_release_is_refused_with_its_sentence():
    old = {
        "quant_method": "wexpand",
        "format_version": 1,
        "linears": {NAME: {"in_features": 12, "out_features": 3, "experts": 1, "versions": 3,
                           "nnz": 24, "bias": False, "tokens": []}},
        "made_by": {},
        "checksums": {f"{NAME}.weight": "00000000"},
        "model_digest": "",
        "digest": "0" * 64,
    }  # fmt: skip
    with pytest.raises(WexpandError, match="before the first release.*compress or pack the dense"):
        parse_config(old, "DIR/config.json")


def test_config_accepts_itself_and_finds_edits():
    values = sealed()
    assert parse_config(values).model_dump(mode="json") == values
    for key, value in [("made_by", {"a": 1}), ("digest", "0" * 64)]:
        with pytest.raises(WexpandError, match="changed after it was written"):
            parse_config(values | {key: value})
    values["groups"][0]["tokens"][0] += 1
    with pytest.raises(WexpandError, match="changed after it was written"):
        parse_config(values)


def test_keys_with_a_default_may_be_left_out():
    """By another writer, who follows the digest's rule for the keys that it does write."""
    keys = ("made_by", "group__tokens", "group__clusters", "group__parents", "entry__bias",
            "entry__value_group", "entry__cluster_bias")  # fmt: skip
    values = sealed(**dict.fromkeys(keys, KeyError))
    assert "made_by" not in values and "tokens" not in values["groups"][0]
    config = parse_config(values)
    entry = config.linears[NAME]
    assert (entry.bias, entry.value_group, config.groups[0].tokens) == (False, 0, [])
    assert (entry.clusters, entry.parents, entry.cluster_bias) == (2, 0, False)
    assert (config.groups[0].clusters, config.groups[0].parents) == (2, 0)
    entry, _ = linear(experts=1)
    one = {"groups": [{"in_features": 12, "linears": {NAME: entry.model_dump(mode="json")}}]}
    values = {"quant_method": "wexpand", "format_version": 1} | one
    assert parse_config(values | {"digest": digest_of(values, "digest")}).linears[NAME].experts == 1


def test_what_a_group_has_for_all_is_written_once():
    values = sealed()
    group = values["groups"][0]
    assert (group["in_features"], group["experts"], group["tokens"]) == (12, 2, [7, 9])
    assert group["linears"][NAME].keys().isdisjoint(("in_features", "experts", "tokens"))
    config = parse_config(values)
    assert (config.linears[NAME].in_features, config.linears[NAME].experts) == (12, 2)
    assert config.group_of(NAME) == config.groups[0]
    with pytest.raises(KeyError):
        config.group_of("other")


def test_groups_keep_their_order():
    """That in which the model runs, by the files too."""
    entry, _ = linear(experts=1)
    names = ["layers.10.up", "layers.2.up", "layers.9.up"]
    groups = [GroupEntry(in_features=12, linears={name: entry}) for name in names]
    values = json.loads(json.dumps(CheckpointConfig(groups=groups).seal().model_dump(mode="json")))
    assert list(parse_config(values).linears) == names


def test_a_group_of_unequal_linears_is_refused():
    one, two = linear(experts=1)[0], linear(experts=2)[0]
    with pytest.raises(ValueError, match="b: experts 1 should be 2, as in its group"):
        GroupEntry.of({"a": two, "b": one})
    more = linear(experts=2, clusters=5, parents=3)[0]
    with pytest.raises(ValueError, match="b: clusters 2 should be 5, as in its group"):
        GroupEntry.of({"a": more, "b": two})
    with pytest.raises(ValueError, match="b: parents 0 should be 3, as in its group"):
        GroupEntry.of({"a": more, "b": linear(experts=2, clusters=5)[0]})


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    "how", [None, codec("int8", 8), codec("int4", 8), codec("int3", 8)], ids=str
)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("experts", [1, 2])
def test_an_entry_promises_what_there_is(experts, bias, how, full):
    entry, tensors = linear(experts, bias, torch.bfloat16, how, full)
    shapes = entry.shapes()
    assert shapes.keys() == tensors.keys()
    for kind, (shape, dtypes) in shapes.items():
        assert tensors[kind].shape == shape and tensors[kind].dtype in dtypes
    assert entry.codec == (how or codec("bfloat16")) and entry.dtype == "bfloat16"
    assert entry.dense_bytes == 12 * 3 * 2
    assert ("weight_mask" in shapes) == (not full)
    name_of = CheckpointConfig(
        groups=[GroupEntry(in_features=12, experts=experts, linears={NAME: entry})]
    ).tensors_of(NAME)
    assert name_of == [f"{NAME}.{kind}" for kind in tensors]


@pytest.mark.parametrize("cluster_bias", [True, False])
@pytest.mark.parametrize(
    ("experts", "clusters", "parents"), [(1, 1, 0), (1, 5, 0), (2, 2, 0), (2, 5, 3), (5, 5, 2)]
)
def test_an_entry_promises_what_clusters_need(experts, clusters, parents, cluster_bias):
    entry, tensors = linear(
        experts, clusters=clusters, parents=parents, cluster_bias=cluster_bias
    )
    shapes = entry.shapes()
    assert shapes.keys() == tensors.keys() <= set(KINDS)
    for kind, (shape, dtypes) in shapes.items():
        assert tensors[kind].shape == shape and tensors[kind].dtype in dtypes
    assert ("router_weight" in shapes) == (clusters > 1)
    assert ("cluster_expert" in shapes) == (1 < experts < clusters)
    assert ("cluster_bias" in shapes) == ("cluster_bias_scale" in shapes) == cluster_bias
    values = CheckpointConfig(groups=[GroupEntry.of({NAME: entry})]).seal().model_dump(mode="json")
    assert parse_config(values).linears[NAME] == entry
    assert values["groups"][0]["linears"][NAME].keys().isdisjoint(("clusters", "parents"))


def test_elements_of_int4_are_bytes():
    """5 weights a row take 3 bytes."""
    rows = torch.zeros(4, 12)
    rows[:, :5] = 1
    entry = StoredLinear(RowPool.pack(rows, codec=codec("int4", 8))).entry(torch.float16)
    assert (entry.nnz, entry.elements) == (20, 12)
