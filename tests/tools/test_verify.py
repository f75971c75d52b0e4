"""inspect counts right; verify finds every corruption tried; what it passes, loads."""

import json
import random
import shutil
import sys
from pathlib import Path

import pytest
import tiny
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from wexpand_plugin.errors import WexpandError
from wexpand_plugin.format.config import digest_of
from wexpand_plugin.format.model_dir import CHECKSUMS, INDEX, ModelDir, checksum
from wexpand_plugin.format.rowpool import RowPool
from wexpand_plugin.format.values import codec
from wexpand_plugin.hf.linear import RoutedLinear
from wexpand_plugin.hf.saving import wrap_save_pretrained
from wexpand_plugin.tools.inspect import inspect
from wexpand_plugin.tools.inspect_table import table
from wexpand_plugin.tools.pack import pack
from wexpand_plugin.tools.verify import verify


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """An expanded qwen2 (biases) in several files, one linear as int8 and one as int3."""
    path = tmp_path_factory.mktemp("verify") / "sound"
    model = tiny.expand(tiny.dense("qwen2"), match="")
    for name, how in (("0.mlp.up_proj", codec("int8", 8)), ("1.mlp.down_proj", codec("int3", 16))):
        module = model.get_submodule(f"model.layers.{name}")
        old = module.pool
        pool = RowPool.pack(old.rows(), old.row_map, codec=how)
        new = RoutedLinear.from_pool(
            pool, module.router, module.bias, group=module.group, tokens=module.tokens
        )
        model.set_submodule(f"model.layers.{name}", new)
    wrap_save_pretrained(model, {"test": "qwen2"})
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
    files = {n: h.file for n, h in ModelDir(path).headers.items()}
    name = rng.choice(sorted(n for n in files if n.endswith(kinds)))
    tensors = load_file(files[name])
    tensors[name] = change(tensors[name].clone()).contiguous()
    save_file(tensors, files[name], metadata={"format": "pt"})
    return name


def edit_config(path: Path, change, seal: bool = False) -> None:
    """Change config.json; `seal` makes digests right, as somebody might who wants to."""
    values = json.loads((path / "config.json").read_text())
    change(values)
    if seal:
        config = values["quantization_config"]
        config["digest"] = digest_of(config, "digest")
        edit_sums(path, lambda sums: sums.update(digest=config["digest"]))
    (path / "config.json").write_text(json.dumps(values))


def edit_sums(path: Path, change) -> None:
    values = json.loads((path / CHECKSUMS).read_text())
    change(values)
    (path / CHECKSUMS).write_text(json.dumps(values))


def repair(path: Path, *names: str) -> None:
    """Make the checksums of these tensors right again: content is wrong, not transport."""
    right = {name: checksum(tensor) for name, tensor in ModelDir(path).tensors(names)}
    edit_sums(path, lambda sums: sums["tensors"].update(right))


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
    files = {n: h.file for n, h in ModelDir(path).headers.items()}
    found = dict(ModelDir(path).tensors())
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

    return edit_tensors(path, rng, ("",), change)


def wrong_shape(path, rng):
    def change(tensor):
        return rng.choice([tensor.unsqueeze(0), tensor[:-1], torch.cat([tensor, tensor])])

    return edit_tensors(path, rng, ("",), change)


def not_finite(path, rng):
    """NaN or infinity, with its checksum made right again."""
    bad = rng.choice([float("nan"), float("inf"), float("-inf")])

    def change(tensor):
        tensor.view(-1)[rng.randrange(tensor.numel())] = bad
        return tensor

    floats = tuple(
        name for name, header in ModelDir(path).headers.items() if header.dtype.is_floating_point
    )
    repair(path, edit_tensors(path, rng, floats, change))


def map_out_of_range(path, rng):
    """A row map that asks for more versions than there are, with a right checksum."""

    def change(tensor):
        tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice([3, 17, 255])
        return tensor

    repair(path, edit_tensors(path, rng, (".row_map",), change))


