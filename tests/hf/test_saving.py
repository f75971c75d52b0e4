"""What was saved is read back before it is called done."""

import copy

import pytest
import tiny

from wexpand_plugin.errors import WexpandError
from wexpand_plugin.hf.linear import RoutedLinear
from wexpand_plugin.hf.saving import wrap_save_pretrained


def test_a_model_that_no_reader_would_take_is_not_saved(tmp_path):
    """As when another library has unrolled experts that the model's class holds as one tensor."""
    model = tiny.expand(tiny.dense())
    wrap_save_pretrained(model, {})
    mlp = model.model.layers[1].mlp
    mlp.unrolled = copy.deepcopy(mlp.up_proj)
    assert isinstance(mlp.unrolled, RoutedLinear)
    with pytest.raises(WexpandError, match="out: not saved, .*layers.1.mlp.unrolled should be a"):
        model.save_pretrained(tmp_path / "out")
    assert not list(tmp_path.iterdir())
    del mlp.unrolled
    model.save_pretrained(tmp_path / "out")
