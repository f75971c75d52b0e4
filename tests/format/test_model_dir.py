"""Opening model directories: ours, dense ones, other tools', and those that are none."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from samples import NAME, linear, same_bits, write

from wexpand_plugin.errors import WexpandError
from wexpand_plugin.format.model_dir import INDEX, Header, ModelDir, checksum
from wexpand_plugin.format.values import codec
from wexpand_plugin.format.writer import write_json


@pytest.mark.parametrize(
    "how", [None, codec("int8", 8), codec("int4", 8), codec("int3", 8)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("experts", [1, 2])
def test_written_and_read(tmp_path, experts, bias, dtype, how):
    entry, tensors = linear(experts, bias, dtype, how)
    written = write(tmp_path / "a", {NAME: (entry, tensors)}, other=torch.arange(4.0))
    model = ModelDir(tmp_path / "a")
    assert model.ours and model.config.linears == {NAME: entry}
    assert model.config == written.model_copy(
        update={"made_by": {"by": "a test", "path": ["a", 1]}}
    )
    assert model.config.group_of(NAME).tokens == list(range(experts))
    assert model.others() == ["other"] and model.headers.keys() == dict(model.tensors()).keys()
    assert all(same_bits(t, tensors[kind]) for kind, t in model.kinds(NAME).items())
    pool, router, read_bias, *_ = model.linear(NAME)
    assert same_bits(pool.values, tensors["weight"])
    assert torch.equal(pool.mask, tensors["weight_mask"]) and pool.codec == entry.codec
    assert (router is None) == (pool.row_map is None) == (experts == 1)
    assert (read_bias is None) == (not bias)
    if router is not None:
        assert torch.equal(pool.row_map, tensors["row_map"])
        assert torch.equal(router.weight, tensors["router_weight"])


def test_headers_and_single_reads(tmp_path):
    entry, tensors = linear()
    write(tmp_path / "a", {NAME: (entry, tensors)}, table=torch.randn(5, 3).half())
    model, file = ModelDir(tmp_path / "a"), tmp_path / "a" / "model.safetensors"
    assert model.headers["table"] == Header(file, (5, 3), torch.float16)
    assert model.headers["table"].nbytes == 30 and model.disk_bytes == file.stat().st_size
    assert model.header(NAME, "weight").shape == (entry.elements,)
    table = load_file(file)["table"]
    assert same_bits(model.read("table"), table)
    assert same_bits(model.first_row("table"), table[:1].float())
    assert same_bits(model.first_row(f"{NAME}.bias"), tensors["bias"])
    assert [name for name, _ in model.tensors(["table", f"{NAME}.bias"])] == [
        f"{NAME}.bias",
        "table",
    ]


def test_errors_of_a_linear_name_the_file(tmp_path):
    entry, tensors = linear()
    write(tmp_path / "a", {NAME: (entry, tensors)})
    file = tmp_path / "a" / "model.safetensors"
    good = load_file(file)
    save_file(good | {f"{NAME}.row_map": good[f"{NAME}.row_map"][:1]}, file)
    right = f"{file}: {NAME}.row_map: shape [1, 3] should be [2, 3] by config.json"
    for read in (lambda m: m.linear(NAME), lambda m: m.header(NAME, "row_map")):
        with pytest.raises(WexpandError, match=re.escape(right)) as error:
            read(ModelDir(tmp_path / "a"))
        assert error.value.tensor == f"{NAME}.row_map"
    save_file({n: t for n, t in good.items() if n != f"{NAME}.row_map"}, file)
    for read in (lambda m: m.linear(NAME), lambda m: m.header(NAME, "row_map")):
        with pytest.raises(WexpandError, match=f"^{NAME}.row_map: missing; config.json promises"):
            read(ModelDir(tmp_path / "a"))


def test_config_json_of_other_directories(tmp_path):
    def attempt(text, match):
        if text is not None:
            (tmp_path / "config.json").write_text(text)
        with pytest.raises(WexpandError, match=match):
            assert ModelDir(tmp_path).config

    attempt(None, "there is no such file")
    attempt("{", "not JSON")
    attempt("[" * 100_000, "not JSON")
    attempt("[]", "holds a list, not an object")
    attempt("{}", "quant_method is None, not 'wexpand'")
    attempt('{"quantization_config": 1}', "not a model that wexpand wrote")
    attempt('{"quantization_config": {"quant_method": "awq"}}', "quant_method is 'awq'")
    (tmp_path / "config.json").write_bytes(b"\xff\xfe")
    attempt(None, "not JSON")
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").mkdir()
    attempt(None, "cannot be read")


@pytest.mark.parametrize(
    ("config", "method"),
    [({}, None), ({"quantization_config": None}, None), ({"quantization_config": {}}, None),
     ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
     ({"quantization_config": {"bits": 4}}, "None"), ({"quantization_config": "x"}, "x")],
)  # fmt: skip
def test_who_compressed_it(tmp_path, config, method):
    write_json(tmp_path / "config.json", config)
    assert ModelDir(tmp_path).quant_method == method and not ModelDir(tmp_path).ours


def names(path: Path) -> set[str]:
    return set(ModelDir(path).headers)


def test_which_files_count(tmp_path):
    """Of a dense model those that transformers reads; of ours all, so that none is overlooked."""
    with pytest.raises(WexpandError, match="holds no .safetensors file"):
        names(tmp_path)
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    save_file({"b": torch.ones(2)}, tmp_path / "consolidated.safetensors")
    assert names(tmp_path) == {"a"}
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "wexpand"}}')
    assert names(tmp_path) == {"a", "b"}
    assert set(ModelDir(tmp_path, [tmp_path / "consolidated.safetensors"]).headers) == {"b"}
    (tmp_path / "config.json").unlink()
    (tmp_path / "model.safetensors").rename(tmp_path / "model-1.safetensors")
    assert names(tmp_path) == {"a", "b"}
    index = tmp_path / INDEX
    write_json(index, {"weight_map": {"a": "model-1.safetensors"}})
    assert names(tmp_path) == {"a"}
    for bad in ({"a": "../model.safetensors"}, {"a": 1}, []):
        write_json(index, {"weight_map": bad})
        with pytest.raises(WexpandError, match="weight_map should give each tensor"):
            names(tmp_path)


def test_files_that_are_broken_or_overlap(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "model-1.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / "model-2.safetensors")
    with pytest.raises(WexpandError, match="model-2.safetensors: holds a, which model-1") as error:
        names(tmp_path)
    assert error.value.tensor == "a"
    (tmp_path / "model-2.safetensors").write_bytes(b"not one")
    with pytest.raises(WexpandError, match="not a complete safetensors file"):
        names(tmp_path)


def test_a_dtype_that_no_model_of_ours_has(tmp_path):
    save_file({"a": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    header = ModelDir(tmp_path).headers["a"]
    assert header.dtype is None and header.nbytes == 0


def test_checksum_is_of_the_bytes():
    assert checksum(torch.tensor([1, 2, 3], dtype=torch.uint8)) == "55bc801d"  # zlib.crc32
    assert checksum(torch.ones(2, 3).t()) == checksum(torch.ones(3, 2))
    assert checksum(torch.zeros(0)) == "00000000"
    assert checksum(torch.tensor([0.0])) != checksum(torch.tensor([-0.0]))


def test_settings_are_kept_as_they_are(tmp_path):
    entry, tensors = linear()
    write(tmp_path / "a", {NAME: (entry, tensors)})
    values = ModelDir(tmp_path / "a").config_json
    assert (values["model_type"], values["hidden_size"]) == ("any", 12)
    assert json.loads((tmp_path / "a" / "config.json").read_text()) == values
