"""A sound checkpoint of several files, for the tests of verify and inspect."""

from pathlib import Path

import pytest
import tiny

from wexpand_plugin.format.rowpool import RowPool
from wexpand_plugin.format.values import codec
from wexpand_plugin.hf.linear import RoutedLinear
from wexpand_plugin.hf.saving import wrap_save_pretrained


@pytest.fixture(scope="session")
def sound(tmp_path_factory) -> Path:
    """An expanded qwen2 (biases) in several files, one linear as int8 and one as int3."""
    path = tmp_path_factory.mktemp("verify") / "sound"
    model = tiny.expand(tiny.dense("qwen2"), match="")
    for name, how in (("0.mlp.up_proj", codec("int8", 8)), ("1.mlp.down_proj", codec("int3", 16))):
        module = model.get_submodule(f"model.layers.{name}")
        old = module.pool
        pool = RowPool.pack(old.rows(), old.row_map, codec=how)
        new = RoutedLinear.from_pool(
            pool, module.router, module.bias, group=module.group, tokens=module.tokens
        )
        model.set_submodule(f"model.layers.{name}", new)
    wrap_save_pretrained(model, {"test": "qwen2"})
    model.save_pretrained(path, max_shard_size="60kB")
    return path
