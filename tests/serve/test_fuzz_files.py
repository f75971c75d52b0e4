"""Corrupted directories at vLLM's door: every one is refused, whatever tensor or file is damaged.

A tiny Llama in several files, of which only layer 0 is expanded: layer 1, norms, embeddings and
output head are tensors that vLLM loads by itself. As in an engine, but without one, the directory
is checked (`serve.files`), then vLLM's own functions choose and read the files, and vLLM's own
layers take the tensors of layer 0. One place is damaged at a time, with fixed seeds. Tried are

    every tensor    one bit flipped; a row less, in a sound file; missing; in the header another
                    dtype of the same size, which no checksum of bytes can see
    tensors that vLLM loads by itself, their checksum and the digest made right again: NaN or an
                    infinity
    every file      cut at a random place; missing; 1 byte changed, 8 times in the first kilobyte
                    (the header) and 4 times anywhere; renamed; a copy beside it; all of it zeros
    the index       each tensor listed in another file, in one that does not exist, or not at all;
                    cut at a random place; no object; a tensor too many
    pairs           two tensors of equal shape and dtype exchanged
    config.json     cut at a random place; any checksum or digest edited

A change that leaves the meaning of a file as it was (white space in a header) may serve. Settings
of config.json outside of `quantization_config` may be edited on purpose: `test_files`. The tensors
of one layer, damaged while their checksum is right, are in `test_fuzz`.
"""

import json
import random
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from builders import GATE_UP, PACKED, QKV
from safetensors.torch import load_file, save_file
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.model_loader.weight_utils import (
    filter_duplicate_safetensors_files,
    safetensors_weights_iterator,
)

from wexpand_plugin.errors import WexpandError
from wexpand_plugin.format import checkpoint
from wexpand_plugin.format.checkpoint import checksum
from wexpand_plugin.hf.saving import wrap_save_pretrained
from wexpand_plugin.serve.config import WexpandServeConfig
from wexpand_plugin.serve.files import check_directory

BLOCK = "model.layers.0"
OTHER_DTYPE = {"F32": "I32", "I32": "U32", "U8": "I8", "F16": "I16"}


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("fuzz") / "sound"
    model = tiny.expand(tiny.dense("llama"), match="layers.0")
    wrap_save_pretrained(model, {"test": "fuzz"})
    model.save_pretrained(path, max_shard_size="30kB")
    assert len(shards(path)) > 3
    return path


def serve(path: Path) -> None:
    """What an engine does with the directory until all its weights are loaded and checked."""
    values = checkpoint.read_json(path / "config.json").get("quantization_config")
    config = WexpandServeConfig.from_config(values)
    config.packed_modules_mapping = PACKED
    check_directory(path, config.checkpoint)
    attention, mlp = f"{BLOCK}.self_attn", f"{BLOCK}.mlp"
    settings = dict(bias=False, quant_config=config, disable_tp=True)
    layers = {
        f"{attention}.qkv_proj": QKVParallelLinear(
            tiny.HIDDEN, tiny.HIDDEN // 4, 4, 2, prefix=f"{attention}.qkv_proj", **settings
        ),
        f"{attention}.o_proj": RowParallelLinear(
            tiny.HIDDEN, tiny.HIDDEN, prefix=f"{attention}.o_proj", **settings
        ),
        f"{mlp}.gate_up_proj": MergedColumnParallelLinear(
            tiny.HIDDEN, [tiny.FFN] * 2, prefix=f"{mlp}.gate_up_proj", **settings
        ),
        f"{mlp}.down_proj": RowParallelLinear(
            tiny.FFN, tiny.HIDDEN, prefix=f"{mlp}.down_proj", **settings
        ),
    }
    files = filter_duplicate_safetensors_files(
        [str(file) for file in shards(path)], str(path), checkpoint.INDEX
    )
    for name, tensor in safetensors_weights_iterator(files, False):
        module, _, kind = name.rpartition(".")
        parent, _, last = module.rpartition(".")
        fused = next((f for f, parts in PACKED.items() if last in parts), last)
        layer = layers.get(f"{parent}.{fused}")
        if layer is not None:
            parameter = getattr(layer, kind)
            shard = (QKV | GATE_UP).get(last)
            parameter.weight_loader(parameter, tensor, *([] if shard is None else [shard]))
    for layer in layers.values():
        layer.quant_method.process_weights_after_loading(layer)


