"""unpack: what a dense model can hold of a checkpoint of ours, and what it cannot."""

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from wexpand_plugin.errors import WexpandError
from wexpand_plugin.format.model_dir import CHECKSUMS
from wexpand_plugin.tools.pack import pack
from wexpand_plugin.tools.unpack import unpack


def test_unpack_of_several_experts(tmp_path):
    model = tiny.expanded(tmp_path / "a")
    with pytest.raises(WexpandError, match="has 3 experts.*--expert, 0 to 2"):
        unpack(tmp_path / "a", tmp_path / "b", quiet=True)
    with pytest.raises(WexpandError, match="expert: 3 is outside 0 to 2"):
        unpack(tmp_path / "a", tmp_path / "b", expert=3, quiet=True)
    unpack(tmp_path / "a", tmp_path / "b", expert=2, quiet=True)
    linear = model.model.layers[1].mlp.down_proj
    found = load_file(tmp_path / "b" / "model.safetensors")
    assert torch.equal(found["model.layers.1.mlp.down_proj.weight"], linear.pool.expert(2))
    assert not [name for name in found if "router" in name or "row_map" in name]
    assert not (tmp_path / "b" / CHECKSUMS).exists()
    AutoModelForCausalLM.from_pretrained(tmp_path / "b")


def test_unpack_folds_one_bias_for_all_tokens_into_the_linears_own(tmp_path):
    model = tiny.expanded(tmp_path / "a", "qwen2", experts=1, clusters=1, match="q_proj")
    unpack(tmp_path / "a", tmp_path / "b", quiet=True)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    with torch.no_grad():
        found, right = back(tiny.tokens()).logits, model(tiny.tokens()).logits
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)
    linear = model.model.layers[0].self_attn.q_proj
    biases = linear.bias + linear.cluster_biases.decoded()[0]
    assert torch.equal(back.model.layers[0].self_attn.q_proj.bias, biases)


@pytest.mark.parametrize(
    ("kind", "clusters", "problem"),
    [
        ("llama", 1, "adds a bias to all tokens, which the dense model's has no tensor for"),
        ("qwen2", 8, "adds a bias of its own for each of 8 clusters"),
    ],
)
def test_unpack_refuses_biases_that_no_dense_model_has(tmp_path, kind, clusters, problem):
    tiny.expanded(tmp_path / "a", kind, experts=1, clusters=clusters, match="q_proj")
    with pytest.raises(WexpandError, match=f"q_proj {problem}"):
        unpack(tmp_path / "a", tmp_path / "b", quiet=True)
    assert not (tmp_path / "b").exists()


def test_unpack_refuses_a_damaged_checkpoint(tmp_path):
    tiny.prune(tiny.dense(), 0.5).save_pretrained(tmp_path / "dense")
    pack(tmp_path / "dense", tmp_path / "a", quiet=True)
    file = tmp_path / "a" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 16
    file.write_bytes(data)
    with pytest.raises(WexpandError, match="damaged"):
        unpack(tmp_path / "a", tmp_path / "b", quiet=True)
    assert not (tmp_path / "b").exists()
