"""The README.md of a saved model: what it says, and what it never replaces."""

import re

import pytest
import tiny
import yaml

import wexpand_plugin
from wexpand_plugin.hf.card import BASE_CARD, CARD, is_card
from wexpand_plugin.hf.saving import wrap_save_pretrained
from wexpand_plugin.tools.inspect import inspect
from wexpand_plugin.tools.pack import pack
from wexpand_plugin.tools.unpack import unpack
from wexpand_plugin.tools.verify import verify

BASE = "---\nlicense: mit\nlanguage: [en, de]\ntags: [old]\n---\n# The base model\n"


def front_matter(path) -> dict:
    return yaml.safe_load((path / CARD).read_text().split("---")[1])


@pytest.fixture
def dense(tmp_path):
    tiny.prune(tiny.dense(), 0.5).save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / CARD).write_text(BASE)
    return tmp_path / "dense"


def test_pack_writes_one_and_unpack_gives_the_first_back(dense, tmp_path):
    pack(dense, tmp_path / "packed", quiet=True)
    front = front_matter(tmp_path / "packed")
    assert front == {
        "license": "mit", "language": ["en", "de"], "library_name": "vllm",
        "tags": ["sparse", "vllm", "wexpand"], "pipeline_tag": "text-generation",
    }  # fmt: skip
    text = (tmp_path / "packed" / CARD).read_text()
    sizes = inspect(tmp_path / "packed")
    stored, before = re.search(r"linears, MB \| ([\d.]+) \| ([\d.]+) ", text).groups()
    assert float(stored) == pytest.approx(sizes.linear_bytes / 1e6, abs=0.01)
    assert float(before) == pytest.approx(sizes.dense_bytes / 1e6, abs=0.01)
    assert f"{sizes.sparsity:.1%} zeros" in text and "command: pack" in text
    assert "vllm serve DIR" in text and str(tmp_path) not in text
    assert f"By wexpand {wexpand_plugin.__version__}." in text
    assert (tmp_path / "packed" / BASE_CARD).read_text() == BASE
    assert verify(tmp_path / "packed") == []
    unpack(tmp_path / "packed", tmp_path / "back", quiet=True)
    assert (tmp_path / "back" / CARD).read_text() == BASE
    assert not (tmp_path / "back" / BASE_CARD).exists()


def test_saving_again_replaces_our_card_and_no_other(tmp_path):
    model, out = tiny.expand(tiny.dense(), clusters=6), tmp_path / "out"
    wrap_save_pretrained(model, {"sparsity": 0.5, "model": "somebody/large", "modifier": "A"})
    model.save_pretrained(out)
    first = (out / CARD).read_text()
    front = front_matter(out)
    assert front["base_model"] == "somebody/large" and "sparse-expansion" in front["tags"]
    assert "# large, compressed" in first and "sparsity: 0.5" in first
    assert "up to 3 experts" in first and "up to 6 clusters with a bias" in first

    tuned = {"layers.0": [0.5, 0.25], "layers.1": [0.25, 0.125], "layers.2": []}
    made_by = {"sparsity": 0.5, "predicted_loss": {"a": 0.25, "b": 0.5}, "tuned": tuned}
    wrap_save_pretrained(model, made_by)
    model.save_pretrained(out)
    second = (out / CARD).read_text()
    assert "over 2 blocks: 0.375 before tuning, 0.188 after" in second
    assert second != first and "0.750 nats" in second and "# A model, compressed" in second
    assert "base_model" not in front_matter(out)

    (out / CARD).write_text(second.replace("0.750", "0.7"))
    assert not is_card(out / CARD), "a card that somebody wrote in is theirs"
    model.save_pretrained(out)
    assert (out / CARD).read_text() == second.replace("0.750", "0.7")
    (out / CARD).write_text("mine")
    model.save_pretrained(out)
    assert (out / CARD).read_text() == "mine"


@pytest.mark.parametrize("base", ["---\n{a: [\n---\n", "---\n- a\n---\n", "", "\xff no yaml"])
def test_base_cards_without_front_matter(dense, tmp_path, base):
    (dense / CARD).write_bytes(base.encode("latin1"))
    pack(dense, tmp_path / "packed", quiet=True)
    assert "license" not in front_matter(tmp_path / "packed")


def test_a_snapshot_of_the_hub_is_named_by_its_id(dense, tmp_path):
    snapshot = tmp_path / "models--some-body--small" / "snapshots" / "0a1b"
    snapshot.parent.mkdir(parents=True)
    dense.rename(snapshot)
    pack(snapshot, tmp_path / "packed", quiet=True)
    assert front_matter(tmp_path / "packed")["base_model"] == "some-body/small"
