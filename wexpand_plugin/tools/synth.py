"""Synthetic checkpoints: a Llama of any shape with random weights, masks and routers.

For measuring speed and memory at sizes that nobody has compressed yet, and for trying the serving
half without a model at hand. Rows are written straight as row pools, file by file, so memory stays
small however large the model is. The text such a model writes is noise.

Under a budget, which (neuron, expert) pairs have rows of their own is random, spread evenly over
neurons and experts, and all others share the neuron's base row. A compressed model spends the same
bytes where they help, so how rows are shared, and what its caches make of that, may differ.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from .. import __version__
from ..errors import WexpandError
from ..format.bits import pack_bits
from ..format.clusters import MAX_CLUSTERS, ClusterBias
from ..format.config import GroupEntry, LinearEntry
from ..format.directories import partial_directory, require_empty
from ..format.linear import StoredLinear
from ..format.router import StoredRouter, narrowest
from ..format.rowpool import MAX_EXPERTS, RowPool
from ..format.sizes import StoredBytes
from ..format.values import FLOATS, GROUP, ValueCodec, codec
from ..format.writer import SHARD_BYTES, TensorWriter, seal
from ..method.clusters import parents_of
from ..method.settings import refuse_seed

__all__ = ["Shape", "synth"]

TARGETS = {"mlp": ("mlp.",), "all": ("mlp.", "self_attn.")}
# linears that read the same tensor share a router
GROUPS = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
BYTES, SPECIAL = 256, ("<s>", "</s>")


@dataclass(frozen=True)
class Shape:
    """The model: names as on the command line, defaults are a model of a few million weights."""

    hidden: int = 512
    ffn: int = 1376
    layers: int = 4
    heads: int = 8
    kv_heads: int | None = None
    """by default as many as `heads`"""
    vocab: int = 1024
    context: int = 4096

    def config(self, dtype: str):
        """The LlamaConfig. Raises WexpandError naming the size that cannot be."""
        from transformers import LlamaConfig

        kv_heads = self.kv_heads or self.heads
        for name, value in vars(self).items():
            if value is not None and value < 1:
                raise WexpandError(f"{name}: {value} should be at least 1")
        if self.hidden % (2 * self.heads):
            raise WexpandError(
                f"hidden: {self.hidden} should be a multiple of 2 * heads = {2 * self.heads}"
            )
        if self.heads % kv_heads:
            raise WexpandError(f"kv_heads: {kv_heads} should divide heads = {self.heads}")
        if self.vocab < BYTES + len(SPECIAL):
            raise WexpandError(
                f"vocab: {self.vocab} should be at least {BYTES + len(SPECIAL)}, the tokenizer's"
            )
        return LlamaConfig(
            architectures=["LlamaForCausalLM"], hidden_size=self.hidden, dtype=dtype,
            intermediate_size=self.ffn, num_hidden_layers=self.layers, vocab_size=self.vocab,
            num_attention_heads=self.heads, num_key_value_heads=kv_heads,
            max_position_embeddings=self.context, tie_word_embeddings=False,
            bos_token_id=BYTES, eos_token_id=BYTES + 1,
        )  # fmt: skip


def synth(
    output: str | Path,
    shape: Shape | None = None,
    *,
    experts: int = 16,
    clusters: int = 0,
    sparsity: float = 0.8,
    budget: float | None = None,
    targets: str = "mlp",
    dtype: str = "bfloat16",
    values: str | None = None,
    value_group: int = GROUP,
    dense: bool = False,
    seed: int = 0,
    quiet: bool = False,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a synthetic checkpoint, with a byte-level tokenizer.

    :param output: a directory that does not exist, or is empty
    :param experts: per expanded linear; 1 is plain sparse
    :param clusters: that the router tells apart, with a bias each; from 33 on it has two levels.
        0: as many as experts, without biases
    :param sparsity: share of zeros in each row version; every row keeps equally many weights
    :param budget: stored bytes of the expanded linears, x their dense bytes; None stores every
        (expert, neuron) pair's own row
    :param targets: "mlp", or "all" linears of the blocks
    :param dtype: of the model: of what is dense, and of scales once they are applied
    :param values: codec of the kept weights, by default `dtype`
    :param value_group: columns of a row that share a scale, of integer values
    :param dense: write the model of the same shape without any zeros, for comparison
    :raises WexpandError: a value that cannot be, or `output` is not empty
    """
    from ..hf.names import linear_tensors, skeleton

    require_empty(output)
    if dtype not in FLOATS:
        raise WexpandError(f"dtype: {dtype!r} is not one of {', '.join(FLOATS)}")
    if targets not in TARGETS:
        raise WexpandError(f"targets: {targets!r} is not one of {', '.join(TARGETS)}")
    if not 1 <= experts <= MAX_EXPERTS:
        raise WexpandError(f"experts: {experts} should be 1 to {MAX_EXPERTS}")
    if clusters and not experts <= clusters <= MAX_CLUSTERS:
        raise WexpandError(f"clusters: {clusters} should be {experts} (experts) to {MAX_CLUSTERS}")
    if not 0 <= sparsity < 1:
        raise WexpandError(f"sparsity: {sparsity} should be at least 0 and below 1")
    if budget is not None and (experts == 1 or not 0 < budget < math.inf):
        right = "left out with one expert" if experts == 1 else "above 0 and finite"
        raise WexpandError(f"budget: {budget} should be {right}")
    refuse_seed(seed)
    how = codec(values or dtype, value_group)
    shape = shape or Shape()
    generator = torch.Generator().manual_seed(seed)
    groups: dict[str, dict[str, LinearEntry]] = {}
    routers: dict[str, StoredRouter] = {}
    with partial_directory(output) as partial:
        shape.config(dtype).save_pretrained(partial)
        _tokenizer().save_pretrained(partial)
        model = skeleton(partial)
        state = model.state_dict()
        linears = {
            tensor: name
            for tensor, name in linear_tensors(model, state).items()
            if not dense and any(part in name for part in TARGETS[targets])
        }
        writer = TensorWriter(partial, max_shard_bytes)
        for name, like in tqdm(state.items(), disable=quiet, desc="tensors", unit=""):
            linear = linears.get(name)
            if linear is None:
                writer.add(name, _dense(like, FLOATS[dtype], generator))
                continue
            rows, columns = like.shape
            kept = max(1, round((1 - sparsity) * columns))
            sizes = StoredBytes(how, FLOATS[dtype])
            routed = clusters or experts
            parents = parents_of(routed)
            fixed = sizes.fixed(rows, columns, experts, routed, parents, biased=clusters > 0)
            row_map = _row_map(rows, columns, experts, kept, budget, sizes, fixed, generator)
            pool = _pool(row_map, columns, kept, how, generator)
            block, _, kind = linear.rpartition(".")
            group = f"{block}.{GROUPS.get(kind, kind)}"
            router = named = biases = None
            if routed > 1:
                if group not in routers:
                    routers = {group: _router(routed, parents, columns, generator)}
                weight, bias, _ = routers[group]
                router = StoredRouter(weight.clone(), bias.clone(), parents)
            if 1 < experts < routed:
                named = torch.arange(routed).remainder(experts).to(torch.uint8)
            if clusters:
                biases = ClusterBias.pack(torch.randn(clusters, rows, generator=generator) / 10)
            stored = StoredLinear(pool, router, None, biases, named)
            groups.setdefault(group, {})[linear] = stored.entry(FLOATS[dtype])
            writer.add_linear(linear, stored)
        writer.close()
        if not dense:
            made_by = {"wexpand": __version__, "command": "synth", "seed": seed}
            entries = [GroupEntry.of(found) for found in groups.values()]
            seal(partial, entries, made_by, checksums=writer.checksums)


