"""check_linear: what every reader accepts, and each thing that it refuses, by name."""

import re

import pytest
import torch
from samples import NAME, changed, linear

from wexpand_plugin.errors import WexpandError
from wexpand_plugin.format.checks import check_form, check_linear
from wexpand_plugin.format.values import codec

INT4 = codec("int4", 8)


@pytest.mark.parametrize("how", [None, codec("int8", 8), INT4], ids=str)
@pytest.mark.parametrize("experts", [1, 2])
def test_accepts(experts, how):
    entry, tensors = linear(experts, how=how)
    pool, router = check_linear(NAME, entry, tensors)
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


@pytest.mark.parametrize("kind", linear(how=INT4)[1])
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
    entry, tensors = linear(how=INT4)
    tensors[kind] = change(tensors[kind])
    with pytest.raises(WexpandError, match=re.escape(message)) as error:
        check_linear(NAME, entry, tensors)
    assert str(error.value).startswith(f"{NAME}.{kind}: ")
    assert error.value.tensor == f"{NAME}.{kind}"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("how", [None, INT4], ids=str)
def test_refuses_what_is_not_finite(how, bad):
    entry, tensors = linear(how=how)
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


def test_check_form():
    check_form("a", (2, 3), torch.float16, (2, 3), (torch.float32, torch.float16))
    with pytest.raises(WexpandError, match=re.escape("a: shape [2] should be [3] by config.json")):
        check_form("a", (2,), torch.float16, (3,), (torch.float16,))
    with pytest.raises(WexpandError, match="a: dtype None should be torch.uint8") as error:
        check_form("a", (2,), None, (2,), (torch.uint8,))
    assert error.value.tensor == "a"
