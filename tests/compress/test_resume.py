"""Runs that end early and go on: the same bytes as a run that nothing stopped."""

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
import yaml
from test_modifier import run, tiny
from tiny import tokenizer

from wexpand_plugin.compress import modifier
from wexpand_plugin.compress.oneshot import compress
from wexpand_plugin.compress.progress import resumable, unfinished
from wexpand_plugin.errors import WexpandError

SLOW = pytest.mark.slow


def written(path: Path) -> dict[str, bytes]:
    """Every file below `path`."""
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


@pytest.fixture
def call(tmp_path):
    """`compress` of a tiny model of two blocks, with the recipe's keys and other arguments."""
    model = tiny("Llama", tmp_path / "dense")
    tokenizer().save_pretrained(model)
    text = tmp_path / "text.jsonl"
    words = [" ".join(f"t{(i * 7 + j * j) % 90 + 2}" for j in range(60)) for i in range(60)]
    text.write_text("".join(json.dumps({"text": w}) + "\n" for w in words))

    def compressed(output: str, keys: dict, **arguments) -> Path:
        keys = {"sparsity": 0.6, "num_experts": 2, "targets": ["re:.*mlp.*"]} | keys
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(yaml.safe_dump({"a_stage": {"b_modifiers": {
            "SparseExpansionModifier": keys}}}))  # fmt: skip
        arguments = dict(samples=16, max_seq_length=32) | arguments
        return compress(str(model), recipe, str(text), tmp_path / output, **arguments)

    return compressed


@pytest.fixture
def dies(monkeypatch):
    """A context: Ctrl-C is pressed before the second block is expanded."""
    return lambda: Death(monkeypatch)


class Death:
    def __init__(self, monkeypatch):
        self.patch, self.expand = monkeypatch, modifier.expand_block

    def __enter__(self):
        def expand(model, block, *rest):
            if block.place:
                signal.raise_signal(signal.SIGINT)
            return self.expand(model, block, *rest)

        self.patch.setattr(modifier, "expand_block", expand)
        # a process that was started in the background ignores Ctrl-C
        self.handler = signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, kind, *_):
        signal.signal(signal.SIGINT, self.handler)
        assert kind is KeyboardInterrupt
        self.patch.setattr(modifier, "expand_block", self.expand)
        return True