class Fuzz:
    """Copies of the sound directory, each damaged once and refused."""

    def __init__(self, sound: Path, folder: Path):
        self.sound, self.folder, self.tried = sound, folder, 0

    def refuse(self, damage, *arguments, names: tuple[str, ...] = ()) -> None:
        """`damage(path, *arguments)` on a fresh copy; the error must hold one of `names`."""
        self.tried += 1
        path = Path(shutil.copytree(self.sound, self.folder / str(self.tried)))
        label = f"{damage.__name__} {arguments}"
        if damage(path, *arguments) is None:
            try:
                serve(path)
            except WexpandError as error:
                assert any(name in str(error) for name in names or ("",)), f"{label}: {error}"
            else:
                pytest.fail(f"{label}: was served")
        shutil.rmtree(path)


@pytest.fixture
def fuzz(sound, tmp_path) -> Fuzz:
    return Fuzz(sound, tmp_path)


def shards(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors"))


def tensors(path: Path) -> list[str]:
    return sorted(checkpoint.tensor_files(path))


def change(path: Path, name: str, new) -> None:
    """Replace a tensor by new(tensor); None removes it."""
    file = checkpoint.tensor_files(path)[name]
    found = load_file(file)
    value = new(found.pop(name))
    save_file(
        found if value is None else found | {name: value.contiguous()},
        file, metadata={"format": "pt"},
    )  # fmt: skip


def test_the_undamaged_directory_is_served(sound):
    serve(sound)


# one tensor


def flip(path, name):
    def flipped(tensor):
        data = tensor.view(-1).view(torch.uint8)
        rng = random.Random(name)
        data[rng.randrange(data.numel())] ^= 1 << rng.randrange(8)
        return tensor

    change(path, name, flipped)


def shorten(path, name):
    change(path, name, lambda tensor: tensor[:-1])


def lose(path, name):
    change(path, name, lambda tensor: None)


def retype(path, name):
    file = checkpoint.tensor_files(path)[name]
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header[name]["dtype"] = OTHER_DTYPE[header[name]["dtype"]]
    written = json.dumps(header, separators=(",", ":")).encode().ljust(size)
    assert len(written) == size
    file.write_bytes(data[:8] + written + data[8 + size :])


@pytest.mark.parametrize("damage", [flip, shorten, lose, retype], ids=lambda f: f.__name__)
def test_any_tensor(fuzz, damage):
    for name in tensors(fuzz.sound):
        fuzz.refuse(damage, name, names=(name,))
    assert fuzz.tried > 45


def unfinite(path, name):
    rng = random.Random(name)

    def bad(tensor):
        tensor.view(-1)[rng.randrange(tensor.numel())] = float(rng.choice(["nan", "inf", "-inf"]))
        return tensor

    change(path, name, bad)
    value = load_file(checkpoint.tensor_files(path)[name])[name]
    config = checkpoint.read_config(path)
    sums = config.checksums | {name: checksum(value)}
    sealed = config.model_copy(update={"checksums": sums}).seal()
    values = checkpoint.read_json(path / "config.json")
    values["quantization_config"] = sealed.model_dump(mode="json")
    checkpoint.write_json(path / "config.json", values)


def test_values_that_are_not_finite(fuzz):
    config = checkpoint.read_config(fuzz.sound)
    for name in checkpoint.other_tensors(checkpoint.tensor_files(fuzz.sound), config):
        fuzz.refuse(unfinite, name, names=(f"{name}: holds NaN or infinite",))
    assert fuzz.tried == 14


def exchange(path, name, other):
    files = checkpoint.tensor_files(path)
    values = {n: load_file(files[n])[n] for n in (name, other)}
    change(path, name, lambda tensor: values[other])
    change(path, other, lambda tensor: values[name])


def test_exchanged_tensors(fuzz):
    found = dict(checkpoint.tensors_of(checkpoint.tensor_files(fuzz.sound)))
    pairs = [
        (a, b) for a in found for b in found
        if a < b and found[a].shape == found[b].shape and found[a].dtype == found[b].dtype
        and not torch.equal(found[a], found[b])
    ]  # fmt: skip
    for pair in random.Random(0).sample(pairs, 20):
        fuzz.refuse(exchange, *pair, names=pair)


# one file


def cut(path, name, seed):
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[: random.Random(seed).randrange(len(content) - 2)])