def mask_of_another_count(path, rng):
    """A mask that keeps one weight more or less, with a right checksum."""

    def change(tensor):
        tensor.view(-1)[rng.randrange(tensor.numel())] ^= 1
        return tensor

    repair(path, edit_tensors(path, rng, (".weight_mask",), change))


def negative_scale(path, rng):
    """A scale below zero, with a right checksum."""

    def change(tensor):
        tensor.view(-1)[rng.randrange(tensor.numel())] = -1
        return tensor

    repair(path, edit_tensors(path, rng, (".weight_scale",), change))


def unequal_routers(path, rng):
    """A linear that routes otherwise than its input group, with a right checksum."""
    repair(path, edit_tensors(path, rng, ("up_proj.router_bias",), lambda tensor: tensor.flip(0)))


def drop_tensor(path, rng):
    files = {n: h.file for n, h in ModelDir(path).headers.items()}
    name = rng.choice(sorted(files))
    tensors = load_file(files[name])
    del tensors[name]
    save_file(tensors, files[name], metadata={"format": "pt"})


def add_tensor(path, rng):
    file = rng.choice(shards(path))
    save_file(load_file(file) | {f"extra.{rng.random()}": torch.zeros(3)}, file)


def edited_sizes(path, rng):
    """A size of config.json's groups, with or without a right digest."""

    key = rng.choice(["in_features", "experts", "out_features", "versions", "nnz", "elements",
                      "bias", "value_group", "values", "dtype", "tokens"])  # fmt: skip

    def change(values):
        group = rng.choice(values["quantization_config"]["groups"])
        entry = group if key in group else rng.choice(list(group["linears"].values()))
        match key:
            case "bias":
                entry[key] = not entry[key]
            case "values" | "dtype":
                names = ["float16", "bfloat16", "float64", "int4", "int8"]
                entry[key] = rng.choice([name for name in names if name != entry[key]])
            case "tokens":
                entry[key] = [*entry[key], 5]
            case _:
                entry[key] += rng.choice([-1, 2, 999])

    # a dense weight may have been of any float: nothing but the digest tells
    edit_config(path, change, seal=key != "dtype" and rng.random() < 0.5)


def edited_list(path, rng):
    """A linear or a checksum less, or under another name."""

    def rename(table):
        value = table.pop(name := rng.choice(sorted(table)))
        if not table or rng.random() < 0.5:
            table[name + "x"] = value

    if rng.random() < 0.5:
        edit_sums(path, lambda values: rename(values["tensors"]))
        return
    groups = json.loads((path / "config.json").read_text())["quantization_config"]["groups"]
    which = rng.randrange(len(groups))
    edit_config(
        path,
        lambda values: rename(values["quantization_config"]["groups"][which]["linears"]),
        seal=rng.random() < 0.5,
    )


def edited_sums(path, rng):
    """The file of checksums: gone, cut, another model's, or of another form."""
    match rng.randrange(4):
        case 0:
            (path / CHECKSUMS).unlink()
        case 1:
            text = (path / CHECKSUMS).read_text()
            (path / CHECKSUMS).write_text(text[: rng.randrange(len(text) - 2)])
        case 2:
            key = rng.choice(["digest", "model_digest"])
            edit_sums(path, lambda values: values.update({key: "0" * 64}))
        case 3:
            key = rng.choice(["digest", "model_digest", "tensors"])
            edit_sums(path, lambda values: values.update({key: rng.choice([None, 3, []])}))


def edited_schema(path, rng):
    def change(values):
        config = values["quantization_config"]
        key = rng.choice(["format_version", "quant_method", "digest", "unknown", "groups"])
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
    index = path / INDEX
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
    wrong_dtype, wrong_shape, not_finite, map_out_of_range, mask_of_another_count, negative_scale,
    unequal_routers, drop_tensor, add_tensor, edited_sizes, edited_list, edited_sums, edited_schema,
    edited_model, broken_config, broken_index,
]  # fmt: skip
# those that break the structure, which every loader checks; a loader compares no checksums, may
# meet edited settings on purpose, and needs no index entry of a file that is listed anyway
LOADERS_REFUSE = [
    truncate, remove_file, wrong_shape, map_out_of_range, mask_of_another_count, negative_scale,
    drop_tensor, edited_schema, broken_config,
]  # fmt: skip
# transformers' own errors come before ours where a file is gone or config.json is no model's
REFUSED = (WexpandError, OSError, ValueError, TypeError, StrictDataclassError)


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
    """9 seeds of each of 23 kinds: 207 corruptions."""
    for seed in range(9):
        path = corrupted(sound, tmp_path / str(seed), corrupt, seed)
        problems = verify(path)
        assert problems, f"{corrupt.__name__}, seed {seed}, was not found"
        assert all(problem and "\n" not in problem for problem in problems)
        shutil.rmtree(path)