@pytest.mark.parametrize(
    "keys",
    [
        dict(size_budget=0.9),
        dict(num_experts=1, values="int4", tune_epochs=2),
        dict(sparsity="auto", num_experts=1, size_budget=0.3, tune_epochs=1),
        pytest.param(dict(), marks=SLOW),
        pytest.param(dict(size_budget=0.9, budget_scope="layer", tune_epochs=1), marks=SLOW),
        pytest.param(dict(num_clusters=4, size_budget=1.1, allocate_by="random"), marks=SLOW),
        pytest.param(dict(num_experts=1, num_clusters=4, tune_epochs=1), marks=SLOW),
        pytest.param(dict(sparsity="auto", read_budget=0.4, size_budget=0.7), marks=SLOW),
    ],
    ids=str,
)
def test_goes_on_to_the_same_bytes(keys, call, dies, tmp_path, monkeypatch):
    call("whole", keys)
    with dies():
        call("out", keys)
    kept = unfinished(tmp_path / "out")
    assert kept.exists() and not (tmp_path / "out").exists()

    def again(model, block, *rest):
        assert block.place == 1, "the first block is finished"
        return real(model, block, *rest)

    real = modifier.expand_block
    monkeypatch.setattr(modifier, "expand_block", again)
    monkeypatch.setattr(modifier, "choose_settings", None)
    call("out", keys, resume=True)
    assert written(tmp_path / "out") == written(tmp_path / "whole")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys",
    [
        dict(size_budget=0.9),
        dict(sparsity="auto", num_experts=1, size_budget=0.3, tune_epochs=2),
    ],
    ids=str,
)
def test_killed_at_ten_random_moments(keys, call, dies, tmp_path):
    """Each time the next run goes on, and what comes out in the end is the same."""
    with dies():
        call("out", keys)
    shutil.rmtree(unfinished(tmp_path / "out"))
    arguments = dict(
        model=str(tmp_path / "dense"), recipe=str(tmp_path / "recipe.yaml"), samples=16,
        dataset=str(tmp_path / "text.jsonl"), max_seq_length=32, output=str(tmp_path / "out"),
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, Path(__file__).parent / "killed.py", "10", json.dumps(arguments)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    killed, finished, compared = map(int, done.stdout.split()[-3:])
    assert killed >= 10 and compared >= 1 and finished >= 1


@pytest.mark.slow
@pytest.mark.parametrize("keys", [{}, dict(size_budget=0.9)], ids=str)
def test_a_model_that_is_saved_in_another_dtype(keys, call, dies, tmp_path, monkeypatch):
    """Later blocks see what is stored, in bfloat16, and not what was found, in float32."""
    tiny("Llama", tmp_path / "dense", torch.bfloat16)
    call("whole", keys, dtype="float32")
    with dies():
        call("out", keys, dtype="float32")
    call("out", keys, dtype="float32", resume=True)
    assert written(tmp_path / "out") == written(tmp_path / "whole")


FEW = dict(num_experts=1)


def test_another_run_is_refused_by_what_differs(call, dies, tmp_path):
    with dies():
        call("out", FEW)
    before = written(unfinished(tmp_path / "out"))
    with pytest.raises(WexpandError, match=r"left 1 finished block in .*--resume"):
        call("out", FEW)
    for keys, arguments, message in [
        (FEW, dict(seed=1), "seed was 0 and is 1 now"),
        (FEW, dict(samples=15), "samples was 16 and is 15 now"),
        (FEW | {"sparsity": 0.5}, {}, r"SparseExpansionModifier.sparsity was 0\.6 and is 0\.5 now"),
    ]:
        with pytest.raises(WexpandError, match=message):
            call("out", keys, resume=True, **arguments)
    text = tmp_path / "text.jsonl"
    lines = text.read_text()
    text.write_text(lines.replace("t9", "t8"))
    with pytest.raises(WexpandError, match="data.crc32 was"):
        call("out", FEW, resume=True)
    text.write_text(lines)
    weights = tmp_path / "dense" / "model.safetensors"
    right = weights.read_bytes()
    weights.write_bytes(right[:-4] + bytes(4))
    with pytest.raises(WexpandError, match="weights was"):
        call("out", FEW, resume=True)
    assert written(unfinished(tmp_path / "out")) == before
    weights.write_bytes(right)
    call("out", FEW, resume=True)
    with pytest.raises(WexpandError, match="is complete; there is nothing to resume"):
        call("out", FEW, resume=True)


def test_a_damaged_block_is_done_again(call, dies, tmp_path):
    call("whole", FEW)
    with dies():
        call("out", FEW)
    (block,) = unfinished(tmp_path / "out").glob("*block*")
    content = bytearray(block.read_bytes())
    content[len(content) // 2] ^= 1
    block.write_bytes(content)
    call("out", FEW, resume=True)
    assert written(tmp_path / "out") == written(tmp_path / "whole")


def test_two_runs_at_one_output(call, tmp_path):
    with resumable(tmp_path / "out"):
        with pytest.raises(WexpandError, match="out: another process is writing it"):
            call("out", FEW)
    assert not list(tmp_path.glob(".out*"))


def test_data_in_another_order_is_refused(call, dies, monkeypatch):
    with dies():
        call("out", FEW)
    seed = torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda number: seed(number + 1))
    with pytest.raises(WexpandError, match="come in another order"):
        call("out", FEW, resume=True)


def test_a_run_that_finished_nothing_leaves_nothing(call, tmp_path, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(modifier, "expand_block", stop)
    with pytest.raises(KeyboardInterrupt):
        call("deep/er/out", FEW)
    assert not list(tmp_path.glob(".*")) and not (tmp_path / "deep").exists()


def test_a_plan_is_kept_before_there_are_blocks(call, tmp_path, monkeypatch):
    """It may have taken longer than any of them."""
    keys = dict(sparsity="auto", num_experts=1, size_budget=0.3)
    call("whole", keys)

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(modifier, "expand_block", stop)
        with pytest.raises(KeyboardInterrupt):
            call("out", keys)
    with pytest.raises(WexpandError, match="left its plan in .*--resume"):
        call("out", keys)
    monkeypatch.setattr(modifier, "choose_settings", None)
    call("out", keys, resume=True)
    assert written(tmp_path / "out") == written(tmp_path / "whole")
    assert not list(tmp_path.glob(".*"))


def test_killed_while_files_move_into_a_directory_that_was_there(call, tmp_path, monkeypatch):
    call("whole", FEW)
    (tmp_path / "out").mkdir()
    replace = os.replace

    def stop(source, target):
        if Path(target).parent == tmp_path / "out" and Path(target).name == "config.json":
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            call("out", FEW)
    assert (tmp_path / "out" / "wexpand_checksums.json").exists()
    with pytest.raises(WexpandError, match="is not empty"):
        call("out", FEW)
    call("out", FEW, resume=True)
    assert written(tmp_path / "out") == written(tmp_path / "whole")


def test_oneshot_goes_on_too(tmp_path, dies):
    """llm-compressor's own entry, which no options are known of; and the data are in the state."""
    path = tiny("Llama", tmp_path / "dense")
    for output, resume in (("whole", False), ("out", False), ("out", True)):
        with ExitStack() as stack:
            if output == "out" and not resume:
                stack.enter_context(dies())
            stack.enter_context(resumable(tmp_path / output, resume=resume))
            torch.manual_seed(0)
            run(path, tmp_path / output, num_experts=1, targets=["re:.*mlp.*"])
    assert written(tmp_path / "out") == written(tmp_path / "whole")
    assert not list(tmp_path.glob(".*"))
