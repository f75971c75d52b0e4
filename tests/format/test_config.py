"""The checkpoint's config and tensors, without transformers: what is read, and what is refused."""

import hashlib
import json
import re

import pytest
import torch
from safetensors.torch import save_file
from wexpand_plugin.format.checkpoint import LinearEntry, WexpandConfig, check_linear, parse_config

from wexpand_plugin.errors import WexpandError
from wexpand_plugin.format import checkpoint
from wexpand_plugin.format.rowpool import pack_experts

NAME = "layers.0.up"


def linear(experts: int = 2, bias: bool = True, dtype=torch.float32):
    """(entry, tensors by kind) of a small linear."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(experts, 3, 12, generator=generator).to(dtype)
    weight[:, :, ::3] = 0
    pool = pack_experts(weight)
    tensors = {"weight": pool.values, "weight_mask": pool.mask, "row_map": pool.row_map}
    if experts > 1:
        tensors["router_weight"] = torch.randn(experts, 12, generator=generator)
        tensors["router_bias"] = torch.randn(experts, generator=generator)
    if bias:
        tensors["bias"] = torch.randn(3, generator=generator).to(dtype)
    return LinearEntry.of(pool, bias, list(range(experts))), tensors


def write(path, entry, tensors, **extra):
    """A model directory with this one linear, finished by `finalize`."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "any", "hidden_size": 12}))
    named = {f"{NAME}.{kind}": tensor for kind, tensor in tensors.items()}
    save_file(named | extra, path / "model.safetensors", metadata={"format": "pt"})
    return checkpoint.finalize(path, {NAME: entry}, {"by": "a test", "path": ("a", 1)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("experts", [1, 2])
def test_written_and_read(tmp_path, experts, bias, dtype):
    entry, tensors = linear(experts, bias, dtype)
    written = write(tmp_path / "a", entry, tensors, other=torch.arange(4.0))
    config = checkpoint.read_config(tmp_path / "a")
    assert config.linears == {NAME: entry} and config == written.model_copy(
        update={"made_by": {"by": "a test", "path": ["a", 1]}}
    )
    files = checkpoint.tensor_files(tmp_path / "a")
    assert config.checksums.keys() == files.keys() and "other" in files
    pool, router, read_bias = checkpoint.read_linear(files, NAME, config)
    assert torch.equal(pool.values, tensors["weight"]) and pool.values.dtype == dtype
    assert torch.equal(pool.mask, tensors["weight_mask"])
    assert torch.equal(pool.row_map, tensors["row_map"])
    assert (router is None) == (experts == 1) and (read_bias is None) == (not bias)
    if router is not None:
        assert torch.equal(router.weight, tensors["router_weight"])
    assert list(checkpoint.problems(files, config)) == []


# --- config


def sealed(**changes) -> dict:
    """A valid quantization_config, changed and sealed again so that only the change is wrong."""
    entry, _ = linear()
    config = WexpandConfig(linears={NAME: entry}, checksums={"a": "00000000"})
    values = config.model_dump(mode="json")
    for key, value in changes.items():
        target, *path = key.split("__")
        place = values
        if path:
            place = values["linears"][NAME]
            target = path[0]
        if value is KeyError:
            del place[target]
        else:
            place[target] = value
    rest = {key: value for key, value in values.items() if key != "digest"}
    text = json.dumps(rest, sort_keys=True)  # the rule of docs/checkpoint-format.md
    return values | {"digest": hashlib.sha256(text.encode()).hexdigest()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format_version 2 is not 1, the one this version"),
        ({"format_version": KeyError}, "format_version None is not 1"),
        ({"quant_method": "gptq"}, "quantization_config.quant_method: 'gptq'"),
        ({"code": "import os"}, "quantization_config.code: 'import os': Extra inputs"),
        ({"linears": KeyError}, "quantization_config.linears"),
        ({"linears": []}, "quantization_config.linears: []"),
        ({"checksums": {"a": 5}}, "quantization_config.checksums.a: 5"),
        ({"entry__in_features": 0}, f"linears.{NAME}.in_features: 0: Input should be greater"),
        ({"entry__in_features": 2**31}, f"linears.{NAME}.in_features: 2147483648"),
        ({"entry__experts": "two"}, f"linears.{NAME}.experts: 'two'"),
        ({"entry__nnz": -1}, f"linears.{NAME}.nnz: -1"),
        ({"entry__nnz": 73}, "nnz 73 exceeds versions * in_features = 72"),
        ({"entry__versions": 7}, "versions 7 exceeds experts * out_features = 6"),
        ({"entry__tokens": [1, 2, 3]}, "tokens has 3 counts for 2 experts"),
        ({"entry__tokens": [1, -2]}, f"linears.{NAME}.tokens.1: -2"),
        ({"entry__dtype": "int4"}, f"linears.{NAME}.dtype: 'int4': Extra inputs"),
        ({"entry__bias": KeyError, "entry__nnz": None}, f"linears.{NAME}.nnz: None"),
    ],
)
def test_config_refuses(changes, message):
    with pytest.raises(WexpandError, match=re.escape(message)) as error:
        parse_config(sealed(**changes), "DIR/config.json")
    assert str(error.value).startswith("DIR/config.json: ") and "\n" not in str(error.value)


def test_config_accepts_itself_and_finds_edits():
    values = sealed()
    assert parse_config(values).model_dump(mode="json") == values
    for key, value in [("made_by", {"a": 1}), ("checksums", {}), ("digest", "0" * 64)]:
        with pytest.raises(WexpandError, match="changed after it was written"):
            parse_config(values | {key: value})


def test_keys_with_a_default_may_be_left_out():
    """By another writer, who follows the digest's rule for the keys that it does write."""
    left_out = {key: KeyError for key in ("made_by", "entry__tokens", "entry__bias")}
    values = sealed(**left_out)
    assert "made_by" not in values and values["linears"][NAME].keys().isdisjoint(("tokens", "bias"))
    entry = parse_config(values).linears[NAME]
    assert (entry.tokens, entry.bias) == ([], False)


def test_reading_other_directories(tmp_path):
    def attempt(text, match):
        if text is not None:
            (tmp_path / "config.json").write_text(text)
        with pytest.raises(WexpandError, match=match):
            checkpoint.read_config(tmp_path)

    attempt(None, "there is no such file")
    attempt("{", "not JSON")
    attempt("[" * 100_000, "not JSON")
    attempt("[]", "holds a list, not an object")
    attempt("{}", "quant_method is None, not 'wexpand'")
    attempt('{"quantization_config": 1}', "not a model that wexpand wrote")
    attempt('{"quantization_config": {"quant_method": "awq"}}', "quant_method is 'awq'")
    (tmp_path / "config.json").write_bytes(b"\xff\xfe")
    attempt(None, "not JSON")


# --- tensors


def test_check_linear_accepts_and_names():
    entry, tensors = linear()
    pool, router = check_linear(NAME, entry, tensors)
    assert pool.experts == 2 and router.bias.shape == (2,)
    sums = {f"{NAME}.{kind}": checkpoint.checksum(tensor) for kind, tensor in tensors.items()}
    check_linear(NAME, entry, tensors, sums)
    assert list(sums) == checkpoint.tensor_names(NAME, entry)


def nan_at_0(tensor):
    tensor = tensor.clone()
    tensor.view(-1)[0] = float("nan")
    return tensor


@pytest.mark.parametrize("kind", linear()[1])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: None, "missing; config.json promises ["),
        (lambda tensor: tensor[:-1], "should be ["),
        (lambda tensor: tensor[None], "should be ["),
        (lambda tensor: tensor.to(torch.int16), "dtype torch.int16 should be"),
        (lambda tensor: nan_at_0(tensor), "holds NaN or infinite values"),
        (lambda tensor: tensor ^ 3 if not tensor.is_floating_point() else tensor + 1, "damaged"),
    ],
)
def test_check_linear_refuses(kind, change, message):
    entry, tensors = linear()
    sums = {f"{NAME}.{kind}": checkpoint.checksum(tensor) for kind, tensor in tensors.items()}
    if "NaN" in message and not tensors[kind].is_floating_point():
        pytest.skip("integers have no NaN")
    tensors[kind] = change(tensors[kind])
    if "damaged" not in message:
        sums = None
    with pytest.raises(WexpandError, match=re.escape(message)) as error:
        check_linear(NAME, entry, tensors, sums, lambda tensor: f"file: {tensor}")
    assert str(error.value).startswith(f"file: {NAME}.{kind}: ")