@pytest.mark.parametrize("corrupt", LOADERS_REFUSE, ids=lambda function: function.__name__)
def test_loading_refuses_broken_structure(sound, tmp_path, corrupt):
    for seed in range(4):
        path = corrupted(sound, tmp_path / str(seed), corrupt, seed)
        with pytest.raises(REFUSED):
            AutoModelForCausalLM.from_pretrained(path)
        shutil.rmtree(path)


@pytest.mark.parametrize("corrupt", CORRUPTIONS, ids=lambda function: function.__name__)
def test_loading_never_breaks_otherwise(sound, tmp_path, corrupt):
    """It refuses with a sentence, or gives a model whose outputs are numbers."""
    path = corrupted(sound, tmp_path / "a", corrupt, 100)
    try:
        model = AutoModelForCausalLM.from_pretrained(path)
    except REFUSED:
        return
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    with torch.no_grad():
        assert model(tiny.tokens(1, 5)).logits.shape == (1, 5, tiny.VOCAB)


@pytest.mark.parametrize("corrupt", CORRUPTIONS, ids=lambda function: function.__name__)
def test_loading_with_verify_finds_what_verify_finds(sound, tmp_path, corrupt, monkeypatch):
    monkeypatch.setenv("WEXPAND_VERIFY", "1")
    path = corrupted(sound, tmp_path / "a", corrupt, 200)
    with pytest.raises(REFUSED):
        AutoModelForCausalLM.from_pretrained(path)


def meaning(content: bytes):
    """What a file says: JSON but for white space, of an index where tensors lie; or a safetensors
    file, but for white space in its header."""
    try:
        if content[:1] == b"{":
            values = json.loads(content)
            return values["weight_map"] if "weight_map" in values else values
        size = int.from_bytes(content[:8], "little")
        return size, json.loads(content[8 : 8 + size]), bytes(content[8 + size :])
    except ValueError:
        return object()


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_byte_of_any_file(sound, tmp_path_factory, data):
    """Whatever byte of a file changes: found, and never another exception."""
    path = tmp_path_factory.mktemp("byte") / "model"
    shutil.copytree(sound, path)
    named = [path / "config.json", path / CHECKSUMS, path / INDEX]
    file = data.draw(st.sampled_from([*named, *shards(path)]))
    content = bytearray(file.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    harmless = meaning(content) == meaning(file.read_bytes())
    file.write_bytes(content)
    if not verify(path):
        assert harmless
        AutoModelForCausalLM.from_pretrained(path)  # what verifies, loads
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
    """In files and tensors; each one's damage, and what that breaks."""
    path = tmp_path / "a"
    shutil.copytree(sound, path)
    names = [flip_mask(path, random.Random(1)), flip_map(path, random.Random(2))]
    files = {name: header.file for name, header in ModelDir(path).headers.items()}
    problems = verify(path)
    for name in names:
        assert any(p.startswith(f"{files[name]}: {name}: damaged: ") for p in problems)
    assert len(problems) <= 4 and all("damaged" in p or "rows keep" in p or "row versions" in p
                                      for p in problems)  # fmt: skip


def test_verify_of_other_directories(tmp_path):
    tiny.dense().save_pretrained(tmp_path / "dense")
    assert "not a model that wexpand wrote" in verify(tmp_path / "dense")[0]
    assert "there is no such file" in verify(tmp_path / "missing")[0]


# --- inspect


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