def _dense(like: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if like.dim() == 1:  # a norm
        return torch.ones(like.shape, dtype=dtype)
    return torch.randn(like.shape, dtype=dtype, generator=generator) * like.shape[1] ** -0.5


def _router(
    clusters: int, parents: int, columns: int, generator: torch.Generator
) -> StoredRouter:
    """Random directions of equal weight send random inputs to all clusters about equally."""
    weight = torch.randn(parents + clusters, columns, generator=generator).half()
    return StoredRouter(narrowest(weight), torch.zeros(parents + clusters), parents)


def _row_map(
    rows: int,
    columns: int,
    experts: int,
    kept: int,
    budget: float | None,
    sizes: StoredBytes,
    fixed: int,
    generator: torch.Generator,
) -> Tensor:
    """uint8 [experts, rows]: a base version per row, and own ones for random pairs."""
    pairs = (experts - 1) * rows
    own = pairs
    if budget is not None:
        row_bytes = int(sizes.row(torch.tensor([kept]), columns))
        dense = sizes.dense(rows, columns)
        own = min(pairs, int((budget * dense - fixed) // row_bytes) - rows)
        if own < 0:
            raise WexpandError(
                f"budget: {budget} is below {(fixed + rows * row_bytes) / dense:.2f}, the size of "
                f"the base versions alone for a {columns} x {rows} linear; raise the budget or "
                "the sparsity"
            )
    granted = torch.zeros(experts - 1, rows, dtype=torch.uint8)
    granted.view(-1)[torch.randperm(pairs, generator=generator)[:own]] = 1
    base = torch.zeros(1, rows, dtype=torch.uint8)
    # numbered within the neuron: the base version is 0
    return torch.cat([base, torch.cumsum(granted, dim=0).to(torch.uint8) * granted])


def _pool(
    row_map: Tensor, columns: int, kept: int, how: ValueCodec, generator: torch.Generator
) -> RowPool:
    """Random rows that keep `kept` of `columns` weights each.

    Masks are a bank of random ones, each turned by a random number of bytes where rows are whole
    bytes: drawing every row afresh would take hours at the sizes this is for.
    """
    versions = int((row_map.amax(dim=0).long() + 1).sum())
    mask = None
    if kept < columns:
        scores = torch.rand(256, columns, generator=generator)
        keep = torch.zeros(scores.shape, dtype=torch.bool)
        keep.scatter_(1, scores.topk(kept, dim=1).indices, True)
        mask = pack_bits(keep)[torch.randint(len(keep), (versions,), generator=generator)]
        if columns % 8 == 0:
            width = columns // 8
            turn = torch.randint(width, (versions, 1), generator=generator)
            mask = mask.gather(1, (torch.arange(width) + turn) % width)
    values, scale = _values(versions, columns, kept, how, generator)
    return RowPool(how, columns, values, mask, row_map if len(row_map) > 1 else None, scale)


def _values(
    versions: int, columns: int, kept: int, how: ValueCodec, generator: torch.Generator
) -> tuple[Tensor, Tensor | None]:
    """What rows with `kept` random weights store, each of variance 1 / kept, and their scales."""
    if not how.scaled:
        values = torch.randn(versions * kept, dtype=how.storage, generator=generator)
        return values * kept**-0.5, None
    elements = int(how.elements(torch.tensor(kept)))
    values = torch.randint(256, (versions, elements), dtype=torch.uint8, generator=generator)
    if used := kept * how.bits % 8:
        values[:, -1] &= 2**used - 1
    # integers drawn evenly from -largest to largest deviate by about largest / sqrt(3)
    scale = torch.full((versions, how.scales(columns)), (3 / kept) ** 0.5 / how.largest).half()
    return values.flatten().view(how.storage), scale


def _tokenizer():
    """One token per byte: any text, any language, no file to download."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate([*alphabet, *SPECIAL])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    begin, end = SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=begin, eos_token=end)
