"""Writing: whole or not at all, whatever interrupts it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from samples import NAME, linear, same_bits, write

from wexpand_plugin.errors import WexpandError
from wexpand_plugin.format import writer
from wexpand_plugin.format.checks import check_linear
from wexpand_plugin.format.config import GroupEntry
from wexpand_plugin.format.directories import partial_directory, require_empty
from wexpand_plugin.format.linear import StoredLinear
from wexpand_plugin.format.model_dir import CHECKSUMS, INDEX, ModelDir, checksum
from wexpand_plugin.format.problems import problems
from wexpand_plugin.format.rowpool import RowPool
from wexpand_plugin.format.values import codec
from wexpand_plugin.format.writer import (
    TensorWriter,
    atomic,
    copy_others,
    seal,
    write_json,
)


def entries(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


# --- one file


def test_atomic_replaces_at_the_end(tmp_path):
    file = tmp_path / "a.json"
    file.write_text("old")
    with atomic(file) as partial:
        partial.write_text("new")
        assert file.read_text() == "old" and partial.parent == tmp_path
    assert file.read_text() == "new" and entries(tmp_path) == ["a.json"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_atomic_leaves_nothing_on_errors(tmp_path, error):
    with pytest.raises(error), atomic(tmp_path / "new") as partial:
        partial.write_text("half")
        raise error
    assert entries(tmp_path) == []
    (tmp_path / "old").write_text("old")
    with pytest.raises(error), atomic(tmp_path / "old"):
        raise error  # before anything was written
    assert entries(tmp_path) == ["old"] and (tmp_path / "old").read_text() == "old"


def test_write_json(tmp_path):
    write_json(tmp_path / "a.json", {"name": "Zürich", "list": [1]})
    assert json.loads((tmp_path / "a.json").read_text("utf8")) == {"name": "Zürich", "list": [1]}
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"bad": object()})
    assert json.loads((tmp_path / "a.json").read_text("utf8"))["list"] == [1]
    assert entries(tmp_path) == ["a.json"]


# --- tensors


@pytest.mark.parametrize(("limit", "files"), [(1 << 20, 1), (200, 3), (1, 6)])
def test_tensor_writer_fills_files_up_to_a_limit(tmp_path, limit, files):
    """A tensor larger than the limit has a file of its own."""
    tensors = {f"t{i}": torch.full((20,), float(i)) for i in range(6)}
    made = TensorWriter(tmp_path, limit)
    for name, tensor in tensors.items():
        made.add(name, tensor)
    made.close()
    found = sorted(tmp_path.glob("*.safetensors"))
    assert len(found) == files
    if files == 1:
        assert entries(tmp_path) == ["model.safetensors"]
    else:
        assert found[0].name == f"model-00001-of-{files:05d}.safetensors"
        index = json.loads((tmp_path / INDEX).read_text())
        assert index["metadata"] == {"total_size": 6 * 80}
        assert index["weight_map"] == {n: f.name for f in found for n in load_file(f)}
    read = {n: t for f in found for n, t in load_file(f).items()}
    assert read.keys() == tensors.keys() == made.checksums.keys()
    assert all(
        same_bits(read[n], t) and made.checksums[n] == checksum(t) for n, t in tensors.items()
    )


def test_add_linear_writes_what_the_entry_promises(tmp_path):
    entry, tensors = linear(how=codec("int4", 8), clusters=5, parents=2, cluster_bias=True)
    made = TensorWriter(tmp_path)
    made.add_linear(NAME, check_linear(NAME, entry, tensors))
    made.add("strided", torch.arange(6.0).view(2, 3).t())
    made.close()
    read = load_file(tmp_path / "model.safetensors")
    assert torch.equal(read.pop("strided"), torch.arange(6.0).view(2, 3).t())
    assert {n.removeprefix(f"{NAME}.") for n in read} == entry.shapes().keys()
    assert all(same_bits(tensor, tensors[n.removeprefix(f"{NAME}.")]) for n, tensor in read.items())
    one = TensorWriter(tmp_path)
    one.add_linear(NAME, StoredLinear(RowPool.pack(torch.ones(3, 12))))
    assert list(one.checksums) == [f"{NAME}.weight"]


# --- seal


def test_seal_reads_the_checksums_that_a_writer_knows(tmp_path):
    """With or without them the same files come out."""
    entry, tensors = linear()
    write(tmp_path / "a", {NAME: (entry, tensors)}, other=torch.ones(3))
    before = {name: (tmp_path / "a" / name).read_bytes() for name in ("config.json", CHECKSUMS)}
    sums = json.loads(before[CHECKSUMS])["tensors"]
    assert sums == {name: checksum(t) for name, t in ModelDir(tmp_path / "a").tensors()}
    group = ModelDir(tmp_path / "a").config.groups[0]
    config = seal(tmp_path / "a", [group], {"by": "a test", "path": ("a", 1)}, checksums=sums)
    assert config.digest == json.loads(before[CHECKSUMS])["digest"]
    for name, content in before.items():
        assert (tmp_path / "a" / name).read_bytes() == content
    assert "checksums" not in json.loads(before["config.json"])["quantization_config"]


def test_seal_takes_the_place_of_an_older_config(tmp_path):
    entry, tensors = linear()
    path = tmp_path / "a"
    write(path, {NAME: (entry, tensors)})
    values = json.loads((path / "config.json").read_text())
    write_json(path / "config.json", values | {"sparsity_config": {"format": "dense"}})
    seal(path, ModelDir(path).config.groups, {"made": "again"})
    assert "sparsity_config" not in json.loads((path / "config.json").read_text())
    assert ModelDir(path).config.made_by == {"made": "again"}
    assert list(problems(ModelDir(path))) == []


def test_seal_refuses_what_could_not_be_read_again(tmp_path):
    entry, tensors = linear()
    tensors["router_weight"] = tensors["router_weight"].bfloat16()
    with pytest.raises(WexpandError, match="router_weight: dtype torch.bfloat16 should be"):
        write(tmp_path / "a", {NAME: (entry, tensors)})
    assert "quantization_config" not in json.loads((tmp_path / "a" / "config.json").read_text())
    assert entries(tmp_path / "a") == ["config.json", "model.safetensors"]


def test_seal_refuses_a_linear_that_is_not_there(tmp_path):
    entry, tensors = linear()
    write(tmp_path / "a", {NAME: (entry, tensors)})
    group = GroupEntry(in_features=12, experts=2, linears={"other": entry})
    with pytest.raises(WexpandError, match="other.weight: missing"):
        seal(tmp_path / "a", [group], {})
    assert ModelDir(tmp_path / "a").config.linears.keys() == {NAME}


# --- directories


def test_a_new_directory_appears_whole(tmp_path):
    target = tmp_path / "deep" / "new"
    with partial_directory(target) as partial:
        assert not target.exists() and partial.is_dir() and not any(partial.iterdir())
        (partial / "sub").mkdir()
        (partial / "sub" / "file").write_text("x")
    assert (target / "sub" / "file").read_text() == "x" and entries(target.parent) == ["new"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_directory_that_fails_leaves_nothing(tmp_path, error):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text("old")
    for name in ("new", "folders/of/its/own", "old"):
        with pytest.raises(error), partial_directory(tmp_path / name) as partial:
            (partial / "config.json").write_text("new")
            raise error
    assert entries(tmp_path) == ["old"] and entries(tmp_path / "old") == ["config.json"]
    assert (tmp_path / "old" / "config.json").read_text() == "old"


def test_an_existing_directory_gets_new_weights_and_keeps_the_rest(tmp_path):
    target = tmp_path / "a"
    target.mkdir()
    old = ["config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
           INDEX, "model.fp32.safetensors", "notes.txt", "tokenizer.json"]  # fmt: skip
    for name in old:
        (target / name).write_text("old")
    with partial_directory(target) as partial:
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            (partial / name).write_text("new")
    read = {name: (target / name).read_text() for name in entries(target)}
    assert read == {
        "config.json": "new", "model.safetensors": "new", "tokenizer.json": "new",
        "notes.txt": "old",
    }  # fmt: skip


def test_interrupted_while_moving_has_no_config(tmp_path, monkeypatch):
    """Once files start to change, there is no config.json until the end."""
    target, real = tmp_path / "a", os.replace
    target.mkdir()
    (target / "config.json").write_text("old")

    def replace(source, to):
        if Path(to).name == "model.safetensors":
            raise OSError("disk full")
        real(source, to)

    monkeypatch.setattr(writer.os, "replace", replace)
    with pytest.raises(OSError, match="disk full"), partial_directory(target) as partial:
        for name in ("config.json", "model.safetensors"):
            (partial / name).write_text("new")
    assert entries(target) == []


def test_refuses_where_it_would_mix(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WexpandError, match="is a file"), partial_directory(tmp_path / "file"):
        pass
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter.safetensors").write_text("")
    with (
        pytest.raises(WexpandError, match="adapter.safetensors"),
        partial_directory(tmp_path / "a"),
    ):
        pass


def dead_process() -> int:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


@pytest.mark.parametrize("exists", [False, True])
def test_what_dead_processes_left_is_removed(tmp_path, exists):
    """Live ones may still be writing theirs, and other names are not ours."""
    target = tmp_path / "a"
    if exists:
        target.mkdir()
    parent, stem = (target, ".partial") if exists else (tmp_path, ".a.partial")
    dead, alive = parent / f"{stem}-{dead_process()}", parent / f"{stem}-{os.getppid()}"
    others = [parent / f"{stem}-mine", parent / f"{stem}-", parent / f"{stem}-{10**20}"]
    others += [tmp_path / f".b.partial-{dead.name.rpartition('-')[2]}"]
    for path in (dead, alive, *others):
        path.mkdir()
        (path / "model.safetensors").write_text("half")
    with partial_directory(target) as partial:
        assert not dead.exists() and alive.exists() and partial.parent == parent
        (partial / "new").write_text("new")
    assert (target / "new").exists() and alive.exists() and not dead.exists()
    assert all(path.exists() for path in others) and not partial.exists()


def test_a_killed_process_is_cleaned_up_after(tmp_path):
    code = (
        "import os, signal, sys\n"
        "from wexpand_plugin.format.directories import partial_directory\n"
        "with partial_directory(sys.argv[1]) as partial:\n"
        "    (partial / 'half').write_text('x')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a")])
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".a.partial-") and (left / "half").exists()
    with partial_directory(tmp_path / "a"):
        pass
    assert entries(tmp_path) == ["a"]


def test_require_empty(tmp_path):
    require_empty(tmp_path / "new")
    require_empty(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(WexpandError, match="is not empty; name a directory that does not exist"):
        require_empty(tmp_path)
    with pytest.raises(WexpandError, match="is a file; name a directory that does not exist"):
        require_empty(tmp_path / "file")
    with pytest.raises(WexpandError, match="file: is a file; name"):
        require_empty(tmp_path / "file" / "further" / "down")


def test_copy_others(tmp_path):
    """No weights, nothing hidden, no code, nothing over what is there; folders too."""
    source, target = tmp_path / "source", tmp_path / "target"
    target.mkdir()
    (target / "kept.json").write_text("new")
    for name in ("tokenizer.json", "sub/template.jinja", "kept.json", "config.json", CHECKSUMS,
                 "model.safetensors", INDEX, "old.bin", "sub/x.pt", "a.gguf", ".git/config",
                 "modeling_own.py", "sub/state.pkl"):  # fmt: skip
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("old")
    assert copy_others(source, target) == ["modeling_own.py", "sub/state.pkl"]
    copied = sorted(str(f.relative_to(target)) for f in target.rglob("*") if f.is_file())
    assert copied == ["kept.json", "sub/template.jinja", "tokenizer.json"]
    assert (target / "kept.json").read_text() == "new"
    other = tmp_path / "other"
    other.mkdir()
    copy_others(source, other, but=("tokenizer.json",))
    assert not (other / "tokenizer.json").exists() and (other / "kept.json").exists()
