"""Runs in two processes, each with its half of the rows, against one with all of them."""

import subprocess
import sys

import datasets
import pytest
import torch
from test_modifier import calibration, logits, run, tiny
from tiny import tokenizer
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM
from two_ranks import together

from wexpand_plugin.compress.checks import refuse_same_rows
from wexpand_plugin.compress.oneshot import compress
from wexpand_plugin.compress.progress import resumable
from wexpand_plugin.errors import WexpandError
from wexpand_plugin.hf.linear import RoutedLinear
from wexpand_plugin.tools.inspect import inspect
from wexpand_plugin.tools.verify import verify


def loss(model) -> float:
    """Nats per token, of labels that nothing was trained on."""
    found = logits(model).log_softmax(dim=-1).flatten(0, 1)
    generator = torch.Generator().manual_seed(9)
    labels = torch.randint(found.shape[1], (len(found), 1), generator=generator)
    return -float(found.gather(1, labels).mean())


def compressed(path, out, rank: int = 0, count: int = 1, **keys):
    """The masks that were found, and the loss."""
    torch.manual_seed(0)
    data = calibration(32, 32).shard(num_shards=count, index=rank)
    model = run(path, out, data, **keys)
    routed = {n: m for n, m in model.named_modules() if isinstance(m, RoutedLinear)}
    masks = {
        name: torch.stack([m.pool.expert(e) != 0 for e in range(m.experts)])
        for name, m in routed.items()
    }
    return masks, loss(model)


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys",
    [
        dict(num_experts=1),
        dict(num_experts=1, sparsity=0.1, num_clusters=3, tune_epochs=2),
        dict(num_experts=3, sparsity=0.1, size_budget=1.4),
        dict(
            num_experts=1, sparsity="auto", size_budget=0.15, budget_scope="model",
            tune_model_epochs=1,
        ),
    ],
    ids=str,
)  # fmt: skip
def test_two_ranks_find_what_one_finds(keys, tmp_path):
    path = tiny("Llama", tmp_path / "dense")
    masks, alone = compressed(path, tmp_path / "one", **keys)
    both = together(lambda rank: compressed(path, tmp_path / "two", rank, 2, **keys))
    for found in both:
        if isinstance(found, Exception):
            raise found
        # training takes batches in another order; evals.ranks does this with a trained model
        same = not any("epochs" in key for key in keys)
        assert found[1] == both[0][1] == pytest.approx(alone, abs=1e-3 if same else 5e-3)
        if same:
            assert all(torch.equal(found[0][name], mask) for name, mask in masks.items())
    assert verify(tmp_path / "two") == []
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    assert loss(saved) == pytest.approx(both[0][1], abs=1e-5)
    known = inspect(tmp_path / "two").made_by["data"]
    assert (known["batches"], known["tokens_counted"]) == (32, 32 * 32)


RECIPE = """
one_stage:
  one_modifiers:
    SparseExpansionModifier:
      sparsity: 0.5
      num_experts: {}
      targets: ['re:.*mlp.*']
"""


@pytest.mark.slow
def test_torchrun(tmp_path):
    path = tiny("Llama", tmp_path / "dense")
    tokenizer().save_pretrained(path)
    calibration(8, 16).save_to_disk(tmp_path / "rows")

    def torchrun(experts: int) -> subprocess.CompletedProcess:
        (tmp_path / "recipe.yaml").write_text(RECIPE.format(experts))
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            "-m", "wexpand_plugin.tools.cli", "compress", str(path), "-d", str(tmp_path / "rows"),
            "-r", str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / "out"),
        ]  # fmt: skip
        return subprocess.run(command, capture_output=True, text=True, timeout=600)

    failed = torchrun(9)
    assert failed.returncode != 0 and not (tmp_path / "out").exists()
    assert "calibration: 128 tokens are too few for num_experts 9" in failed.stderr
    assert failed.stderr.count("Traceback") == 1  # torchrun's own
    worked = torchrun(1)
    assert worked.returncode == 0, worked.stderr
    assert worked.stdout.count("wrote ") == 1
    assert verify(tmp_path / "out") == []
    assert {file.name for file in tmp_path.iterdir()} == {"dense", "rows", "recipe.yaml", "out"}


def test_the_same_rows_are_refused():
    def work(rank: int) -> None:
        rows = datasets.Dataset.from_dict({"input_ids": [[rank // 2, 1], [2, 3]]})
        refuse_same_rows(DataLoader(rows))

    assert all("3 processes have the same rows" in str(found) for found in together(work, 3))
    refuse_same_rows(None)


def test_what_several_ranks_cannot_do_yet(tmp_path):
    def call(rank: int) -> None:
        compress("model", None, "text", tmp_path / "out", size=0.2, resume=True)

    def python(rank: int) -> None:
        with resumable(tmp_path / "out"):
            pass

    for work in (call, python):
        for found in together(work):
            assert isinstance(found, WexpandError) and str(found).startswith("resume: ")
