"""Where ways to spend bytes are compared."""

import pytest
import torch

from evals import corrected
from evals.grounds import RealGround
from evals.pocket import MODEL, corpus
from evals.real_model import CONTEXT

MASK = {"SparseExpansionModifier": {"targets": ["re:.*mlp.*"], "num_experts": 1, "sparsity": 0.5}}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    texts = corpus.excerpts("train", count=200, characters=1000, seed=3)
    (folder / "wiki.valid.tokens").write_text("\n".join(texts), encoding="utf8")
    (folder / "wiki.test.raw").write_text("\n".join(reversed(texts)), encoding="utf8")
    return folder


def test_windows_are_the_beginning_of_the_calibration_text(data):
    ground = RealGround(MODEL, data)
    windows = ground.windows(0)
    assert windows.shape[1] == CONTEXT and len(windows) > 40
    text = (data / "wiki.valid.tokens").read_text(encoding="utf8")
    begins = ground._tokenizer.decode(windows[0], skip_special_tokens=True)
    assert text.strip().startswith(begins.strip()[:200])


def test_what_becomes_of_a_model_is_measured(data):
    ground = RealGround(MODEL, data)
    model = ground.dense()
    loss = ground.loss(model)
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.down_proj.weight.zero_()
    assert ground.loss(model) > loss + 0.5


@pytest.mark.slow
def test_a_mask_is_the_same_by_a_recipe_and_in_memory(data):
    """A correction of rank 0, by the method's own pieces, against a recipe run end to end."""
    ground = RealGround(MODEL, data)
    found = ground.measure(MASK, 0)
    blocks = range(len(ground.dense().model.layers))
    in_memory = corrected.measure(ground, blocks, 0.5, seed=0, epochs=0, rank=0)
    assert found["stored"] == pytest.approx(0.5625)
    assert in_memory == pytest.approx(found["loss"], abs=0.02)
