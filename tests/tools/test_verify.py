"""inspect counts right; verify finds every corruption tried, and loading refuses it too."""

import json
import random
import shutil
import sys
import warnings
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import tiny  # noqa: E402
import torch  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

import wexpand_plugin  # noqa: E402, F401
from wexpand_plugin.errors import WexpandError  # noqa: E402
from wexpand_plugin.format import checkpoint  # noqa: E402
from wexpand_plugin.tools.inspect import inspect  # noqa: E402
from wexpand_plugin.tools.pack import pack  # noqa: E402
from wexpand_plugin.tools.verify import verify  # noqa: E402


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """An expanded qwen2 (biases) in several files."""
    path = tmp_path_factory.mktemp("verify") / "sound"
    model = tiny.expanded(path.with_name("one"), "qwen2", match="")
    model.save_pretrained(path, max_shard_size="60kB")
    return path


def test_without_transformers_a_skipped_check_is_said(sound, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert verify(sound) == []
    assert f"{sound}: not checked: whether it fits its model class" in caplog.text


# --- corruptions: each changes a copy of a sound checkpoint


def shards(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors"))


def edit_tensors(path: Path, rng: random.Random, kinds: tuple[str, ...], change) -> str:
    """Replace one tensor whose name ends in one of `kinds` by change(tensor)."""
    files = checkpoint.tensor_files(path)
    name = rng.choice(sorted(n for n in files if n.endswith(kinds)))
    tensors = load_file(files[name])
    tensors[name] = change(tensors[name].clone()).contiguous()
    save_file(tensors, files[name], metadata={"format": "pt"})
    return name


def edit_config(path: Path, change, seal: bool = False) -> None:
    values = json.loads((path / "config.json").read_text())
    change(values)
    if seal:
        # without validation, as somebody might who wants to
        config = checkpoint.WexpandConfig.model_construct(**values["quantization_config"])
        with warnings.catch_warnings(action="ignore"):
            values["quantization_config"] = config.seal().model_dump(mode="json")
    (path / "config.json").write_text(json.dumps(values))


def flip_bit(path, rng, kinds):
    def change(tensor):
        data = tensor.view(-1).view(torch.uint8)
        data[rng.randrange(data.numel())] ^= 1 << rng.randrange(8)
        return tensor

    return edit_tensors(path, rng, kinds, change)


def flip_mask(path, rng):
    return flip_bit(path, rng, (".weight_mask",))


def flip_map(path, rng):
    return flip_bit(path, rng, (".row_map",))


def flip_any(path, rng):
    return flip_bit(path, rng, ("",))


def flip_file_byte(path, rng):
    file = rng.choice(shards(path))
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def truncate(path, rng):
    file = rng.choice(shards(path))
    file.write_bytes(file.read_bytes()[: rng.randrange(file.stat().st_size)])


def remove_file(path, rng):
    rng.choice([*shards(path), path / "config.json"]).unlink()


def swap_tensors(path, rng):
    """Two tensors of equal shape and dtype change places."""
    files = checkpoint.tensor_files(path)
    found = dict(checkpoint.tensors_of(files))
    pairs = [
        (a, b)
        for a in found for b in found
        if a < b and found[a].shape == found[b].shape and found[a].dtype == found[b].dtype
        and not torch.equal(found[a], found[b])
    ]  # fmt: skip
    a, b = rng.choice(pairs)
    for name, value in ((a, found[b]), (b, found[a])):
        tensors = load_file(files[name])
        tensors[name] = value.clone()
        save_file(tensors, files[name], metadata={"format": "pt"})


def wrong_dtype(path, rng):
    def change(tensor):
        dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8)
        return tensor.to(rng.choice([d for d in dtypes if d != tensor.dtype]))

    return edit_tensors(path, rng, (".weight", "_mask", "_map", "_bias", ".bias"), change)


def wrong_shape(path, rng):
    def change(tensor):
        return rng.choice([tensor.unsqueeze(0), tensor[:-1], torch.cat([tensor, tensor])])

    return edit_tensors(path, rng, ("",), change)


def not_finite(path, rng):
    """NaN or infinity whose checksum is made right again: content, not only transport."""
    bad = rng.choice([float("nan"), float("inf"), float("-inf")])

    def change(tensor):
        tensor.view(-1)[rng.randrange(tensor.numel())] = bad
        return tensor

    name = edit_tensors(path, rng, ("weight", "bias"), change)
    right = checkpoint.checksum(dict(checkpoint.tensors_of(checkpoint.tensor_files(path)))[name])

    def repair(values):
        values["quantization_config"]["checksums"][name] = right

    edit_config(path, repair, seal=True)


def map_out_of_range(path, rng):
    """A row map that points past the pool, with its checksum made right again."""
    bad = rng.choice([-1, 2**31 - 1, -(2**31), 10_000])

    def change(tensor):
        tensor.view(-1)[rng.randrange(tensor.numel())] = bad
        return tensor

    name = edit_tensors(path, rng, (".row_map",), change)
    right = checkpoint.checksum(dict(checkpoint.tensors_of(checkpoint.tensor_files(path)))[name])

    def repair(values):
        values["quantization_config"]["checksums"][name] = right

    edit_config(path, repair, seal=True)


def drop_tensor(path, rng):
    files = checkpoint.tensor_files(path)
    name = rng.choice(sorted(files))
    tensors = load_file(files[name])
    del tensors[name]
    save_file(tensors, files[name], metadata={"format": "pt"})


def add_tensor(path, rng):
    file = rng.choice(shards(path))
    save_file(load_file(file) | {f"extra.{rng.random()}": torch.zeros(3)}, file)


def edited_sizes(path, rng):
    """A size of config.json's linears, with or without a right digest."""

    def change(values):
        linears = values["quantization_config"]["linears"]
        entry = linears[rng.choice(sorted(linears))]
        key = rng.choice(["in_features", "out_features", "experts", "versions", "nnz", "bias"])
        entry[key] = (not entry[key]) if key == "bias" else entry[key] + rng.choice([-1, 2, 999])

    edit_config(path, change, seal=rng.random() < 0.5)


def edited_list(path, rng):
    """A linear or a checksum less, or under another name."""

    def change(values):
        table = values["quantization_config"][rng.choice(["linears", "checksums"])]
        value = table.pop(name := rng.choice(sorted(table)))
        if rng.random() < 0.5:
            table[name + "x"] = value

    edit_config(path, change, seal=rng.random() < 0.5)


def edited_schema(path, rng):
    def change(values):
        config = values["quantization_config"]
        key = rng.choice(["format_version", "quant_method", "digest", "unknown", "linears"])
        config[key] = rng.choice([None, 2, "other", [], {"a": 1}])

    edit_config(path, change)


def edited_model(path, rng):
    """Settings of the model itself."""

    def change(values):
        key = rng.choice(["hidden_size", "num_hidden_layers", "vocab_size", "rms_norm_eps"])
        values[key] = values[key] * 2

    edit_config(path, change)


def broken_config(path, rng):
    text = (path / "config.json").read_text()
    (path / "config.json").write_text(text[: rng.randrange(len(text) - 2)])


def broken_index(path, rng):
    index = path / checkpoint.INDEX
    values = json.loads(index.read_text())
    table = values["weight_map"]
    name = rng.choice(sorted(table))
    if rng.random() < 0.5:
        del table[name]
    else:
        table[name] = rng.choice([f.name for f in shards(path) if f.name != table[name]])
    index.write_text(json.dumps(values))


CORRUPTIONS = [
    flip_mask, flip_map, flip_any, flip_file_byte, truncate, remove_file, swap_tensors,
    wrong_dtype, wrong_shape, not_finite, map_out_of_range, drop_tensor, add_tensor, edited_sizes,
    edited_list, edited_schema, edited_model, broken_config, broken_index,
]  # fmt: skip
# what no loader can or should see: settings may be edited on purpose, an index that misses a tensor
# of a listed file changes nothing for a reader
ONLY_VERIFY = {edited_model, broken_index}


def corrupted(sound: Path, path: Path, corrupt, seed: int) -> Path:
    shutil.copytree(sound, path)
    corrupt(path, random.Random(seed))
    return path


def test_sound(sound, tmp_path):
    assert verify(sound) == []
    tiny.prune(tiny.dense("llama", tie_word_embeddings=True)).save_pretrained(tmp_path / "dense")
    pack(tmp_path / "dense", tmp_path / "packed", quiet=True)
    assert verify(tmp_path / "packed") == []


@pytest.mark.parametrize("corrupt", CORRUPTIONS, ids=lambda function: function.__name__)
def test_verify_finds_corruptions(sound, tmp_path, corrupt):
    """11 seeds of each of 19 kinds: 209 corruptions; loading refuses the first of each kind."""
    for seed in range(11):
        path = corrupted(sound, tmp_path / str(seed), corrupt, seed)
        problems = verify(path)
        assert problems, f"{corrupt.__name__}, seed {seed}, was not found"
        assert all(problem and "\n" not in problem for problem in problems)
        if seed == 0 and corrupt not in ONLY_VERIFY:
            # the file system's and transformers' own errors come before ours where a file is gone
            with pytest.raises((WexpandError, OSError, ValueError)):
                AutoModelForCausalLM.from_pretrained(path)
        shutil.rmtree(path)


def meaning(content: bytes):
    """A file's content but for white space in its JSON: config.json, or a safetensors file."""
    try:
        if content[:1] == b"{":
            return json.loads(content)
        size = int.from_bytes(content[:8], "little")
        return size, json.loads(content[8 : 8 + size]), bytes(content[8 + size :])
    except ValueError:
        return object()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_byte_of_any_file(sound, tmp_path_factory, data):
    """Whatever byte of config.json or a tensor file changes: found, and never another exception."""
    path = tmp_path_factory.mktemp("byte") / "model"
    shutil.copytree(sound, path)
    file = data.draw(st.sampled_from([path / "config.json", *shards(path)]))
    content = bytearray(file.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    harmless = meaning(content) == meaning(file.read_bytes())
    file.write_bytes(content)
    assert verify(path) or harmless
    shutil.rmtree(path)


def test_loading_refuses_more_layers_than_there_are(sound, tmp_path):
    """transformers alone would only warn, and start them with random weights."""
    path = corrupted(sound, tmp_path / "a", lambda path, rng: None, 0)

    def more(values):
        values |= {"num_hidden_layers": 3}
        values.pop("layer_types", None)

    edit_config(path, more)
    with pytest.raises(WexpandError, match="layers.2.*missing"):
        AutoModelForCausalLM.from_pretrained(path)


def test_verify_names_each_problem(sound, tmp_path):
    path = corrupted(sound, tmp_path / "a", flip_mask, 1)
    flip_map(path, random.Random(2))
    problems = verify(path)
    assert len(problems) == 2
    assert any("weight_mask: damaged" in problem for problem in problems)
    assert any("row_map: damaged" in problem for problem in problems)
    assert all(".safetensors: model.layers" in problem for problem in problems)


def test_verify_of_other_directories(tmp_path):
    tiny.dense().save_pretrained(tmp_path / "dense")
    assert "not a model that wexpand wrote" in verify(tmp_path / "dense")[0]
    assert "there is no such file" in verify(tmp_path / "missing")[0]


# --- inspect


def test_inspect_counts_what_is_on_disk(sound):
    found = inspect(sound)
    assert found.ours and len(found.linears) == 14
    files = checkpoint.tensor_files(sound)
    names = {linear.name for linear in found.linears}
    on_disk = {n: t for n, t in checkpoint.tensors_of(files) if n.rpartition(".")[0] in names}
    assert found.linear_bytes == sum(tensor.nbytes for tensor in on_disk.values())
    assert found.disk_bytes == sum(file.stat().st_size for file in shards(sound))
    assert found.sparsity == pytest.approx(0.5, abs=0.03)
    linear = next(linear for linear in found.linears if linear.name.endswith("0.mlp.up_proj"))
    assert linear.dense_bytes == tiny.HIDDEN * tiny.FFN * 4
    assert linear.tokens == [10, 11, 12] and 0.99 < linear.balance < 1
    assert found.as_dict()["bytes"]["row_map"] == sum(
        t.nbytes for n, t in on_disk.items() if n.endswith("row_map")
    )


def test_bytes_per_token_against_the_rows_themselves(sound):
    """The pool's rows of each expert, weighted by tokens; a group's router once."""
    found = {linear.name: linear for linear in inspect(sound).linears}
    model = AutoModelForCausalLM.from_pretrained(sound)
    for name, routers in (("mlp.gate_proj", 1), ("mlp.up_proj", 0), ("self_attn.q_proj", 1)):
        module = model.get_submodule(f"model.layers.0.{name}")
        total = 0.0
        for expert, tokens in enumerate(module.tokens):
            kept = (module.pool.expert(expert) != 0).sum().item()
            mask = module.out_features * ((module.in_features + 7) // 8)
            total += tokens / sum(module.tokens) * (kept * 4 + mask + module.out_features * 4)
        router = module.experts * (2 * module.in_features + 4) * routers  # float16 in the file
        bias = module.bias.nbytes if module.bias is not None else 0
        assert found[f"model.layers.0.{name}"].bytes_per_token == pytest.approx(
            total + router + bias
        )


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
