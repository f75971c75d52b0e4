"""problems lists everything that is wrong with a checkpoint, and goes on after each."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from samples import changed, linear, write

from wexpand_plugin.format.config import digest_of
from wexpand_plugin.format.model_dir import CHECKSUMS, INDEX, ModelDir, checksum
from wexpand_plugin.format.problems import problems
from wexpand_plugin.format.values import codec
from wexpand_plugin.format.writer import write_json

GATE, UP = "layers.0.gate", "layers.0.up"


@pytest.fixture
def path(tmp_path) -> Path:
    """Two linears of one input group, a norm, a table that is no float."""
    write(
        tmp_path / "a", {GATE: linear(), UP: linear()},
        **{"norm.weight": torch.ones(12), "inv": torch.arange(3)},
    )  # fmt: skip
    return tmp_path / "a"


def found(path: Path) -> list[str]:
    return [str(problem) for problem in problems(ModelDir(path))]


def edit(path: Path, repair: bool = False, **tensors: torch.Tensor | None) -> None:
    """Replace tensors (None: remove); `repair` makes their checksums right again."""
    file = path / "model.safetensors"
    left = {n: t for n, t in (load_file(file) | tensors).items() if t is not None}
    save_file(left, file, metadata={"format": "pt"})
    if repair:
        sums = json.loads((path / CHECKSUMS).read_text())
        sums["tensors"] |= {name: checksum(tensor) for name, tensor in tensors.items()}
        write_json(path / CHECKSUMS, sums)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    "how", [None, codec("int8", 8), codec("int4", 8), codec("int3", 8)], ids=str
)
@pytest.mark.parametrize("experts", [1, 2])
def test_none(tmp_path, experts, how, full):
    write(tmp_path / "a", {GATE: linear(experts, how=how, full=full)}, other=torch.ones(3))
    seen = []
    assert list(problems(ModelDir(tmp_path / "a"), seen.append)) == []
    assert sorted(seen) == sorted([GATE, "other"])


def test_every_damaged_tensor_is_named(path):
    tensors = load_file(path / "model.safetensors")
    names = [f"{GATE}.weight", f"{UP}.router_bias", "norm.weight", "inv"]
    edit(path, **{name: tensors[name] + 1 for name in names})
    problems = found(path)
    damaged = [p for p in problems if "damaged: its checksum is" in p]
    assert len(damaged) == 4 and all(CHECKSUMS in problem for problem in damaged)
    for name in names:
        assert any(p.startswith(f"{path / 'model.safetensors'}: {name}: ") for p in damaged)
    # the router of one of two linears was among them
    assert set(problems) - set(damaged) == {f"{GATE}, {UP}: one input group, but unequal routers"}


def test_content_whose_checksum_is_right(path):
    tensors = load_file(path / "model.safetensors")
    edit(
        path, repair=True,
        **{f"{GATE}.weight": changed(tensors[f"{GATE}.weight"], 3, float("inf")),
           f"{UP}.row_map": changed(tensors[f"{UP}.row_map"], (1, 1), 9),
           "norm.weight": changed(tensors["norm.weight"], 3, float("nan"))},
    )  # fmt: skip
    kinds = [problem.partition("model.safetensors: ")[2] for problem in found(path)]
    assert kinds == [
        "norm.weight: holds NaN or infinite values",
        f"{GATE}.weight: holds NaN or infinite values",
        f"{UP}.row_map: its neurons have 14 row versions together, by their largest numbers, but "
        "there are 6",
    ]


def test_missing_and_unknown_tensors(path):
    edit(path, **{f"{UP}.weight_mask": None, "norm.weight": None, "extra": torch.zeros(1)})
    assert sorted(problem.replace(f"{path}/", "") for problem in found(path)) == [
        f"{UP}.weight_mask: missing; config.json promises [6, 2]",
        f"{UP}.weight_mask: missing; {CHECKSUMS} has its checksum",
        f"model.safetensors: extra: unknown; {CHECKSUMS} has no checksum of it",
        f"norm.weight: missing; {CHECKSUMS} has its checksum",
    ]


def test_a_weight_that_is_no_float(path):
    """The bytes, and so the checksum, stay the same where only a header is damaged."""
    tensors = load_file(path / "model.safetensors")
    edit(path, **{"norm.weight": tensors["norm.weight"].view(torch.int32)})
    (problem,) = found(path)
    assert "norm.weight: dtype torch.int32 should be float32, bfloat16 or float16" in problem


def test_checksums_that_are_missing_or_another_models(path, tmp_path):
    good = (path / CHECKSUMS).read_text()
    (path / CHECKSUMS).unlink()
    assert f"{CHECKSUMS}: there is no such file" in found(path)[0]
    for change, match in [
        ({"digest": "0" * 64}, "belongs to another config.json"),
        ({"tensors": []}, "tensors should be an object"),
    ]:
        write_json(path / CHECKSUMS, json.loads(good) | change)
        (problem,) = found(path)
        assert match in problem
    sums = json.loads(good)
    del sums["tensors"]["norm.weight"]
    sums["tensors"]["inv"] = None
    write_json(path / CHECKSUMS, sums)
    one, two = found(path)
    assert "norm.weight: unknown" in one and "inv: damaged" in two and "has None" in two
    # what checksums do not tell is found without them too
    (path / CHECKSUMS).write_text("{")
    edit(path, **{f"{UP}.weight_mask": None})
    assert len(found(path)) == 2


def test_edited_settings(path):
    config = path / "config.json"
    values = json.loads(config.read_text())
    write_json(config, values | {"hidden_size": 99})
    (problem,) = found(path)
    assert problem == f"{config}: was changed after it was written, outside quantization_config"
    values["quantization_config"]["made_by"] = {}
    write_json(config, values)
    (problem,) = found(path)
    assert "quantization_config was changed after it was written" in problem
    # digest and all: then the checksums belong to another one
    quantization = values["quantization_config"]
    quantization["digest"] = digest_of(quantization, "digest")
    write_json(config, values)
    (problem,) = found(path)
    assert "belongs to another config.json" in problem


def test_files_that_readers_would_not_find(path):
    file = path / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors, file)
    (problem,) = found(path)
    assert "its header says None, should say format: pt" in problem
    save_file(tensors, path / "model-1.safetensors", metadata={"format": "pt"})
    file.unlink()
    (problem,) = found(path)
    assert f"is in no {INDEX}, so no reader finds it" in problem
    listed = dict.fromkeys(tensors, "model-1.safetensors")
    index = {"metadata": {"total_size": 5}, "weight_map": listed}
    write_json(path / INDEX, index)
    assert found(path) == []
    more = listed | {"inv": "model-2.safetensors", "x": "y"}
    write_json(path / INDEX, index | {"weight_map": more})
    one, two = found(path)
    assert "inv: listed in model-2.safetensors, found in model-1.safetensors" in one
    assert "x: listed in y, found in None" in two
    # transformers cannot open a model whose index lacks either
    for key in index:
        for bad in (None, 5):
            write_json(path / INDEX, index | {key: bad})
            assert found(path) == [f"{path / INDEX}: has no {key}"]
    (path / INDEX).write_text("{")
    assert ["not JSON" in problem for problem in found(path)] == [True]


def test_an_input_group_has_one_expert_for_a_cluster(tmp_path):
    entry, tensors = linear(2, clusters=5)
    other = tensors | {"cluster_expert": tensors["cluster_expert"].flip(0)}
    write(tmp_path / "a", {GATE: (entry, tensors), UP: (entry, other)})
    assert found(tmp_path / "a") == [f"{GATE}, {UP}: one input group, but unequal routers"]
