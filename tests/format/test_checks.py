"""check_linear: what every reader accepts, and each thing that it refuses, by name."""

import re

import pytest
import torch
from samples import NAME, changed, linear

from wexpand_plugin.errors import WexpandError
from wexpand_plugin.format.checks import check_form, check_linear
from wexpand_plugin.format.clusters import ClusterBias
from wexpand_plugin.format.values import codec

INT4 = codec("int4", 8)
CLUSTERED = linear(2, how=INT4, clusters=7, parents=3, cluster_bias=True)


@pytest.mark.parametrize("how", [None, codec("int8", 8), INT4, codec("int3", 8)], ids=str)
@pytest.mark.parametrize("experts", [1, 2])
def test_accepts(experts, how):
    entry, tensors = linear(experts, how=how)
    pool, router, *_ = check_linear(NAME, entry, tensors)
    assert pool.experts == experts and pool.codec == entry.codec
    assert pool.values is tensors["weight"] and pool.scale is tensors.get("weight_scale")
    assert (router is None) == (experts == 1)
    if router is not None:
        assert router.bias.shape == (2,) and router.weight is tensors["router_weight"]


def test_accepts_routers_of_either_dtype_and_biases_of_any_float():
    entry, tensors = linear()
    tensors["router_weight"] = tensors["router_weight"].half()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        tensors["bias"] = tensors["bias"].to(dtype)
        check_linear(NAME, entry, tensors)


@pytest.mark.parametrize("kind", CLUSTERED[1])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: None, "missing; config.json promises ["),
        (lambda tensor: tensor[:-1], "should be ["),
        (lambda tensor: tensor[None], "should be ["),
        (lambda tensor: tensor.to(torch.int16), "dtype torch.int16 should be"),
        (lambda tensor: tensor.to(torch.float64), "dtype torch.float64 should be"),
    ],
)
def test_refuses_by_name(kind, change, message):
    entry, tensors = CLUSTERED
    tensors = tensors | {kind: change(tensors[kind])}
    with pytest.raises(WexpandError, match=re.escape(message)) as error:
        check_linear(NAME, entry, tensors)
    assert str(error.value).startswith(f"{NAME}.{kind}: ")
    assert error.value.tensor == f"{NAME}.{kind}"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("how", [None, INT4], ids=str)
def test_refuses_what_is_not_finite(how, bad):
    entry, tensors = linear(how=how, cluster_bias=True)
    for kind in tensors:
        if tensors[kind].is_floating_point():
            damaged = tensors | {kind: changed(tensors[kind], (0,) * tensors[kind].dim(), bad)}
            with pytest.raises(WexpandError, match=f"{NAME}.{kind}: holds NaN") as error:
                check_linear(NAME, entry, damaged)
            assert error.value.tensor == f"{NAME}.{kind}"


def test_refuses_content_that_contradicts_itself():
    """The pool's own rules are tried in test_rowpool; here that they are asked."""
    entry, tensors = linear()
    with pytest.raises(WexpandError, match=f"{NAME}.weight_mask: rows keep") as error:
        check_linear(NAME, entry, tensors | {"weight_mask": tensors["weight_mask"] & 0xF})
    assert error.value.tensor == f"{NAME}.weight_mask"
    with pytest.raises(WexpandError, match=f"{NAME}.row_map: its neurons have"):
        check_linear(NAME, entry, tensors | {"row_map": tensors["row_map"] * 3})


def test_refuses_tensors_that_nobody_promised():
    entry, tensors = linear(experts=1, bias=False)
    more = {"row_map": torch.zeros(1, 3, dtype=torch.uint8)}
    with pytest.raises(WexpandError, match=f"{NAME}.row_map: config.json promises no such tensor"):
        check_linear(NAME, entry, tensors | more)


def test_accepts_clusters():
    entry, tensors = CLUSTERED
    found = check_linear(NAME, entry, tensors)
    assert found.clusters == found.router.clusters == 7 and found.router.parents == 3
    assert found.cluster_expert is tensors["cluster_expert"]
    assert found.cluster_bias.values is tensors["cluster_bias"]
    assert found.entry(torch.float32) == entry
    entry, tensors = linear(1, cluster_bias=True)
    found = check_linear(NAME, entry, tensors)
    assert found.router is None and found.cluster_bias.values.shape == (1, 3)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (changed(CLUSTERED[1]["cluster_expert"], 3, 2), "2 is not 0 to 1, an expert of"),
        (changed(CLUSTERED[1]["cluster_expert"], 0, 255), "255 is not 0 to 1, an expert of"),
        (torch.zeros(7, dtype=torch.uint8), "no cluster has expert 1, of 2"),
        (torch.ones(7, dtype=torch.uint8), "no cluster has expert 0, of 2"),
    ],
)
def test_refuses_clusters_of_no_expert_and_experts_of_no_cluster(change, problem):
    entry, tensors = CLUSTERED
    with pytest.raises(WexpandError, match=f"{NAME}.cluster_expert: {problem}") as error:
        check_linear(NAME, entry, tensors | {"cluster_expert": change})
    assert error.value.tensor == f"{NAME}.cluster_expert"


def test_refuses_negative_scales_of_biases():
    entry, tensors = CLUSTERED
    damaged = tensors | {"cluster_bias_scale": -tensors["cluster_bias_scale"]}
    with pytest.raises(WexpandError, match=f"{NAME}.cluster_bias_scale: holds NaN, infinite or"):
        check_linear(NAME, entry, damaged)


@pytest.mark.parametrize(
    ("parts", "problem"),
    [
        ({"router": None}, "router: has 1 clusters for 2 experts"),
        ({"cluster_expert": None}, "cluster_expert: should be there .* 2 experts of 7 clusters"),
        ({"cluster_bias": ClusterBias.pack(torch.ones(6, 3))}, "cluster_bias: .6, 3. should be .7"),
        ({"cluster_bias": ClusterBias.pack(torch.ones(7, 4))}, "cluster_bias: .7, 4. should be .7"),
    ],
)
def test_parts_that_do_not_fit_make_no_entry(parts, problem):
    stored = check_linear(NAME, *CLUSTERED)
    with pytest.raises(WexpandError, match=problem):
        stored._replace(**parts).entry(torch.float32)


def test_check_form():
    check_form("a", (2, 3), torch.float16, (2, 3), (torch.float32, torch.float16))
    with pytest.raises(WexpandError, match=re.escape("a: shape [2] should be [3] by config.json")):
        check_form("a", (2,), torch.float16, (3,), (torch.float16,))
    with pytest.raises(WexpandError, match="a: dtype None should be torch.uint8") as error:
        check_form("a", (2,), None, (2,), (torch.uint8,))
    assert error.value.tensor == "a"
