"""A foreign reader, written from the format's page alone, reads what we write."""

import json

import pytest
import torch
from reader import read

from wexpand_plugin.format.config import GroupEntry, LinearEntry
from wexpand_plugin.format.router import StoredRouter
from wexpand_plugin.format.rowpool import RowPool
from wexpand_plugin.format.values import CODECS, codec
from wexpand_plugin.format.writer import TensorWriter, seal


@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "full"])
@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize("values", CODECS)
def test_a_foreign_reader_gets_the_same_experts(tmp_path, values, experts, sparse):
    generator = torch.Generator().manual_seed(0)
    width, how = 77, codec(values, 32)
    router = StoredRouter(torch.randn(experts, width).half(), torch.randn(experts))
    writer, pools = TensorWriter(tmp_path, limit=2000), {}
    for name, out in (("a.up", 5), ("a.gate", 9)):
        weight = torch.randn(experts, out, width, generator=generator)
        if sparse:
            weight[torch.rand(weight.shape, generator=generator) < 0.6] = 0
        weight[-1, ::2] = weight[0, ::2]
        pool = RowPool.pack_experts(weight)
        pool = RowPool.pack(pool.rows(), pool.row_map, keep=pool.rows() != 0, codec=how)
        pools[name] = pool
        bias = torch.arange(out) / 4 if name == "a.up" else None
        writer.add_pool(name, pool, router if experts > 1 else None, bias)
    writer.add("norm.weight", torch.ones(3))
    writer.close()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "any"}))
    linears = {
        name: LinearEntry.of(pool, name == "a.up", torch.bfloat16) for name, pool in pools.items()
    }
    group = GroupEntry(in_features=width, experts=experts, linears=linears)
    seal(tmp_path, [group], {}, checksums=writer.checksums)

    found = read(tmp_path)
    assert found.keys() == pools.keys()
    for name, pool in pools.items():
        for expert in range(experts):
            ours = pool.expert(expert).double()
            assert torch.equal(torch.from_numpy(found[name]["experts"][expert]), ours)
        if experts > 1:
            assert torch.equal(found[name]["router"][0], router.weight)
    assert found["a.up"]["bias"].tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert found["a.gate"]["bias"] is None
