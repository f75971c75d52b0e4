"""Row pools, linears and checkpoints of a few bytes, for the tests of the format."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.torch import save_file
from torch import Tensor

from wexpand_plugin.format.clusters import ClusterBias
from wexpand_plugin.format.config import CheckpointConfig, GroupEntry, LinearEntry
from wexpand_plugin.format.linear import StoredLinear
from wexpand_plugin.format.router import StoredRouter
from wexpand_plugin.format.rowpool import RowPool
from wexpand_plugin.format.values import FLOATS, ValueCodec, codec
from wexpand_plugin.format.writer import seal

__all__ = [
    "CODECS",
    "NAME",
    "Sample",
    "changed",
    "linear",
    "masks",
    "pools",
    "row_maps",
    "rows_of",
    "same_bits",
    "write",
]

NAME = "layers.0.up"
CODECS = [codec(name) for name in FLOATS] + [
    codec("int8", 8), codec("int8", 128), codec("int4", 8), codec("int4", 16), codec("int3", 8),
    codec("int2", 16), codec("int6", 8), codec("int5", 24),
]  # fmt: skip


def same_bits(a: Tensor, b: Tensor) -> bool:
    def bits(t):
        return t.dtype, t.shape, t.contiguous().view(torch.uint8).numpy().tobytes()

    return bits(a) == bits(b)


def changed(tensor: Tensor, place, value) -> Tensor:
    tensor = tensor.clone()
    tensor[place] = value
    return tensor


# --- random pools


@st.composite
def masks(draw, rows: int | None = None, columns: int | None = None) -> Tensor:
    """Booleans [rows, in]; some rows empty, some full."""
    shape = (rows or draw(st.integers(1, 6)), columns or draw(st.integers(1, 40)))
    keep = torch.from_numpy(draw(arrays.arrays(bool, shape)))
    for row in range(shape[0]):
        match draw(st.sampled_from(["as drawn", "empty", "full"])):
            case "empty":
                keep[row] = False
            case "full":
                keep[row] = True
    return keep


@st.composite
def row_maps(draw, experts: int | None = None) -> Tensor:
    """uint8 [experts, out], any numbers: a version that no expert uses is allowed."""
    shape = (experts or draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    top = st.integers(0, shape[0] - 1)
    return torch.from_numpy(draw(arrays.arrays("uint8", shape, elements=top)))


@st.composite
def rows_of(draw, how: ValueCodec, keep: Tensor) -> tuple[Tensor, Tensor | None]:
    """(rows, scale): any rows that `how` stores without loss, zero where not kept.

    Of floats any finite bit patterns, -0.0 and denormals too; of integers any number times any
    scale, which is 0 for some groups.
    """
    shape = tuple(keep.shape)
    if how.scaled:
        every = range(how.lowest, how.largest + 1, 2 if how.odd else 1)
        q = torch.from_numpy(draw(arrays.arrays("int8", shape, elements=st.sampled_from(every))))
        scales = st.sampled_from([0.0, 2.0**-14, 0.0123, 1.0, 100.0])
        wide = (shape[0], how.scales(shape[1]))
        scale = torch.from_numpy(draw(arrays.arrays("float16", wide, elements=scales)))
        return how.decode(torch.where(keep, q, 0), scale), scale
    bits = draw(arrays.arrays(f"int{how.bits}", shape))
    values = torch.from_numpy(bits.copy()).view(how.storage)
    values = torch.where(torch.isfinite(values), values, torch.ones((), dtype=how.storage))
    return torch.where(keep, values, torch.zeros((), dtype=how.storage)), None


class Sample(NamedTuple):
    """A pool and what it was packed from."""

    pool: RowPool
    rows: Tensor
    """[versions, in] in the codec's float, or float32"""
    keep: Tensor
    row_map: Tensor
    """uint8 [experts, out]"""

    def version(self, expert: int, neuron: int) -> int:
        """The row version of a pair, counted by hand."""
        before = sum(int(column.max()) + 1 for column in self.row_map.t()[:neuron])
        return before + int(self.row_map[expert, neuron])

    def expert(self, index: int) -> Tensor:
        """Dense [out, in]."""
        neurons = range(self.row_map.shape[1])
        return self.rows[[self.version(index, neuron) for neuron in neurons]]


@st.composite
def pools(draw, how=None, experts: int | None = None, columns: int | None = None) -> Sample:
    """A pool of any codec, masked or full, of one expert or several."""
    how = how or draw(st.sampled_from(CODECS))
    row_map = draw(row_maps(experts))
    if len(row_map) == 1:
        row_map.zero_()
    versions = sum(int(column.max()) + 1 for column in row_map.t())
    keep = draw(masks(versions, columns))
    if draw(st.booleans()):
        keep[:] = True
    rows, scale = draw(rows_of(how, keep))
    pool = RowPool.pack(rows, row_map, keep=keep, codec=how, scale=scale)
    return Sample(pool, rows, keep, row_map)


# --- linears and checkpoints


def linear(
    experts: int = 2,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    how: ValueCodec | None = None,
    full: bool = False,
    clusters: int = 0,
    parents: int = 0,
    cluster_bias: bool = False,
) -> tuple[LinearEntry, dict[str, Tensor]]:
    """(entry, tensors by kind) of a small linear: 12 columns, 3 neurons.

    :param clusters: 0: as many as experts
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3 * experts, 12, generator=generator).to(dtype)
    if not full:
        rows[:, ::3] = 0
    row_map = torch.arange(experts, dtype=torch.uint8).unsqueeze(1).repeat(1, 3)
    pool = RowPool.pack(rows, row_map, codec=how)
    clusters = clusters or experts
    router = biases = cluster_expert = None
    if clusters > 1:
        weight = torch.randn(parents + clusters, 12, generator=generator)
        router = StoredRouter(weight, torch.randn(len(weight), generator=generator), parents)
    if 1 < experts < clusters:
        cluster_expert = (torch.arange(clusters) * experts // clusters).to(torch.uint8)
    if cluster_bias:
        biases = ClusterBias.pack(torch.randn(clusters, 3, generator=generator))
    own = torch.randn(3, generator=generator).to(dtype) if bias else None
    stored = StoredLinear(pool, router, own, biases, cluster_expert)
    return stored.entry(dtype), stored.tensors()


def write(
    path: Path, linears: Mapping[str, tuple[LinearEntry, dict[str, Tensor]]], **others: Tensor
) -> CheckpointConfig:
    """A checkpoint in a new directory: these linears as one input group, and `others`."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "any", "hidden_size": 12}))
    named = {f"{n}.{kind}": t for n, (_, tensors) in linears.items() for kind, t in tensors.items()}
    named = {name: tensor.clone() for name, tensor in named.items()}
    save_file(named | others, path / "model.safetensors", metadata={"format": "pt"})
    entries = {name: entry for name, (entry, _) in linears.items()}
    first = next(iter(entries.values()))
    group = GroupEntry.of(entries, range(first.clusters))
    return seal(path, [group], {"by": "a test", "path": ("a", 1)})