def test_checksums_that_are_missing_are_refused():
    entry, tensors = linear()
    with pytest.raises(WexpandError, match="config.json has None"):
        check_linear(NAME, entry, tensors, {})


def test_finalize_refuses_what_could_not_be_read_again(tmp_path):
    entry, tensors = linear()
    tensors["router_weight"] = tensors["router_weight"].bfloat16()
    with pytest.raises(WexpandError, match="router_weight: dtype torch.bfloat16 should be"):
        write(tmp_path / "a", entry, tensors)
    values = json.loads((tmp_path / "a" / "config.json").read_text())
    assert "quantization_config" not in values


def test_files(tmp_path):
    with pytest.raises(WexpandError, match="holds no .safetensors file"):
        checkpoint.tensor_files(tmp_path)
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    save_file({"b": torch.ones(2)}, tmp_path / "consolidated.safetensors")
    assert set(checkpoint.tensor_files(tmp_path)) == {"a", "b"}
    assert [f.name for f in checkpoint.weight_files(tmp_path)] == ["model.safetensors"]
    (tmp_path / "model.safetensors").rename(tmp_path / "model-1.safetensors")
    index = tmp_path / checkpoint.INDEX
    checkpoint.write_json(index, {"weight_map": {"a": "model-1.safetensors"}})
    assert [f.name for f in checkpoint.weight_files(tmp_path)] == ["model-1.safetensors"]
    for bad in ({"a": "../model.safetensors"}, {"a": 1}, []):
        checkpoint.write_json(index, {"weight_map": bad})
        with pytest.raises(WexpandError, match="weight_map should give each tensor"):
            checkpoint.weight_files(tmp_path)
    save_file({"a": torch.ones(2)}, tmp_path / "model-2.safetensors")
    with pytest.raises(WexpandError, match="model-2.safetensors: holds a, which model-1"):
        checkpoint.tensor_files(tmp_path)
    (tmp_path / "model-2.safetensors").write_bytes(b"not one")
    with pytest.raises(WexpandError, match="not a complete safetensors file"):
        checkpoint.tensor_files(tmp_path)
