"""Which tokens calibrate: what the masks say, whatever pads, wherever, and in whatever batches."""

import zlib

import pytest
import torch
from datasets import Dataset
from llmcompressor import oneshot
from test_modifier import tiny
from tiny import VOCAB, tokenizer
from torch.utils.data import DataLoader

from wexpand_plugin.compress.calibration import CalibrationBatches, counted_tokens
from wexpand_plugin.compress.modifier import SparseExpansionModifier
from wexpand_plugin.compress.neuron_scores import load_scores
from wexpand_plugin.compress.scoring import NeuronScoringModifier
from wexpand_plugin.errors import WexpandError
from wexpand_plugin.hf.linear import RoutedLinear
from wexpand_plugin.method import group

ROWS = [
    torch.randint(2, VOCAB, (24 + i * 7 % 17,), generator=torch.Generator().manual_seed(i)).tolist()
    for i in range(32)
]
REAL = sum(map(len, ROWS))
LENGTH = 48


def pad(row: list[int], fill: int, side: str, length: int = LENGTH) -> list[int]:
    spare = [fill] * (length - len(row))
    return row + spare if side == "right" else spare + row


def dataset(side: str | None, extra: dict | None = None) -> Dataset:
    """The texts, ragged or padded on one side."""
    ids, masks = ROWS, [[1] * len(row) for row in ROWS]
    if side is not None:
        ids, masks = ([pad(r, 0, side) for r in rows] for rows in (ids, masks))
    return Dataset.from_dict({"input_ids": ids, "attention_mask": masks} | (extra or {}))


def loader(side: str | None, batch_size: int = 1) -> DataLoader:
    """The same in order, as a loader of one's own."""

    def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
        return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}

    return DataLoader(dataset(side), batch_size=batch_size, collate_fn=collate)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny("Llama", tmp_path_factory.mktemp("model") / "dense")


def expand(path, data, **arguments):
    recipe = SparseExpansionModifier(
        sparsity=0.6, num_experts=4, targets=["re:.*mlp.*"], router_restarts=1
    )
    words = tokenizer()
    words.pad_token = "t0"
    arguments = {"max_seq_length": LENGTH, "num_calibration_samples": len(ROWS)} | arguments
    return oneshot(
        model=str(path), dataset=data, recipe=[recipe], tokenizer=None, processor=words, **arguments
    )


def counted(model) -> set[int]:
    return {sum(m.tokens) for m in model.modules() if isinstance(m, RoutedLinear)}


@pytest.mark.parametrize("pipeline", ["sequential", "basic"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_does_not_count(side, pipeline, path):
    assert counted(expand(path, dataset(side), pipeline=pipeline)) == {REAL}


@pytest.mark.parametrize("batch_size", [3, 8])
def test_padding_of_a_collator_does_not_count(batch_size, path):
    """Rows are shuffled anew at each pass, so batches are padded to other lengths each time."""
    model = expand(
        path, dataset(None), data_collator="padding", batch_size=batch_size, max_seq_length=None
    )
    assert counted(model) == {REAL}


def test_a_loss_mask_counts_too(path):
    masks = [pad([0] * 5 + [1] * (len(row) - 5), 1, "right") for row in ROWS]
    model = expand(path, dataset("right", {"loss_mask": masks}))
    assert counted(model) == {REAL - 5 * len(ROWS)}


@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_rows_calibrate_as_ragged_ones(side, path, monkeypatch):
    """The same clusters, Hessians and token counts."""
    seen: list[list] = []
    inner = group.full_expansion

    def watched(weights, statistics, settings):
        seen[-1].append(statistics)
        return inner(weights, statistics, settings)

    monkeypatch.setattr(group, "full_expansion", watched)
    for data in (loader(None), loader(side)):
        seen.append([])
        expand(path, data)
    # the first group: what is behind it sees what rounding made of masks of the first
    ragged, padded = (found[0] for found in seen)
    torch.testing.assert_close(padded.router.weight, ragged.router.weight, rtol=0, atol=1e-3)
    assert torch.equal(padded.tokens, ragged.tokens)
    difference = (padded.sums - ragged.sums).norm() / ragged.sums.norm()
    assert difference < 1e-6
    assert [int(s.tokens.sum()) for found in seen for s in found] == [REAL] * 8


@pytest.mark.parametrize("batch_size", [1, 8])
def test_neuron_scores_are_those_of_real_tokens(batch_size, path, tmp_path):
    words = tokenizer()
    for name, data in (("ragged", loader(None)), ("padded", loader("left", batch_size))):
        oneshot(
            model=str(path), dataset=data, recipe=[NeuronScoringModifier(targets=["re:.*mlp.*"])],
            processor=words, output_dir=str(tmp_path / name), num_calibration_samples=len(ROWS),
        )  # fmt: skip
    ragged, padded = (load_scores(tmp_path / name).linears for name in ("ragged", "padded"))
    for name, scored in ragged.items():
        assert scored.tokens == padded[name].tokens == REAL
        torch.testing.assert_close(scored.scores.wd, padded[name].scores.wd, rtol=1e-3, atol=1e-4)


def test_padding_cannot_make_up_for_too_few_tokens(path):
    rows = [pad([5, 6, 7, 8], 0, "right") for _ in range(32)]
    masks = [pad([1] * 4, 0, "right") for _ in rows]
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": masks})
    with pytest.raises(WexpandError, match="calibration: 128 tokens are too few"):
        expand(path, data)


def test_masks_that_do_not_fit_are_said():
    batch = {"input_ids": torch.ones(2, 5, dtype=torch.int64), "attention_mask": torch.ones(2, 4)}
    with pytest.raises(WexpandError, match=r"attention_mask \[2, 4\] should have the shape"):
        counted_tokens(batch)
    assert counted_tokens({}) is None


def test_a_watched_loader_gives_what_it_gave_and_is_left_as_it_was():
    data = loader("right", batch_size=5)
    before = [batch["input_ids"] for batch in data]
    found = CalibrationBatches.watch(data)
    assert CalibrationBatches.watch(data) is found and isinstance(data, DataLoader)
    next(iter(data))  # as a pipeline that looks at one batch before it begins
    after = [batch["input_ids"] for batch in data]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert len(found.known) == len(before) and found.tokens == REAL
    real = torch.tensor([token for row in ROWS for token in row])
    assert found.about() == {
        "batches": len(before), "tokens_counted": REAL,
        "crc32": f"{zlib.crc32(real.numpy().tobytes()):08x}",
    }  # fmt: skip
    found.release()
    assert type(data) is DataLoader