def remove(path, name):
    (path / name).unlink()


def rename(path, name):
    (path / name).rename(path / f"other-{name}")


def double(path, name):
    shutil.copyfile(path / name, path / f"other-{name}")


def zero(path, name):
    (path / name).write_bytes(bytes((path / name).stat().st_size))


def meaning(content: bytes):
    """A safetensors file's content but for white space in its header."""
    size = int.from_bytes(content[:8], "little")
    try:
        return size, json.loads(content[8 : 8 + size]), content[8 + size :]
    except ValueError:
        return None


def change_byte(path, name, seed, end):
    """Returns True if the file means the same as before."""
    rng = random.Random(f"{name} {seed}")
    old = (path / name).read_bytes()
    data = bytearray(old)
    data[rng.randrange(min(end, len(data)))] ^= rng.randrange(1, 256)
    (path / name).write_bytes(data)
    return True if meaning(bytes(data)) == meaning(old) else None


def test_any_file(fuzz):
    for file in shards(fuzz.sound):
        for damage in (remove, rename, double, zero):
            fuzz.refuse(damage, file.name, names=(file.name, "other-"))
        for seed in range(3):
            fuzz.refuse(cut, file.name, seed, names=(f"{file.name}: not a complete",))
        for seed in range(8):
            fuzz.refuse(change_byte, file.name, seed, 1024)
        for seed in range(4):
            fuzz.refuse(change_byte, file.name, seed, 10**9)
    assert fuzz.tried > 60


# the index


def list_elsewhere(path, name, file):
    """The tensor is listed in `file`, or nowhere (None)."""
    values = checkpoint.read_json(path / checkpoint.INDEX)
    values["weight_map"].pop(name, None)
    if file is not None:
        values["weight_map"][name] = file
    checkpoint.write_json(path / checkpoint.INDEX, values)


def replace_index(path, text):
    (path / checkpoint.INDEX).write_text(text)


def test_the_index(fuzz):
    right = checkpoint.read_json(fuzz.sound / checkpoint.INDEX)["weight_map"]
    for name, file in right.items():
        others = [f.name for f in shards(fuzz.sound) if f.name != file]
        for wrong in (None, "absent.safetensors", random.Random(name).choice(others)):
            fuzz.refuse(list_elsewhere, name, wrong, names=(f"{name}: listed in {wrong}",))
    fuzz.refuse(list_elsewhere, "extra.weight", "absent.safetensors", names=("extra.weight",))
    for text in ("", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'):
        fuzz.refuse(replace_index, text, names=(checkpoint.INDEX,))
    for seed in range(5):
        fuzz.refuse(cut, checkpoint.INDEX, seed, names=(checkpoint.INDEX,))
    fuzz.refuse(remove, checkpoint.INDEX, names=("is in no",))


# config.json


def edit_sum(path, name, seed):
    values = checkpoint.read_json(path / "config.json")
    quantization = values["quantization_config"]
    table = quantization["checksums"] if name in quantization["checksums"] else quantization
    old = table[name]
    place = random.Random(seed).randrange(len(old))
    new = "0" if old[place] != "0" else "1"
    table[name] = old[:place] + new + old[place + 1 :]
    checkpoint.write_json(path / "config.json", values)


def test_config(fuzz):
    for seed in range(10):
        fuzz.refuse(cut, "config.json", seed, names=("config.json",))
    for number, name in enumerate([*tensors(fuzz.sound), "digest", "model_digest"]):
        fuzz.refuse(edit_sum, name, number, names=("quantization_config was changed",))
