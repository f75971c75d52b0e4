"""What goes wrong while a model is compressed: a clear message or a right result, nothing else."""

import json
import resource

import pytest
import torch
import transformers
from test_modifier import calibration, logits, run, tiny
from test_resume import FEW, call, written  # noqa: F401

from wexpand_plugin.compress import oneshot, progress
from wexpand_plugin.compress.progress import unfinished
from wexpand_plugin.compress.rows import replace_linear
from wexpand_plugin.compress.saved import check_saved
from wexpand_plugin.errors import WexpandError
from wexpand_plugin.format.rowpool import RowPool
from wexpand_plugin.method.statistics import HELD_OUT, GroupStatistics
from wexpand_plugin.tools.cli_errors import sentence
from wexpand_plugin.tools.verify import verify

MLP = dict(targets=["re:.*mlp.*"], router_restarts=1)


def changed(path, change) -> None:
    """The saved model at `path`, after `change`(its blocks)."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        change(model.model.layers)
    model.save_pretrained(path)


@pytest.mark.parametrize("experts", [1, 2])
def test_inputs_whose_squares_overflow(experts, tmp_path):
    path = tiny("Llama", tmp_path / "dense")
    changed(path, lambda layers: layers[0].post_attention_layernorm.weight.mul_(1e18))
    with pytest.raises(WexpandError, match=r"^model.layers.0.mlp: gate_proj \+ up_proj.*overflow"):
        run(path, num_experts=experts, targets=["re:.*gate_proj", "re:.*up_proj"])


@pytest.mark.parametrize("keys", [dict(num_experts=1, tune_epochs=1), dict(num_experts=2)], ids=str)
def test_the_same_token_again_and_again(keys, tmp_path):
    """Hessians of rank one: a model that is right for this token."""
    path = tiny("Llama", tmp_path / "dense")
    data = calibration()
    data = data.map(lambda row: {"input_ids": [7] * len(row["input_ids"])})
    model = run(path, tmp_path / "out", data, **MLP, **keys)
    ids = torch.full((1, 48), 7)
    dense = transformers.AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        y, right = model(ids).logits, dense(ids).logits
    assert (y - right).norm() < 0.1 * right.norm()
    assert verify(tmp_path / "out") == []


def test_inputs_that_are_zero(tmp_path):
    """Nothing to solve for: weights of dead columns go, and the outputs stay."""
    path = tiny("Llama", tmp_path / "dense")
    changed(path, lambda layers: layers[0].post_attention_layernorm.weight.zero_())
    model = run(path, num_experts=1, **MLP)
    assert logits(model).isfinite().all()
    with pytest.raises(WexpandError, match="down_proj: num_experts: 2 clusters cannot be made"):
        run(path, num_experts=2, **MLP)


def test_infinite_inputs_among_those_that_are_held_out():
    statistics = GroupStatistics(4, None, hold_out=True)
    rows = torch.ones(HELD_OUT, 4)
    rows[0, 2] = torch.inf  # the first run that is held out
    with pytest.raises(WexpandError, match="NaN or infinite"):
        statistics.add(rows)


def test_weights_that_overflow_the_dtype_of_the_model():
    """float16 ends at 65504; what solving adds to weights near it is more."""
    pool = RowPool.pack(torch.full((2, 3), 1e5)).to(dtype=torch.float16)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2).half())
    model.config = transformers.LlamaConfig(dtype=torch.float16)
    with pytest.raises(WexpandError, match=r"^0: what was found .* overflows torch.float16"):
        replace_linear(model, "0", model[0], pool)


def test_a_full_disk_while_a_block_is_kept(call, tmp_path, monkeypatch):  # noqa: F811
    """A limit on the size of files is as real an error as a full disk, and needs no root."""
    write = progress.write_record

    def limited(folder, name, value):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        if "block-00001" in name:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2048, before[1]))
        try:
            return write(folder, name, value)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    call("whole", FEW)
    monkeypatch.setattr(progress, "write_record", limited)
    with pytest.raises(Exception, match="File too large") as error:
        call("out", FEW)
    assert "File too large" in (sentence(error.value) or "")
    assert not (tmp_path / "out").exists()
    names = {file.name.rpartition("-")[0] for file in unfinished(tmp_path / "out").glob("*-*")}
    assert names == {"run", "0-run", "0-block-00000"}
    assert not (unfinished(tmp_path / "out") / "partial").exists()
    monkeypatch.undo()
    call("out", FEW, resume=True)
    assert written(tmp_path / "out") == written(tmp_path / "whole")


def test_a_saved_model_that_computes_something_else(call, tmp_path, monkeypatch):  # noqa: F811
    """A file that was exchanged after it was checked; it is found by running it."""
    copy_others = oneshot.copy_others

    def exchange(source, target, **options):
        file = target / "model.safetensors"
        content = bytearray(file.read_bytes())
        begin = 8 + int.from_bytes(content[:8], "little")
        first = json.loads(content[8:begin])["lm_head.weight"]["data_offsets"]
        content[begin + first[0] : begin + first[1]] = bytes(first[1] - first[0])
        file.write_bytes(content)
        return copy_others(source, target, **options)

    monkeypatch.setattr(oneshot, "copy_others", exchange)
    with pytest.raises(WexpandError, match="read back, .* differ by 1 of their size"):
        call("out", FEW)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    call("out", FEW, resume=True)


def test_a_model_whose_outputs_are_not_finite_is_not_saved(tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny("Llama", tmp_path))
    with torch.no_grad():
        model.model.norm.weight[3] = torch.inf
    with pytest.raises(WexpandError, match="NaN or infinite in torch.float32, so it is not saved"):
        check_saved(model, tmp_path, [5, 6, 7])
