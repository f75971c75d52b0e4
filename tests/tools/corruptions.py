"""Corruptions: each changes a copy of a sound checkpoint, somewhere at random."""

import json
import random
import shutil
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file

from wexpand_plugin.errors import WexpandError
from wexpand_plugin.format.config import digest_of
from wexpand_plugin.format.model_dir import CHECKSUMS, INDEX, ModelDir, checksum


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
